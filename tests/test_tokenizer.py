"""Text to ids and back, for every kind of tokenizer; our BPE against the plain algorithm; and descriptions that are wrong."""
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import tiktoken
import tokenizers as hf
from conftest import CHECKOUT, SHARED

from pocket.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, UnknownCharacters, make_tokenizer, tokenizer_from_dict

TEXT = 'To be, or not to be\n\tübung 日本 🙂\r\n\x00'
FORGED = '<|endoftext|> <eot> <|sep|><sep> <pad><s>'
PROSE = (CHECKOUT / 'configurator.py').read_text(encoding='utf-8') + TEXT * 20 + "They're 12345 don't   we'll\n\n" * 20


def random_texts(n, seed=0):
    """n strings of random Unicode: from all of it, from its beginning, from ASCII, and from what splitting turns on."""
    rng = random.Random(seed)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    sets = [points, points[:3000], points[:128], [9, 10, 13, 32, 32, 32, 0x2028, 0xA0, 0x2581, 65, 115, 116, 49, 0x27, 33]]
    return [''.join(map(chr, rng.choices(sets[i % 4], k=rng.randint(1, 60)))) for i in range(n)]


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    """tiktoken reads from a copy of the shared files (it deletes what it takes for damaged), and finds no network."""
    folder = tmp_path_factory.mktemp('tiktoken')
    if SHARED.is_dir():
        shutil.copytree(SHARED / 'tiktoken_cache', folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(folder))
        for name in ('HTTPS_PROXY', 'https_proxy'):
            patch.setenv(name, 'http://127.0.0.1:9')
        yield


KINDS = ['char', 'byte', 'bpe', 'sentencepiece', 'sentencepiece_unigram', 'gpt2', 'cl100k_base']
made = {}


def tokenizer(kind):
    """One of each, made once. char knows the characters of TEXT."""
    if kind in ('gpt2', 'cl100k_base') and not SHARED.is_dir():
        pytest.skip('the files of tiktoken are not beside this checkout')
    if kind not in made:
        texts, size = {'char': ([TEXT, FORGED], None), 'bpe': ([PROSE], 400)}.get(kind, ([PROSE], 420))
        made[kind] = make_tokenizer(kind, texts, size, special_tokens=('eot', 'pad', 'sep'))
    return made[kind]


@pytest.mark.parametrize('kind', KINDS)
def test_round_trips(kind):
    tok = tokenizer(kind)
    again = tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    assert again.special_tokens == tok.special_tokens and again.vocab_size == tok.vocab_size and again.to_dict() == tok.to_dict()
    for text in ['', TEXT, TEXT * 50, FORGED] + (['🙂'] if kind == 'char' else random_texts(200)):
        ids = tok.encode(text)
        assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids) and not set(ids) & set(tok.special_tokens.values())
        assert tok.decode(ids) == text and again.encode(text) == ids
        decode = tok.stream_decoder()
        pieces = [decode(i) for i in ids] + [decode(None)]
        assert ''.join(pieces) == text and ('\ufffd' in text or '\ufffd' not in ''.join(pieces))
        assert tok.byte_lengths()[np.array(ids, dtype=int)].sum() == len(text.encode('utf-8'))
    texts = [TEXT, '', FORGED, TEXT * 200]
    for batch in (texts, texts[3:]):  # with short texts among them, and long ones alone
        for ids, text in zip(tok.encode_batch(iter(batch)), batch, strict=True):
            assert ids.dtype == np.uint32 and ids.tolist() == tok.encode(text)


@pytest.mark.parametrize('kind', KINDS)
def test_special_tokens(kind):
    tok = tokenizer(kind)
    ids = [tok.special_tokens[name] for name in ('eot', 'pad', 'sep')]
    assert tok.decode(ids) == '' and len(set(ids)) == 3 and tok.eos_id == ids[0] and tok.decoder_start_id == ids[2]
    expected = {'char': len(set(TEXT + FORGED)), 'byte': 256, 'bpe': 397, 'gpt2': 50256, 'cl100k_base': 100257}
    if kind in expected:
        first = expected[kind] + (20 if kind == 'cl100k_base' else 1)
        assert ids == [expected[kind], first, first + 1] and tok.vocab_size == first + 2
    lines = tok.vocabulary_listing().splitlines()
    assert len(lines) == tok.vocab_size and lines[ids[1]].split() == [str(ids[1]), '<pad>']
    a = tok.encode('s')[0]
    assert lines[a].split() == [str(a), "'s'"]
    for wrong in (('a', 'a'), ('<a>',), ('',), (5,)):
        with pytest.raises(ValueError, match='different names'):
            make_tokenizer(kind, [PROSE], 420, special_tokens=wrong)


def test_char_ids_are_in_the_order_of_code_points():
    tok = CharTokenizer.train('hello')
    assert tok.chars == 'ehlo' and tok.encode('hole') == [1, 3, 2, 0]


def test_unknown_characters_are_named():
    tok = make_tokenizer('char', ['abc'], special_tokens=('pad',))
    with pytest.raises(UnknownCharacters, match=r"does not know 'é' \(U\+00E9\) '\\n' \(U\+000A\)") as e:
        tok.encode('caé\né')
    assert e.value.characters == ['é', '\n']


def test_every_byte():
    tok = ByteTokenizer()
    assert tok.special_tokens['eot'] == 256 and tok.decode([104, 256, 105]) == 'hi' and max(tok.encode('<|endoftext|>')) < 256
    assert tok.decode([0xE6, 0x97]) == '\ufffd'  # a character that was cut off
    decode = tok.stream_decoder()
    assert [decode(i) for i in (0xE6, 0x97, 0xA5)] == ['', '', '日'] and decode(0xE6) + decode(None) == '\ufffd'


def test_prompt_is_never_empty():
    assert ByteTokenizer().prompt('') == [10] and CharTokenizer.train('ab\n').prompt('') == [0] and CharTokenizer.train('ba').prompt('') == [0]
    assert CharTokenizer.train('ab\n').prompt('b') == [2]
    assert len(tokenizer('bpe').prompt('')) == len(tokenizer('sentencepiece').prompt('')) == 1


def test_dicts_of_older_versions():
    assert tokenizer_from_dict({'kind': 'byte'}).special_tokens == {'eot': 256} and tokenizer_from_dict({'kind': 'char', 'chars': 'ab'}).special_tokens == {}
    assert make_tokenizer('byte').to_dict() == {'kind': 'byte'} and make_tokenizer('char', ['ba']).to_dict() == {'kind': 'char', 'chars': 'ab'}  # a resume compares


# What users can't be kept from typing

@pytest.mark.parametrize('kind, n', [('bpe', 1_000_001), ('sentencepiece', 100_000), ('sentencepiece_unigram', 100_000), ('cl100k_base', 1_000_001)])
def test_monstrous_text(kind, n):
    tok = tokenizer(kind)
    for text in ('a' * (n // 4), ' ' * n + 'a', ' \n' * (n // 4) + 'x'):
        assert tok.decode(tok.encode_to_numpy(text)) == text
    assert tok.decode(tok.encode('a\ud800b\ud83d\ude42')) == 'a\ufffdb🙂'  # half a character, and one from two halves
    assert tok.decode(tok.encode_batch(['\udfff' * 3000])[0]) == '\ufffd' * 3000


def test_only_what_is_too_long_is_cut():
    tok = tokenizer('bpe')
    text = ' ' * 1_000_001 + 'a'
    both = tok.encode(PROSE * 20 + text + PROSE * 20)
    plain = tok.encode(PROSE * 20)
    assert both[:len(plain) - 5] == plain[:-5] and both[5 - len(plain):] == plain[5:]


# Our BPE

def plain_words(text):
    """What the merges are applied to: GPT-2's words, as Hugging Face's library cuts and spells them."""
    return [list(word) for word, _ in hf.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


def merge(word, left, right):
    out = []
    for symbol in word:
        if out and out[-1] == left and symbol == right:
            out[-1] = left + right + '\0'  # marked, so that it is not joined again in this pass
        else:
            out.append(symbol)
    return [s.rstrip('\0') for s in out]


def byte_level_alphabet():
    """The printable character for each byte, from the library's spelling of what has that byte in it."""
    names = {}
    for c in map(chr, [*range(0x800), 0x1000, *range(0x2000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x4000)]):
        if not 0xD800 <= ord(c) < 0xE000:
            names.update(zip(c.encode('utf-8'), ''.join(map(''.join, plain_words(c)))))
    unused = iter(sorted(set(hf.pre_tokenizers.ByteLevel.alphabet()) - set(names.values())))  # bytes that no UTF-8 has
    return [names.get(b) or next(unused) for b in range(256)]


def test_bpe_encodes_as_merges_applied_in_order_do():
    tok = tokenizer('bpe')
    merges = [m.split(' ') for m in tok.to_dict()['merges']]
    assert len(merges) == 400 - 256 - 3
    ids = {c: i for i, c in enumerate(byte_level_alphabet())} | {a + b: 256 + n for n, (a, b) in enumerate(merges)}
    for text in random_texts(200, seed=1) + [PROSE[-1500:], PROSE[:500]]:
        expected = []
        for word in plain_words(text):
            for a, b in merges:
                word = merge(word, a, b)
            expected += [ids[s] for s in word]
        assert tok.encode(text) == expected


def test_bpe_learns_what_the_plain_algorithm_learns():
    """Counting all pairs anew for every merge; of equals, the smaller ids first."""
    text = PROSE[-6000:] + 'aaaa aaaaa aaa' * 3
    alphabet = byte_level_alphabet()
    ids, words, merges = {c: i for i, c in enumerate(alphabet)}, plain_words(text), []
    while True:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        (a, b), n = min(pairs.items(), key=lambda p: (-p[1], ids[p[0][0]], ids[p[0][1]]), default=((0, 0), 0))
        if n < 2 or len(merges) == 120:
            break
        ids[a + b] = len(ids)
        merges.append(f'{a} {b}')
        words = [merge(word, a, b) for word in words]
    assert BpeTokenizer.train([text], 257 + 120).to_dict()['merges'] == merges


def test_bpe_learns_the_same_from_any_order_and_any_hash_seed():
    lines = PROSE.splitlines(keepends=True)
    first = make_tokenizer('bpe', lines, 700).to_dict()
    random.Random(0).shuffle(lines)
    assert make_tokenizer('bpe', (line for line in lines), 700).to_dict() == first
    command = 'import sys, json; from tokenizer import make_tokenizer; print(json.dumps(make_tokenizer("bpe", json.load(sys.stdin), 700).to_dict()))'
    for seed in '12':
        out = subprocess.run([sys.executable, '-c', command], cwd=CHECKOUT, env={**os.environ, 'PYTHONHASHSEED': seed},
                             input=json.dumps(lines).encode(), capture_output=True, check=True).stdout
        assert json.loads(out) == first


def test_bpe_of_words_without_end(capsys):
    tok = make_tokenizer('bpe', ['a' * 5000, 'ab' * 3000, '日' * 2000], 280)
    assert 'a' * 16 in map(tok.decode, ([i] for i in range(256, 279))) and tok.decode(tok.encode('ab日' * 99)) == 'ab日' * 99
    assert not capsys.readouterr().out


@pytest.mark.parametrize('kind, texts, size, said', [('bpe', ['abab'], 300, 'too high for this text: made 258'), ('bpe', [], 300, 'made 257'),
                                                     ('sentencepiece', ['abab'], 300, 'too high for this text: made '), ('sentencepiece_unigram', ['ab ab'], 999, 'made ')])
def test_vocabulary_too_high(kind, texts, size, said, capfd):
    tok = make_tokenizer(kind, texts, size, special_tokens=('eot',))
    out, err = capfd.readouterr()
    assert said in out and f'{tok.vocab_size:,}' in out and tok.vocab_size < size and not err
    assert tok.decode(tok.encode(TEXT)) == TEXT


@pytest.mark.parametrize('kind, texts, size, said', [('bpe', ['ab'], 256, 'vocabulary of 256 is too small.* 257'), ('sentencepiece', [PROSE], 100, 'vocabulary of 100 from this: it needs at least [23]'),
                                                     ('sentencepiece', [], 400, 'there is no text'), ('sentencepiece_unigram', ['\n'], 400, 'there is no text'),
                                                     ('nope', None, None, "no tokenizer 'nope'.*char, byte, bpe, sentencepiece, sentencepiece_unigram.*gpt2.*cl100k_base")])
def test_what_cannot_be_made(kind, texts, size, said):
    with pytest.raises(ValueError, match=said) as e:
        make_tokenizer(kind, texts, size)
    assert '\n' not in str(e.value)


def test_tiktoken_without_network_and_cache():
    for go in (lambda: make_tokenizer('p50k_base'), lambda: tokenizer_from_dict({'kind': 'tiktoken', 'name': 'p50k_base', 'specials': []})):
        with pytest.raises(ValueError, match='p50k_base.*TIKTOKEN_CACHE_DIR') as e:
            go()
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['bpe', 'bpe split as in cl100k_base', 'gpt2'])
def test_hugging_faces_file(kind):
    tok = tokenizer(kind.split()[0])
    if kind != kind.split()[0]:  # few merges, so it is quick; the expression is what is hard
        tok, split = BpeTokenizer(tok.merges, tok.special_tokens), tokenizer('cl100k_base').split
        tok.split, tok.encoding = split, tiktoken.Encoding('', pat_str=split, mergeable_ranks=tok.ranks, special_tokens={})
    theirs = hf.Tokenizer.from_str(tok.tokenizer_json())
    for text in random_texts(300, seed=2) + [PROSE, TEXT, "don't\n\n12345 \n x  ", 'a\n', 'a \n  ']:
        assert theirs.encode(text).ids == tok.encode(text) and theirs.decode(tok.encode(text)) == text
    for name, text in (('eot', '<|endoftext|>'), ('pad', '<|pad|>')):
        assert theirs.token_to_id(text) == tok.special_tokens[name] and theirs.encode(text).ids == [tok.special_tokens[name]]


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real text is not beside this checkout')
def test_bpe_packs_as_well_as_hugging_faces():
    text = (SHARED / 'tinyshakespeare.txt').read_text(encoding='utf-8')[:300_000]
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([text], hf.trainers.BpeTrainer(vocab_size=2048, special_tokens=['<|endoftext|>'], show_progress=False,
                                                              initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    tok = make_tokenizer('bpe', [text], 2048)
    n, m = len(tok.encode(text)), len(theirs.encode(text).ids)
    assert tok.vocab_size == 2048 and n <= 1.005 * m, (n, m)


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real texts are not beside this checkout')
def test_gpt2_is_gpt2s():
    text = (SHARED / 'the-verdict.txt').read_bytes().decode('utf-8')
    assert len(tokenizer('gpt2').encode(text)) == 5145 and len(tokenizer('cl100k_base').encode(text)) == 4943
    assert tokenizer('gpt2').encode('hello world') == [31373, 995] and tokenizer('gpt2').special_tokens['eot'] == 50256
    assert tokenizer('gpt2').merges[:2] == ['Ġ t', 'Ġ a'] and len(tokenizer('gpt2').merges) == 50_000  # as in its vocab.bpe


@pytest.mark.parametrize('d', [{}, [], None, {'kind': 'char'}, {'kind': 'char', 'chars': 'ba'}, {'kind': 'char', 'chars': 'aa'}, {'kind': 'char', 'chars': 5},
                               {'kind': 'char', 'chars': ''}, {'kind': 'word'}, {'kind': None}, {'kind': []}, {'kind': 'byte', 'specials': 5},
                               {'kind': 'byte', 'specials': [5]}, {'kind': 'byte', 'specials': [[]]}, {'kind': 'byte', 'specials': ['a', 'a']}, {'kind': 'byte', 'specials': 'eot'},
                               {'kind': 'bpe'}, {'kind': 'bpe', 'split': 'gpt2'}, {'kind': 'bpe', 'split': 'gpt2', 'merges': 'ab'}, {'kind': 'bpe', 'split': 'x', 'merges': []},
                               *({'kind': 'bpe', 'split': 'gpt2', 'merges': m} for m in (['a'], [5], [None], [['a', 'b']], ['a bc', 'b c'], ['a b', 'a b'], ['a  b'], ['a b c'], ['a ☃'])),
                               {'kind': 'tiktoken'}, {'kind': 'tiktoken', 'name': 'gpt9'}, {'kind': 'tiktoken', 'name': 5}, {'kind': 'tiktoken', 'name': []},
                               {'kind': 'sentencepiece'}, *({'kind': 'sentencepiece', 'model': m} for m in (5, '', 'é', 'AAAA', '!!', 'half'))])
def test_wrong_descriptions(d):
    if isinstance(d, dict) and d.get('model') == 'half':
        model = tokenizer('sentencepiece').model
        d = {**d, 'model': model[:len(model) // 8 * 4]}
    with pytest.raises(ValueError) as e:
        tokenizer_from_dict(d)
    assert str(e.value) and '\n' not in str(e.value)
