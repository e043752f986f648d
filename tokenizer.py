"""
Tokenizers: text to ids and back, behind one interface. A tokenizer travels as a JSON-able dict in meta.json and in every
checkpoint, so a model can't lose it.

    >>> tok = CharTokenizer.train('hello')
    >>> tok.encode('hole')
    [1, 3, 2, 0]
    >>> from_dict(tok.to_dict()).decode([1, 3, 2, 0])
    'hole'
"""
import codecs

import numpy as np


class UnknownCharacters(ValueError):
    """Text has characters that the tokenizer does not know: .characters, in order of appearance."""

    def __init__(self, characters):
        self.characters = characters
        shown = ' '.join(f'{c!r} (U+{ord(c):04X})' for c in characters[:5]) + (' …' if len(characters) > 5 else '')
        super().__init__(f'the tokenizer does not know {shown}')


class Tokenizer:
    """What every tokenizer has. Subclasses set `kind`, `specials`, `vocab_size` and give token_bytes() and encode_to_numpy().

    specials: {name: id}, names without brackets: eot, pad, bos, … Text never encodes to a special id.
    """
    kind, specials, vocab_size = '', {}, 0

    def encode(self, text):
        """str to list of ids."""
        return self.encode_to_numpy(text).tolist()

    @property
    def end(self):
        """The id that ends a document or a reply, or None."""
        return self.specials.get('eos', self.specials.get('eot'))

    @property
    def start(self):
        """The id between a source and its target, which a decoder starts from, or None."""
        return self.specials.get('sep', self.specials.get('bos', self.end))

    def prompt(self, text):
        """Ids to start writing from, never none: those of text or, where it is empty, of a line break if there is one."""
        try:
            return self.encode(text or '\n')
        except UnknownCharacters:
            if text:
                raise
            return [0]

    def decode(self, ids):
        """ids to str; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return b''.join(map(self.token_bytes, ids)).decode('utf-8', errors='replace')

    def stream_decoder(self):
        """A function: the next id in, the text that is now complete out; None ends it. Never splits a multi-byte character."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda i: decoder.decode(b'', final=True) if i is None else decoder.decode(self.token_bytes(i))

    def byte_lengths(self):
        """(vocab_size,) int64: bytes of UTF-8 behind each id, for bits per byte."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], dtype=np.int64)


class CharTokenizer(Tokenizer):
    """One id a character, in the order of their code points; nanoGPT's."""
    kind = 'char'

    def __init__(self, chars):
        self.chars = chars
        self.vocab_size = len(chars)
        self.points = np.array([ord(c) for c in chars], dtype=np.uint32)  # sorted

    @classmethod
    def train(cls, text):
        """The characters that occur in text."""
        return cls(''.join(sorted(set(text))))

    def encode_to_numpy(self, text):
        """str to uint32 array; raises UnknownCharacters."""
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = np.searchsorted(self.points, points).clip(max=self.vocab_size - 1)
        unknown = self.points[ids] != points
        if unknown.any():
            raise UnknownCharacters(list(dict.fromkeys(map(chr, points[unknown]))))
        return ids.astype(np.uint32)

    def token_bytes(self, i):
        return self.chars[i].encode('utf-8', 'surrogatepass')

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars}


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8, and 256 for end of text: knows every character there is."""
    kind, specials, vocab_size = 'byte', {'eot': 256}, 257

    def encode_to_numpy(self, text):
        """str to uint32 array."""
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), dtype=np.uint8).astype(np.uint32)

    def token_bytes(self, i):
        return bytes([i]) if i < 256 else b''

    def to_dict(self):
        return {'kind': 'byte'}


def from_dict(d):
    """The tokenizer that to_dict() described. Raises ValueError where it describes none."""
    try:
        if d['kind'] == 'char':
            chars = d['chars']
            if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
                raise ValueError('the characters of a char tokenizer must be sorted, and each there once')
            return CharTokenizer(chars)
        if d['kind'] == 'byte':
            return ByteTokenizer()
    except (KeyError, TypeError):
        raise ValueError('not the description of a tokenizer') from None
    raise ValueError(f'unknown kind of tokenizer {d["kind"]!r}: this version knows char and byte')
