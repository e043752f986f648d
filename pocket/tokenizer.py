"""
Tokenizers: text to ids and back, behind one interface. A tokenizer travels as a JSON-able dict in meta.json and in every
checkpoint, so a model can't lose it.

    char                      one id a character that occurs in the training text; nanoGPT's
    byte                      one id a byte of UTF-8
    bpe                       byte-level byte-pair encoding, trained here
    sentencepiece             BPE by Google's library, trained here; sentencepiece_unigram: its unigram model
    gpt2, cl100k_base, …      OpenAI's, by their names in tiktoken

    >>> tok = make_tokenizer('char', ['hello'])
    >>> tok.encode('hole')
    [1, 3, 2, 0]
    >>> tokenizer_from_dict(tok.to_dict()).decode([1, 3, 2, 0])
    'hole'
"""
import base64
import codecs
import functools
import heapq
import io
import json
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from pocket.errors import UserError

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

    special_tokens: {name: id}, names without brackets: eot, pad, bos, … Text never encodes to a special id.
    """
    kind = ''

    def __init__(self, tokens, special_tokens=()):
        """tokens: list of the bytes behind each ordinary id; special_tokens: names that get the ids after those."""
        if not all(isinstance(n, str) and re.fullmatch(r'[\w-]+', n) for n in special_tokens) or len(set(special_tokens)) < len(special_tokens):
            raise UserError(f'special tokens need different names of letters, digits, _ and -, got {list(special_tokens)}')
        self.special_tokens = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        self.tokens = tokens + [b''] * len(special_tokens)
        self.vocab_size = len(self.tokens)

    def encode(self, text):
        """str to list of ids."""
        return self.encode_to_numpy(text).tolist()

    def encode_batch(self, texts):
        """Iterable of str to list of uint32 arrays."""
        return [self.encode_to_numpy(text) for text in texts]

    @property
    def eos_id(self):
        """The id that ends a document or a reply, or None."""
        return self.special_tokens.get('eos', self.special_tokens.get('eot'))

    @property
    def decoder_start_id(self):
        """The id between a source and its target, which a decoder starts from, or None."""
        return self.special_tokens.get('sep', self.special_tokens.get('bos', self.eos_id))

    def encode_prompt(self, text):
        """Ids to start writing from, never none: those of text or, where it is empty, of a line break if there is one."""
        try:
            return self.encode(text or '\n') or [0]
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

    def vocabulary_listing(self):
        """The vocabulary to read: a line an id, the token as Python would quote it, or its name where it is special."""
        shown = [repr(token.decode('utf-8', 'backslashreplace')) for token in self.tokens]
        for name, i in self.special_tokens.items():
            shown[i] = f'<{name}>'
        return ''.join(f'{i:6}  {token}\n' for i, token in enumerate(shown))


class CharTokenizer(Tokenizer):
    """One id a character, in the order of their code points; nanoGPT's."""
    kind = 'char'

    def __init__(self, chars, special_tokens=()):
        super().__init__([c.encode('utf-8', 'surrogatepass') for c in chars], special_tokens)
        self.chars = chars
        self.points = np.array([ord(c) for c in chars], dtype=np.uint32)  # sorted

    @classmethod
    def train(cls, text, special_tokens=()):
        """The characters that occur in text: a str or any iterable of characters."""
        return cls(''.join(sorted(set(text))), special_tokens)

    def encode_to_numpy(self, text):
        """str to uint32 array; raises UnknownCharacters."""
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = np.searchsorted(self.points, points).clip(max=len(self.points) - 1)
        unknown = self.points[ids] != points
        if unknown.any():
            raise UnknownCharacters(list(dict.fromkeys(map(chr, points[unknown]))))
        return ids.astype(np.uint32)

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars} | ({'specials': list(self.special_tokens)} if self.special_tokens else {})


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8, then the special tokens: knows every character there is."""
    kind = 'byte'

    def __init__(self, special_tokens=('eot',)):
        super().__init__([bytes([b]) for b in range(256)], special_tokens)

    def encode_to_numpy(self, text):
        """str to uint32 array."""
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), dtype=np.uint8).astype(np.uint32)

    def to_dict(self):
        return {'kind': 'byte'} | ({'specials': list(self.special_tokens)} if list(self.special_tokens) != ['eot'] else {})


class TiktokenTokenizer(Tokenizer):
    """One of OpenAI's encodings, by its name in tiktoken; special tokens of our own come after all of its ids."""
    kind = 'tiktoken'

    def __init__(self, name, special_tokens=()):
        import tiktoken
        if name not in tiktoken.list_encoding_names():
            raise UserError(f'there is no tokenizer {name!r}: there are {", ".join(TRAINED)} and, from tiktoken, '
                            f'{", ".join(tiktoken.list_encoding_names())}')
        try:
            self.encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as e:  # what requests raises is an OSError too
            raise UserError(f'cannot download the files of the encoding {name} ({type(e).__name__}): without a network, set the '
                            f'environment variable TIKTOKEN_CACHE_DIR to a folder that has them') from None
        self.name, self.ranks, self.split = name, self.encoding._mergeable_ranks, self.encoding._pat_str
        theirs = {text.strip('<|>').replace('endoftext', 'eot'): i for text, i in self.encoding._special_tokens.items()}
        tokens = [b''] * self.encoding.n_vocab  # some numbers mean nothing
        for token, i in self.ranks.items():
            tokens[i] = token
        self.added = [s for s in special_tokens if s not in theirs]
        super().__init__(tokens, self.added)
        self.special_tokens = theirs | self.special_tokens

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

    @functools.cached_property
    def merges(self):
        """The merges behind the tokens, in order, such as 'Ġt he': the last two parts that earlier ones make of each token."""
        found = []
        for token in sorted(self.ranks, key=self.ranks.get):
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                i = min(range(len(parts) - 1), key=lambda i: self.ranks.get(parts[i] + parts[i + 1], self.vocab_size))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            found += [' '.join(map(printable, parts))] if len(parts) == 2 else []
        return found

    def tokenizer_json(self):
        """What Hugging Face's tokenizer.json should say, as str. Their libraries take a typed <|endoftext|> for the token."""
        special_tokens = {'<|endoftext|>' if name == 'eot' else f'<|{name}|>': i for name, i in self.special_tokens.items()}
        split = re.sub(r'(\d})\+', r'\1', self.split)  # to their library {1,3}+ is a repetition of repetitions
        level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
        flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
        return json.dumps({
            'version': '1.0', 'added_tokens': [{'id': i, 'content': text, **flags} for text, i in special_tokens.items()],
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
                {'type': 'Split', 'pattern': {'Regex': split}, 'behavior': 'Isolated', 'invert': False}, level]},
            'decoder': level,
            'model': {'type': 'BPE', 'vocab': {printable(token): i for token, i in self.ranks.items()} | special_tokens,
                      'merges': self.merges}}, ensure_ascii=False, indent=1)


class BpeTokenizer(TiktokenTokenizer):
    """Our own byte-level BPE: 256 bytes, a token a merge, then the special tokens. tiktoken's library does the encoding.

    merges: list of str, the two tokens to join, printable: 'h e', 'Ġt he'. One is easy to read and a line of JSON, as in
    GPT-2's own file, and ids follow from their order. Raises ValueError where one joins what is not there, or gives nothing new.
    """
    kind, split = 'bpe', GPT2_SPLIT

    def __init__(self, merges, special_tokens=('eot',)):
        import tiktoken
        names = {PRINTABLE[b]: bytes([b]) for b in range(256)}
        for n, merge in enumerate(merges):
            left, _, right = merge.partition(' ')
            if left not in names or right not in names or left + right in names:
                raise ValueError(f'merge {n} of the bpe tokenizer, {merge!r}, does not join two earlier tokens to a new one')
            names[left + right] = names[left] + names[right]
        self.merges, self.ranks = merges, {token: i for i, token in enumerate(names.values())}
        self.encoding = tiktoken.Encoding('bpe', pat_str=self.split, mergeable_ranks=self.ranks, special_tokens={})
        Tokenizer.__init__(self, list(self.ranks), special_tokens)

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=('eot',)):
        """Learn merges from an iterable of str, which is read once and not kept. Raises UserError.

        Of pairs that are equally frequent, the one with the smaller ids is joined first, whatever the order of the texts.
        """
        import regex
        from tqdm import tqdm
        most = vocab_size - 256 - len(special_tokens)
        if most < 0:
            raise UserError(f'a bpe vocabulary of {vocab_size:,} is too small: bytes and special tokens are {vocab_size - most}')
        find, seen = regex.compile(cls.split).findall, Counter()
        for block in tqdm(blocks(texts, 2**20), desc='counting words', unit=' blocks', disable=None):
            seen.update(find(block))
        # A word is a str with a character an id, so that str.replace() is the merge. Endless words come in parts, as every merge
        # in a word goes through all of it. where: pair to the words that have it, or had it
        words, times, pairs, where = [], [], defaultdict(int), defaultdict(list)
        for word, n in seen.items():
            for part in blocks([word.encode('utf-8', 'replace').decode('latin-1')], 256):
                for a, b in zip(part, part[1:]):
                    pairs[a + b] += n
                    where[a + b].append(len(words))
                words.append(part)
                times.append(n)
        names, merges, bar = [PRINTABLE[b] for b in range(256)], [], tqdm(total=most, desc='merges', disable=None)
        heap = [(-n, pair) for pair, n in pairs.items()]  # the most frequent first; a count that fell meanwhile is put back
        heapq.heapify(heap)
        while len(merges) < most and heap and heap[0][0] < -1:  # what occurs once is nothing to learn
            n, pair = heapq.heappop(heap)
            if -n != pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
                continue
            merges.append(' '.join(names[ord(c)] for c in pair))
            new, born = chr(len(names)), set()
            names.append(merges[-1].replace(' ', ''))
            for i in {i for i in where.pop(pair) if pair in words[i]}:
                old, n = words[i], times[i]
                words[i] = word = old.replace(pair, new)
                for a, b in zip(old, old[1:]):
                    pairs[a + b] -= n
                for a, b in zip(word, word[1:]):
                    pairs[a + b] += n
                    if a == new or b == new:
                        where[a + b].append(i)
                        born.add(a + b)
            for pair in born:
                heapq.heappush(heap, (-pairs[pair], pair))
            bar.update()
        bar.close()
        if len(merges) < most:
            print(f'a bpe vocabulary of {vocab_size:,} is too high for this text: made {len(names) + len(special_tokens):,}')
        return cls(merges, special_tokens)

    def to_dict(self):
        return {'kind': 'bpe', 'split': 'gpt2', 'merges': self.merges, 'specials': list(self.special_tokens)}


class SentencePieceTokenizer(Tokenizer):
    """A model of Google's sentencepiece, its bytes inside the dict. What is not in its vocabulary is spelled in bytes."""
    kind = 'sentencepiece'

    def __init__(self, model):
        """model: a .model file as base64; its control symbols are the special tokens. Raises ValueError."""
        import sentencepiece
        try:
            self.model, self.sp = model, sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model) or b'?')
        except (RuntimeError, ValueError):
            raise ValueError('the model of the sentencepiece tokenizer is damaged') from None
        pieces, special_tokens = [self.sp.id_to_piece(i) for i in range(self.sp.vocab_size())], {}
        for i, piece in enumerate(pieces):
            if self.sp.is_control(i) or self.sp.is_unknown(i):
                special_tokens[piece.strip('<>')] = i
            pieces[i] = bytes([int(piece[3:5], 16)]) if self.sp.is_byte(i) else piece.replace('▁', ' ').encode('utf-8')
        super().__init__([b'' if i in special_tokens.values() else piece for i, piece in enumerate(pieces)])
        self.special_tokens = special_tokens

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=(), algorithm='bpe'):
        """Learn from an iterable of str. algorithm: bpe or unigram. Raises UserError."""
        import sentencepiece
        Tokenizer([], special_tokens)  # are they names?
        lines = list(blocks((line for block in blocks(texts, 2**20) for line in mend(block).splitlines()), 1000))
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, model_type=algorithm, vocab_size=vocab_size, minloglevel=2,
                # whatever goes in comes out again: no normalising, no space put before, none taken away, bytes for the rest
                normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True,
                allow_whitespace_only_pieces=True, required_chars='▁', bos_id=-1, eos_id=-1,
                control_symbols=[f'<{name}>' for name in special_tokens])
            return cls(base64.b64encode(model.getvalue()).decode('ascii'))
        except RuntimeError as e:
            most, least = re.search(r'too high.* (\d+)', str(e)), re.search(r'smaller than.*vs (\d+)', str(e))
            if not most or int(most[1]) >= vocab_size:
                why = f'it needs at least {least[1]}' if least else str(e).split('] ')[-1] or 'there is no text'
                raise UserError(f'sentencepiece cannot make a vocabulary of {vocab_size:,} from this: {why}') from None
        print(f'a sentencepiece vocabulary of {vocab_size:,} is too high for this text: made {int(most[1]):,}')
        return cls.train(lines, int(most[1]), special_tokens, algorithm)

    def encode_to_numpy(self, text):
        """str to uint32 array. Lone surrogates are encoded as U+FFFD."""
        # Line by line: no piece goes on after a line break, and a long text at once would cost the library time and memory.
        # The library would take ▁ for a space, so we spell it
        low = [self.sp.piece_to_id(f'<0x{b:02X}>') for b in '▁'.encode()]
        parts = re.findall('▁|[^▁\n]+\n?|\n', mend(text))
        return np.fromiter(chain.from_iterable(low if part == '▁' else self.sp.encode(part) for part in parts), dtype=np.uint32)

    def to_dict(self):
        return {'kind': 'sentencepiece', 'model': self.model}


def make_tokenizer(name, texts=None, vocab_size=None, special_tokens=()):
    """A new tokenizer: char, byte, bpe, sentencepiece, sentencepiece_unigram or the name of one of tiktoken's encodings.

    texts: iterable of str to learn from, where it learns. vocab_size: of bpe and sentencepiece, special_tokens included.
    special_tokens: names of special tokens; () is what the kind always has: eot for byte, bpe and tiktoken. Raises UserError.
    """
    if name == 'char':
        return CharTokenizer.train((c for text in texts for c in set(text)), special_tokens)
    if name == 'byte':
        return ByteTokenizer(special_tokens or ('eot',))
    if name == 'bpe':
        return BpeTokenizer.train(texts, vocab_size, special_tokens or ('eot',))
    if name in ('sentencepiece', 'sentencepiece_unigram'):
        return SentencePieceTokenizer.train(texts, vocab_size, special_tokens, 'unigram' if name.endswith('unigram') else 'bpe')
    return TiktokenTokenizer(name, special_tokens)


def tokenizer_from_dict(d):
    """The tokenizer that to_dict() described. Raises ValueError where it describes none."""
    try:
        kind, special_tokens = d['kind'], d.get('specials', ('eot',) if d['kind'] == 'byte' else ())
        if not isinstance(special_tokens, (list, tuple)) or kind == 'bpe' and (d['split'] != 'gpt2' or type(d['merges']) is not list):
            raise TypeError
        if kind == 'char':
            chars = d['chars']
            if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
                raise ValueError('the characters of a char tokenizer must be sorted, and each there once')
            return CharTokenizer(chars, special_tokens)
        if kind == 'byte':
            return ByteTokenizer(special_tokens)
        if kind == 'tiktoken':
            return TiktokenTokenizer(d['name'], special_tokens)
        if kind == 'bpe':
            return BpeTokenizer(d['merges'], special_tokens)
        if kind == 'sentencepiece':
            return SentencePieceTokenizer(d['model'])
    except (KeyError, TypeError, AttributeError):
        raise ValueError('not the description of a tokenizer') from None
    raise ValueError(f'unknown kind of tokenizer {kind!r}: this version knows char, byte, bpe, tiktoken and sentencepiece')
