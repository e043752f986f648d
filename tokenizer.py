"""
Tokenizers: text to ids and back, behind one interface. A tokenizer travels as a JSON-able dict in meta.json and in every
checkpoint, so a model can't lose it.

    char                      one id a character that occurs in the training text; nanoGPT's
    byte                      one id a byte of UTF-8
    bpe                       byte-level byte-pair encoding, trained here
    sentencepiece             BPE by Google's library, trained here; sentencepiece_unigram: its unigram model
    gpt2, cl100k_base, …      OpenAI's, by their names in tiktoken

    >>> tok = make('char', ['hello'])
    >>> tok.encode('hole')
    [1, 3, 2, 0]
    >>> from_dict(tok.to_dict()).decode([1, 3, 2, 0])
    'hole'
"""
import codecs
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from configurator import UserError

# How GPT-2 cuts text before merging: a word with the space before it, a number, a run of signs; spaces before a word stay apart
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
TRAINED = ('char', 'byte', 'bpe', 'sentencepiece', 'sentencepiece_unigram')

# GPT-2's way to write any bytes as printable characters: space is Ġ, line break Ċ, most of Latin-1 is itself
_plain = [b for b in range(256) if chr(b).isprintable() and b != 32]
PRINTABLE = dict(zip(_plain + sorted(set(range(256)) - set(_plain)), map(chr, [*_plain, *range(256, 512)])))


def printable(token):
    """bytes to str: b' the' to 'Ġthe'."""
    return token.decode('latin-1').translate(PRINTABLE)


def mend(text):
    """text with its lone surrogates, which have no UTF-8, as U+FFFD; surrogate pairs become the character they stand for."""
    return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


def blocks(texts, size):
    """Each of texts in pieces of at most size characters, so that nothing long is ever held twice."""
    for text in texts:
        for i in range(0, len(text), size):
            yield text[i:i + size]


class UnknownCharacters(ValueError):
    """Text has characters that the tokenizer does not know: .characters, in order of appearance."""

    def __init__(self, characters):
        self.characters = characters
        shown = ' '.join(f'{c!r} (U+{ord(c):04X})' for c in characters[:5]) + (' …' if len(characters) > 5 else '')
        super().__init__(f'the tokenizer does not know {shown}')


class Tokenizer:
    """What every tokenizer has; subclasses set `kind`, and give encode_to_numpy() and to_dict().

    specials: {name: id}, names without brackets: eot, pad, bos, … Text never encodes to a special id.
    """
    kind = ''

    def __init__(self, tokens, specials=()):
        """tokens: list of the bytes behind each ordinary id; specials: names that get the ids after those."""
        if not all(isinstance(n, str) and re.fullmatch(r'[\w-]+', n) for n in specials) or len(set(specials)) < len(specials):
            raise UserError(f'special tokens need different names of letters, digits, _ and -, got {list(specials)}')
        self.specials = {name: len(tokens) + i for i, name in enumerate(specials)}
        self.tokens = tokens + [b''] * len(specials)
        self.vocab_size = len(self.tokens)

    def encode(self, text):
        """str to list of ids."""
        return self.encode_to_numpy(text).tolist()

    def encode_batch(self, texts):
        """Iterable of str to list of uint32 arrays."""
        return [self.encode_to_numpy(text) for text in texts]

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

    def token_bytes(self, i):
        """The bytes behind an id: none behind a special one."""
        return self.tokens[i]

    def decode(self, ids):
        """ids to str; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return b''.join(map(self.token_bytes, ids)).decode('utf-8', errors='replace')

    def stream_decoder(self):
        """A function: the next id in, the text that is now complete out; None ends it. Never splits a multi-byte character."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda i: decoder.decode(b'', final=True) if i is None else decoder.decode(self.token_bytes(i))

    def byte_lengths(self):
        """(vocab_size,) int64: bytes of UTF-8 behind each id, for bits per byte."""
        return np.array([len(token) for token in self.tokens], dtype=np.int64)

    def listing(self):
        """The vocabulary to read: a line an id, with its token quoted as in Python, or its name where it is special."""
        names, lines = {i: f'<{name}>' for name, i in self.specials.items()}, []
        for i, token in enumerate(self.tokens):
            try:
                shown = names.get(i) or repr(token.decode('utf-8'))
            except UnicodeDecodeError:
                shown = repr(token)  # a part of a character
            lines.append(f'{i:6}  {shown}\n')
        return ''.join(lines)


class CharTokenizer(Tokenizer):
    """One id a character, in the order of their code points; nanoGPT's."""
    kind = 'char'

    def __init__(self, chars, specials=()):
        super().__init__([c.encode('utf-8', 'surrogatepass') for c in chars], specials)
        self.chars = chars
        self.points = np.array([ord(c) for c in chars], dtype=np.uint32)  # sorted

    @classmethod
    def train(cls, text, specials=()):
        """The characters that occur in text: a str or any iterable of characters."""
        return cls(''.join(sorted(set(text))), specials)

    def encode_to_numpy(self, text):
        """str to uint32 array; raises UnknownCharacters."""
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = np.searchsorted(self.points, points).clip(max=len(self.points) - 1)
        unknown = self.points[ids] != points
        if unknown.any():
            raise UnknownCharacters(list(dict.fromkeys(map(chr, points[unknown]))))
        return ids.astype(np.uint32)

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars} | ({'specials': list(self.specials)} if self.specials else {})


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8, then the special tokens: knows every character there is."""
    kind = 'byte'

    def __init__(self, specials=('eot',)):
        super().__init__([bytes([b]) for b in range(256)], specials)

    def encode_to_numpy(self, text):
        """str to uint32 array."""
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), dtype=np.uint8).astype(np.uint32)

    def to_dict(self):
        return {'kind': 'byte'} | ({'specials': list(self.specials)} if list(self.specials) != ['eot'] else {})


class TiktokenTokenizer(Tokenizer):
    """One of OpenAI's encodings, by its name in tiktoken; special tokens of our own come after all of its ids."""
    kind = 'tiktoken'

    def __init__(self, name, specials=()):
        import tiktoken
        if name not in tiktoken.list_encoding_names():
            raise UserError(f'there is no tokenizer {name!r}: there are {", ".join(TRAINED)} and, from tiktoken, '
                            f'{", ".join(tiktoken.list_encoding_names())}')
        try:
            self.encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as e:  # what requests raises is an OSError too
            raise UserError(f'cannot download the files of the encoding {name} ({type(e).__name__}): without a network, set the '
                            f'environment variable TIKTOKEN_CACHE_DIR to a folder that has them') from None
        self.name, self.ranks = name, self.encoding._mergeable_ranks
        theirs = {text.strip('<|>').replace('endoftext', 'eot'): i for text, i in self.encoding._special_tokens.items()}
        tokens = [b''] * self.encoding.n_vocab  # some numbers mean nothing
        for token, i in self.ranks.items():
            tokens[i] = token
        self.added = [s for s in specials if s not in theirs]
        super().__init__(tokens, self.added)
        self.specials = theirs | self.specials

    def encode_to_numpy(self, text):
        """str to uint32 array. Lone surrogates are encoded as U+FFFD."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())  # a typed <|endoftext|> is text like any other
        except UnicodeEncodeError:
            return self.encode_to_numpy(mend(text))
        except ValueError:  # a run of spaces too long for its regular expressions (a million is): cut, until each part will do
            half = len(text) // 2
            return np.concatenate([self.encode_to_numpy(text[:half]), self.encode_to_numpy(text[half:])])

    def encode_batch(self, texts):
        """Iterable of str to list of uint32 arrays, on all cores where the texts are long enough to be worth it."""
        texts = list(texts)
        if sum(map(len, texts)) < 2000 * len(texts):
            return super().encode_batch(texts)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode_to_numpy, texts))

    def to_dict(self):
        return {'kind': 'tiktoken', 'name': self.name, 'specials': self.added}


def make(name, texts=None, vocab_size=None, specials=()):
    """A new tokenizer: char, byte, bpe, sentencepiece, sentencepiece_unigram or the name of one of tiktoken's encodings.

    texts: iterable of str to learn from, where it learns. vocab_size: of bpe and sentencepiece, specials included.
    specials: names of special tokens; () is what the kind always has: eot for byte, bpe and tiktoken. Raises UserError.
    """
    if name == 'char':
        return CharTokenizer.train((c for text in texts for c in set(text)), specials)
    if name == 'byte':
        return ByteTokenizer(specials or ('eot',))
    return TiktokenTokenizer(name, specials)


def from_dict(d):
    """The tokenizer that to_dict() described. Raises ValueError where it describes none."""
    try:
        kind, specials = d['kind'], d.get('specials', ('eot',) if d['kind'] == 'byte' else ())
        if not isinstance(specials, (list, tuple)):
            raise TypeError
        if kind == 'char':
            chars = d['chars']
            if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
                raise ValueError('the characters of a char tokenizer must be sorted, and each there once')
            return CharTokenizer(chars, specials)
        if kind == 'byte':
            return ByteTokenizer(specials)
        if kind == 'tiktoken':
            return TiktokenTokenizer(d['name'], specials)
    except (KeyError, TypeError, AttributeError):
        raise ValueError('not the description of a tokenizer') from None
    raise ValueError(f'unknown kind of tokenizer {kind!r}: this version knows char, byte, bpe, tiktoken and sentencepiece')
