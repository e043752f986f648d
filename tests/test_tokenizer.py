"""Text to ids and back, for every kind of tokenizer; and descriptions of tokenizers that are wrong."""
import json
import random

import numpy as np
import pytest

from tokenizer import ByteTokenizer, CharTokenizer, UnknownCharacters, from_dict

TEXT = 'To be, or not to be\n\tübung 日本 🙂\r\n\x00'


@pytest.mark.parametrize('tok', [CharTokenizer.train(TEXT), ByteTokenizer()])
def test_round_trips(tok):
    again = from_dict(json.loads(json.dumps(tok.to_dict())))
    for text in ('', TEXT, TEXT * 50, '🙂'):
        ids = tok.encode(text)
        assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
        assert tok.decode(ids) == text and again.encode(text) == ids and again.vocab_size == tok.vocab_size
        decode = tok.stream_decoder()
        pieces = [decode(i) for i in ids] + [decode(None)]
        assert ''.join(pieces) == text and '\ufffd' not in ''.join(pieces)
        assert tok.byte_lengths()[np.array(ids, dtype=int)].sum() == len(text.encode('utf-8'))


def test_char_ids_are_in_the_order_of_code_points():
    tok = CharTokenizer.train('hello')
    assert tok.chars == 'ehlo' and tok.encode('hole') == [1, 3, 2, 0]


def test_unknown_characters_are_named():
    tok = CharTokenizer.train('abc')
    with pytest.raises(UnknownCharacters, match=r"does not know 'é' \(U\+00E9\) '\\n' \(U\+000A\)") as e:
        tok.encode('caé\né')
    assert e.value.characters == ['é', '\n']


def test_every_byte_and_random_unicode():
    tok, rng = ByteTokenizer(), random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    text = ''.join(map(chr, rng.choices(points, k=2000)))
    assert tok.decode(tok.encode(text)) == text
    assert tok.specials['eot'] == 256 and tok.decode([104, 256, 105]) == 'hi' and max(tok.encode('<|endoftext|>')) < 256
    assert tok.decode([0xE6, 0x97]) == '\ufffd'  # a character that was cut off
    decode = tok.stream_decoder()
    assert [decode(i) for i in (0xE6, 0x97, 0xA5)] == ['', '', '日'] and decode(0xE6) + decode(None) == '\ufffd'


def test_prompt_is_never_empty():
    assert ByteTokenizer().prompt('') == [10] and CharTokenizer.train('ab\n').prompt('') == [0] and CharTokenizer.train('ba').prompt('') == [0]
    assert CharTokenizer.train('ab\n').prompt('b') == [2]


@pytest.mark.parametrize('d', [{}, [], None, {'kind': 'char'}, {'kind': 'char', 'chars': 'ba'}, {'kind': 'char', 'chars': 'aa'}, {'kind': 'char', 'chars': 5},
                               {'kind': 'char', 'chars': ''}, {'kind': 'word'}, {'kind': None}])
def test_wrong_descriptions(d):
    with pytest.raises(ValueError):
        from_dict(d)
