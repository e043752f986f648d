"""
Tokenizers: text to ids and back, for every kind; how BPE learns; dicts that describe none.

    pytest -n 0 tests/test_tokenizer.py

The tests of gpt2 and cl100k_base need tiktoken's files from ../shared, and are skipped without.
"""
import doctest
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers as hf
from conftest import CHECKOUT, SHARED

import pocket.tokenizer
from pocket.tokenizer import (
    GPT2_SPLIT,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    UnknownCharacters,
    count_words,
    encode_word_plain,
    learn_merges,
    learn_merges_plain,
    make_tokenizer,
    tokenizer_from_dict,
)

TEXT = 'To be, or not to be\n\tübung 日本 🙂\r\n\x00'
TYPED_SPECIAL_TOKENS = '<|endoftext|> <eot> <|sep|><sep> <pad><s>'
PROSE = (CHECKOUT / 'pocket' / 'configurator.py').read_text(encoding='utf-8')
PROSE += TEXT * 20 + "They're 12345 don't   we'll\n\n" * 20

KINDS = ['char', 'byte', 'bpe', 'sentencepiece', 'sentencepiece_unigram', 'gpt2', 'cl100k_base']
NEEDS_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason='../shared is not there')


def random_texts(n, seed=0):
    """n random strings from four sets of characters in turn.

    All of Unicode; its beginning; ASCII; and the characters that decide where words are cut.
    """
    rng = random.Random(seed)
    every = [*range(0xD800), *range(0xE000, 0x110000)]
    splitting = [9, 10, 13, 32, 32, 32, 0x2028, 0xA0, 0x2581, 65, 115, 116, 49, 0x27, 33]
    sets = [every, every[:3000], every[:128], splitting]
    texts = []
    for i in range(n):
        code_points = rng.choices(sets[i % 4], k=rng.randint(1, 60))
        texts.append(''.join(map(chr, code_points)))
    return texts


@pytest.fixture(scope='module', autouse=True)
def tiktoken_cache(tmp_path_factory):
    """tiktoken gets no network and a copy of its files, because it deletes damaged ones."""
    folder = tmp_path_factory.mktemp('tiktoken')
    if SHARED.is_dir():
        shutil.copytree(SHARED / 'tiktoken_cache', folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(folder))
        patch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')
        patch.setenv('https_proxy', 'http://127.0.0.1:9')
        yield


made = {}


def tokenizer(kind):
    """One tokenizer of each kind, made once, with eot, pad and sep; char learns from TEXT."""
    if kind in ('gpt2', 'cl100k_base') and not SHARED.is_dir():
        pytest.skip('../shared is not there')
    if kind not in made:
        texts = [PROSE]
        vocab_size = 420
        if kind == 'char':
            texts = [TEXT, TYPED_SPECIAL_TOKENS]
        if kind == 'bpe':
            vocab_size = 400
        made[kind] = make_tokenizer(kind, texts, vocab_size, special_tokens=('eot', 'pad', 'sep'))
    return made[kind]


def test_examples_in_docstrings():
    result = doctest.testmod(pocket.tokenizer)
    assert result.attempted >= 30
    assert not result.failed


# -----------------------------------------------------------------------------
# What holds for every kind

def texts_for(kind):
    texts = ['', TEXT, TEXT * 50, TYPED_SPECIAL_TOKENS]
    if kind == 'char':
        return texts + ['🙂']
    return texts + random_texts(200)


@pytest.mark.parametrize('kind', KINDS)
def test_decode_gives_back_what_was_encoded(kind):
    tok = tokenizer(kind)
    byte_lengths = tok.byte_lengths()
    special_ids = set(tok.special_tokens.values())
    for text in texts_for(kind):
        ids = tok.encode(text)
        assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
        assert not set(ids) & special_ids
        assert tok.decode(ids) == text
        assert byte_lengths[np.array(ids, dtype=int)].sum() == len(text.encode('utf-8'))


@pytest.mark.parametrize('kind', KINDS)
def test_stream_decoder_never_splits_a_character(kind):
    tok = tokenizer(kind)
    for text in texts_for(kind):
        decode_next = tok.stream_decoder()
        pieces = [decode_next(i) for i in tok.encode(text)] + [decode_next(None)]
        assert ''.join(pieces) == text
        if '\ufffd' not in text:
            assert '\ufffd' not in ''.join(pieces)


@pytest.mark.parametrize('kind', KINDS)
def test_a_tokenizer_survives_json(kind):
    tok = tokenizer(kind)
    again = tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    assert again.to_dict() == tok.to_dict()
    assert again.special_tokens == tok.special_tokens
    assert again.vocab_size == tok.vocab_size
    for text in texts_for(kind):
        assert again.encode(text) == tok.encode(text)


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_is_encoded_like_its_texts(kind):
    tok = tokenizer(kind)
    short_and_long = [TEXT, '', TYPED_SPECIAL_TOKENS, TEXT * 200]
    only_long = [TEXT * 200]
    for texts in (short_and_long, only_long):
        batch = tok.encode_batch(iter(texts))
        for ids, text in zip(batch, texts, strict=True):
            assert ids.dtype == np.uint32
            assert ids.tolist() == tok.encode(text)


# -----------------------------------------------------------------------------
# Special tokens

@pytest.mark.parametrize('kind', KINDS)
def test_special_tokens_decode_to_nothing(kind):
    tok = tokenizer(kind)
    ids = [tok.special_tokens[name] for name in ('eot', 'pad', 'sep')]
    assert len(set(ids)) == 3
    assert tok.decode(ids) == ''


@pytest.mark.parametrize('kind', KINDS)
def test_special_tokens_are_found_by_role(kind):
    tok = tokenizer(kind)
    assert tok.eos_id == tok.special_tokens['eot']
    assert tok.decoder_start_id == tok.special_tokens['sep']
    assert tok.special_token_id('pad') == tok.special_tokens['pad']


@pytest.mark.parametrize('names, eos, decoder_start', [
    ((), None, None),
    (('pad',), None, None),
    (('eot',), 'eot', 'eot'),
    (('eot', 'eos'), 'eos', 'eos'),
    (('bos', 'eos'), 'eos', 'bos'),
    (('bos', 'sep', 'eot'), 'eot', 'sep'),
    (('sep',), None, 'sep'),
])
def test_each_role_goes_to_the_first_of_its_names(names, eos, decoder_start):
    tok = CharTokenizer('ab', names)
    assert tok.eos_id == tok.special_tokens.get(eos)
    assert tok.decoder_start_id == tok.special_tokens.get(decoder_start)


@pytest.mark.parametrize('kind, ids, vocab_size', [
    ('char', None, None),
    ('byte', [256, 257, 258], 259),
    ('bpe', [397, 398, 399], 400),
    ('gpt2', [50256, 50257, 50258], 50259),
    ('cl100k_base', [100257, 100277, 100278], 100279),    # OpenAI's own go up to 100276
])
def test_special_tokens_get_the_last_ids(kind, ids, vocab_size):
    tok = tokenizer(kind)
    if kind == 'char':
        n = len(set(TEXT + TYPED_SPECIAL_TOKENS))
        ids = [n, n + 1, n + 2]
        vocab_size = n + 3
    assert [tok.special_tokens[name] for name in ('eot', 'pad', 'sep')] == ids
    assert tok.vocab_size == vocab_size


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('names', [('a', 'a'), ('<a>',), ('',), (5,)])
def test_special_tokens_need_distinct_plain_names(kind, names):
    tokenizer(kind)    # skips what cannot be made here
    with pytest.raises(ValueError, match='distinct names'):
        make_tokenizer(kind, [PROSE], 420, special_tokens=names)


@pytest.mark.parametrize('kind', KINDS)
def test_vocabulary_listing_has_a_line_per_id(kind):
    tok = tokenizer(kind)
    lines = tok.vocabulary_listing().splitlines()
    pad = tok.special_tokens['pad']
    letter = tok.encode('s')[0]
    assert len(lines) == tok.vocab_size
    assert lines[pad].split() == [str(pad), '<pad>']
    assert lines[letter].split() == [str(letter), "'s'"]


# -----------------------------------------------------------------------------
# Characters and bytes

def test_char_ids_are_in_the_order_of_code_points():
    tok = CharTokenizer.train('hello')
    assert tok.chars == 'ehlo'
    assert tok.encode('hole') == [1, 3, 2, 0]


def test_unknown_characters_are_named():
    tok = make_tokenizer('char', ['abc'], special_tokens=('pad',))
    message = r"does not know 'é' \(U\+00E9\) '\\n' \(U\+000A\)"
    with pytest.raises(UnknownCharacters, match=message) as e:
        tok.encode('caé\né')
    assert e.value.characters == ['é', '\n']


def test_byte_ids_are_the_bytes_of_utf8():
    tok = ByteTokenizer()
    assert tok.special_tokens['eot'] == 256
    assert tok.decode([104, 256, 105]) == 'hi'
    assert max(tok.encode('<|endoftext|>')) < 256


def test_an_incomplete_character_is_decoded_as_ufffd():
    tok = ByteTokenizer()
    assert tok.decode([0xE6, 0x97]) == '\ufffd'
    decode_next = tok.stream_decoder()
    assert [decode_next(i) for i in (0xE6, 0x97, 0xA5)] == ['', '', '日']
    assert decode_next(0xE6) + decode_next(None) == '\ufffd'


def test_an_encoded_prompt_is_never_empty():
    assert ByteTokenizer().encode_prompt('') == [10]
    documents = ByteTokenizer()
    documents.has_documents = True
    assert documents.encode_prompt('') == [256] and documents.encode_prompt('a') == [97]
    assert tokenizer_from_dict(documents.to_dict()).encode_prompt('') == [256]
    assert tokenizer_from_dict(ByteTokenizer().to_dict()).encode_prompt('') == [10]
    assert CharTokenizer.train('ab\n').encode_prompt('') == [0]
    assert CharTokenizer.train('ba').encode_prompt('') == [0]
    assert CharTokenizer.train('ab\n').encode_prompt('b') == [2]
    assert len(tokenizer('bpe').encode_prompt('')) == 1
    assert len(tokenizer('sentencepiece').encode_prompt('')) == 1
    with pytest.raises(UnknownCharacters):
        CharTokenizer.train('ab').encode_prompt('c')


def test_dicts_of_older_versions_can_be_read():
    assert tokenizer_from_dict({'kind': 'byte'}).special_tokens == {'eot': 256}
    assert tokenizer_from_dict({'kind': 'char', 'chars': 'ab'}).special_tokens == {}


def test_dicts_are_those_of_older_versions():
    """A resumed run compares the dict in its checkpoint with the one of the dataset."""
    assert make_tokenizer('byte').to_dict() == {'kind': 'byte'}
    assert make_tokenizer('char', ['ba']).to_dict() == {'kind': 'char', 'chars': 'ab'}


# -----------------------------------------------------------------------------
# What users can't be kept from typing

LIBRARIES = [
    ('bpe', 1_000_001),
    ('sentencepiece', 100_000),
    ('sentencepiece_unigram', 100_000),
    ('cl100k_base', 1_000_001),
]


@pytest.mark.parametrize('kind, n', LIBRARIES)
def test_very_long_runs_of_a_character_are_encoded(kind, n):
    tok = tokenizer(kind)
    for text in ('a' * (n // 4), ' ' * n + 'a', ' \n' * (n // 4) + 'x'):
        assert tok.decode(tok.encode_to_numpy(text)) == text


@pytest.mark.parametrize('kind', [kind for kind, _ in LIBRARIES])
def test_lone_surrogates_become_ufffd_and_pairs_their_character(kind):
    tok = tokenizer(kind)
    assert tok.decode(tok.encode('a\ud800b\ud83d\ude42')) == 'a\ufffdb🙂'
    assert tok.decode(tok.encode_batch(['\udfff' * 3000])[0]) == '\ufffd' * 3000


def test_a_long_run_changes_the_ids_of_nothing_but_itself():
    tok = tokenizer('bpe')
    text = ' ' * 1_000_001 + 'a'
    plain = tok.encode(PROSE * 20)
    both = tok.encode(PROSE * 20 + text + PROSE * 20)
    assert both[:len(plain) - 5] == plain[:-5]
    assert both[5 - len(plain):] == plain[5:]


# -----------------------------------------------------------------------------
# Our BPE, beside algorithms that share no code with it

def plain_words(text):
    """GPT-2's words as Hugging Face's library cuts and spells them: lists of characters."""
    splitter = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [list(word) for word, _ in splitter.pre_tokenize_str(text)]


def merge(word, left, right):
    """The word, a list of symbols, with left and right joined wherever they meet."""
    merged = []
    for symbol in word:
        if merged and merged[-1] == left and symbol == right:
            merged[-1] = left + right + '\0'    # marked: not joined again in this pass
        else:
            merged.append(symbol)
    return [symbol.rstrip('\0') for symbol in merged]


def byte_level_alphabet():
    """The printable character for each byte, found from how Hugging Face's library spells text."""
    names = {}
    code_points = [*range(0x800), 0x1000, *range(0x2000, 0x10000, 0x1000),
                   *range(0x10000, 0x110000, 0x4000)]
    for character in map(chr, code_points):
        if not 0xD800 <= ord(character) < 0xE000:
            spelled = ''.join(map(''.join, plain_words(character)))
            names.update(zip(character.encode('utf-8'), spelled, strict=True))

    # Bytes that never occur in UTF-8 get the remaining characters in order
    unused = iter(sorted(set(hf.pre_tokenizers.ByteLevel.alphabet()) - set(names.values())))
    return [names.get(byte) or next(unused) for byte in range(256)]


def test_bpe_encodes_as_merges_applied_in_order_do():
    tok = tokenizer('bpe')
    merges = [m.split(' ') for m in tok.to_dict()['merges']]
    assert len(merges) == 400 - 256 - 3
    ids = {character: i for i, character in enumerate(byte_level_alphabet())}
    for number, (left, right) in enumerate(merges):
        ids[left + right] = 256 + number

    for text in random_texts(200, seed=1) + [PROSE[-1500:], PROSE[:500]]:
        expected = []
        for word in plain_words(text):
            for left, right in merges:
                word = merge(word, left, right)
            expected += [ids[symbol] for symbol in word]
        assert tok.encode(text) == expected


@pytest.mark.parametrize('kind', ['bpe', 'gpt2'])
def test_plain_encoding_gives_the_same_ids_as_tiktoken(kind):
    tok = tokenizer(kind)
    text = PROSE + ' ' * 50 + ''.join(random_texts(50, seed=3))
    expected = []
    for word in regex.findall(GPT2_SPLIT, text):
        expected += encode_word_plain(word.encode('utf-8'), tok.ranks)
    assert tok.encode(text) == expected


def test_bpe_learns_what_the_plain_algorithm_learns():
    """Written again, on Hugging Face's words: count all pairs, merge the most frequent, repeat."""
    text = PROSE[-6000:] + 'aaaa aaaaa aaa' * 3
    ids = {character: i for i, character in enumerate(byte_level_alphabet())}
    words = plain_words(text)
    merges = []
    while len(merges) < 120:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs or max(pairs.values()) < 2:
            break
        left, right = min(pairs, key=lambda p: (-pairs[p], ids[p[0]], ids[p[1]]))
        ids[left + right] = len(ids)
        merges.append(f'{left} {right}')
        words = [merge(word, left, right) for word in words]
    assert BpeTokenizer.train([text], 257 + 120).to_dict()['merges'] == merges


@pytest.mark.parametrize('alphabet', [b'ab', b'abcd', bytes(range(256))])
def test_fast_training_learns_the_merges_of_plain_training(alphabet):
    """Few letters make many ties, overlapping pairs, and runs of one letter."""
    rng = random.Random(len(alphabet))
    for _ in range(30):
        words = {}
        for _ in range(rng.randint(0, 40)):
            word = bytes(rng.choices(alphabet, k=rng.randint(0, 12)))
            words[word] = rng.randint(1, 5)
        assert learn_merges(words, 60) == learn_merges_plain(words, 60)


def test_fast_training_learns_the_merges_of_plain_training_from_prose():
    words = count_words([PROSE])
    assert learn_merges(words, 150) == learn_merges_plain(words, 150)


def test_bpe_learns_the_same_from_any_order_and_any_hash_seed():
    lines = PROSE.splitlines(keepends=True)
    first = make_tokenizer('bpe', lines, 700).to_dict()
    random.Random(0).shuffle(lines)
    assert make_tokenizer('bpe', (line for line in lines), 700).to_dict() == first
    command = (
        'import sys, json\n'
        'from pocket.tokenizer import make_tokenizer\n'
        'print(json.dumps(make_tokenizer("bpe", json.load(sys.stdin), 700).to_dict()))\n'
    )
    for seed in '12':
        out = subprocess.run(
            [sys.executable, '-c', command],
            cwd=CHECKOUT,
            env={**os.environ, 'PYTHONHASHSEED': seed},
            input=json.dumps(lines).encode(),
            capture_output=True,
            check=True,
        ).stdout
        assert json.loads(out) == first


def test_bpe_learns_from_very_long_words(capsys):
    tok = make_tokenizer('bpe', ['a' * 5000, 'ab' * 3000, '日' * 2000], 280)
    tokens = [tok.decode([i]) for i in range(256, 279)]
    assert 'a' * 16 in tokens
    assert tok.decode(tok.encode('ab日' * 99)) == 'ab日' * 99
    assert not capsys.readouterr().out


# -----------------------------------------------------------------------------
# Vocabularies that cannot be made as asked

@pytest.mark.parametrize('kind, texts, size, message', [
    ('bpe', ['abab'], 300, 'too large for this text: made 258'),
    ('bpe', [], 300, 'made 257'),
    ('sentencepiece', ['abab'], 300, 'too large for this text: made '),
    ('sentencepiece_unigram', ['ab ab'], 999, 'made '),
])
def test_a_vocabulary_that_is_too_large_becomes_the_largest_possible(
        kind, texts, size, message, capfd):
    tok = make_tokenizer(kind, texts, size, special_tokens=('eot',))
    out, err = capfd.readouterr()
    assert message in out
    assert f'{tok.vocab_size:,}' in out
    assert tok.vocab_size < size
    assert not err
    assert tok.decode(tok.encode(TEXT)) == TEXT


ALL_NAMES = ("no tokenizer 'nope'.*char, byte, bpe, sentencepiece, sentencepiece_unigram"
             ".*gpt2.*cl100k_base")


@pytest.mark.parametrize('kind, texts, size, message', [
    ('bpe', ['ab'], 256, 'vocabulary of 256 is too small.* 257'),
    ('sentencepiece', [PROSE], 100, 'vocabulary of 100 from this: it needs at least [23]'),
    ('sentencepiece', [], 400, 'there is no text'),
    ('sentencepiece_unigram', ['\n'], 400, 'there is no text'),
    ('nope', None, None, ALL_NAMES),
])
def test_what_cannot_be_made_is_refused_in_one_sentence(kind, texts, size, message):
    with pytest.raises(ValueError, match=message) as e:
        make_tokenizer(kind, texts, size)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('make', [
    lambda: make_tokenizer('p50k_base'),
    lambda: tokenizer_from_dict({'kind': 'tiktoken', 'name': 'p50k_base', 'specials': []}),
])
def test_tiktoken_without_network_or_cache_is_one_sentence(make):
    with pytest.raises(ValueError, match='p50k_base.*TIKTOKEN_CACHE_DIR') as e:
        make()
    assert '\n' not in str(e.value)


# -----------------------------------------------------------------------------
# Other people's tokenizers

@pytest.mark.parametrize('kind', ['bpe', 'bpe split as in cl100k_base', 'gpt2'])
def test_hugging_face_reads_our_tokenizer_json(kind):
    tok = tokenizer(kind.split()[0])
    if kind == 'bpe split as in cl100k_base':    # its regular expression is what is hard to export
        split = tokenizer('cl100k_base').split
        tok = BpeTokenizer(tok.merges, tok.special_tokens)
        tok.split = split
        tok.encoding = tiktoken.Encoding('', pat_str=split, mergeable_ranks=tok.ranks,
                                         special_tokens={})
    theirs = hf.Tokenizer.from_str(tok.tokenizer_json())
    more = [PROSE, TEXT, "don't\n\n12345 \n x  ", 'a\n', 'a \n  ']
    for text in random_texts(300, seed=2) + more:
        ids = tok.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    for name, text in (('eot', '<|endoftext|>'), ('pad', '<|pad|>')):
        assert theirs.token_to_id(text) == tok.special_tokens[name]
        assert theirs.encode(text).ids == [tok.special_tokens[name]]


@NEEDS_SHARED
def test_our_bpe_compresses_as_well_as_hugging_faces():
    text = (SHARED / 'tinyshakespeare.txt').read_text(encoding='utf-8')[:300_000]
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=['<|endoftext|>'],
        show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    theirs.train_from_iterator([text], trainer)

    tok = make_tokenizer('bpe', [text], 2048)
    our_tokens = len(tok.encode(text))
    their_tokens = len(theirs.encode(text).ids)
    assert tok.vocab_size == 2048
    assert our_tokens <= 1.005 * their_tokens


@NEEDS_SHARED
def test_gpt2_and_cl100k_base_are_openais():
    text = (SHARED / 'the-verdict.txt').read_bytes().decode('utf-8')
    gpt2 = tokenizer('gpt2')
    assert len(gpt2.encode(text)) == 5145
    assert len(tokenizer('cl100k_base').encode(text)) == 4943
    assert gpt2.encode('hello world') == [31373, 995]
    assert gpt2.special_tokens['eot'] == 50256


@NEEDS_SHARED
def test_merges_of_gpt2_are_those_in_its_own_file():
    merges = tokenizer('gpt2').merges
    assert merges[:2] == ['Ġ t', 'Ġ a']
    assert len(merges) == 50_000


# -----------------------------------------------------------------------------
# Dicts from files: tokenizer_from_dict() must refuse those that describe no tokenizer

BPE = {'kind': 'bpe', 'split': 'gpt2'}
WRONG_MERGES = [['a'], [5], [None], [['a', 'b']], ['a bc', 'b c'], ['a b', 'a b'], ['a  b'],
                ['a b c'], ['a ☃'], 'ab', None]
WRONG_DICTS = [
    {}, [], None, 'char',
    {'kind': 'word'}, {'kind': None}, {'kind': []},
    {'kind': 'char'},
    *({'kind': 'char', 'chars': chars} for chars in ('ba', 'aa', 5, '')),
    *({'kind': 'byte', 'specials': names} for names in (5, [5], [[]], ['a', 'a'], 'eot')),
    {'kind': 'bpe'}, BPE, {**BPE, 'split': 'x', 'merges': []},
    *({**BPE, 'merges': merges} for merges in WRONG_MERGES),
    {'kind': 'tiktoken'},
    *({'kind': 'tiktoken', 'name': name} for name in ('gpt9', 5, [])),
    {'kind': 'sentencepiece'},
    *({'kind': 'sentencepiece', 'model': model} for model in (5, '', 'é', 'AAAA', '!!')),
]


def assert_refused(d):
    with pytest.raises(ValueError) as e:
        tokenizer_from_dict(d)
    assert str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('d', WRONG_DICTS, ids=str)
def test_a_dict_that_describes_no_tokenizer_is_refused(d):
    assert_refused(d)


def test_half_a_sentencepiece_model_is_refused():
    model = tokenizer('sentencepiece').model
    assert_refused({'kind': 'sentencepiece', 'model': model[:len(model) // 8 * 4]})
