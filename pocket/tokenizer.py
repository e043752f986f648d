"""
Tokenizers: text to numbers and back.

A language model computes with numbers, so text is cut into tokens first, and each token has an id,
from 0 to vocab_size - 1. Tokenizers differ in what their tokens are:

    char                    a token per character that occurs in the training text, as in nanoGPT
    byte                    a token per byte of UTF-8
    bpe                     byte-pair encoding: frequent sequences of bytes, learned here
    sentencepiece           byte-pair encoding by Google's library
    sentencepiece_unigram   that library's unigram model
    gpt2, cl100k_base, …    OpenAI's, by their names in the tiktoken library

    >>> tok = make_tokenizer('char', ['hello'])
    >>> tok.encode('hole')
    [1, 3, 2, 0]
    >>> tok.decode([1, 3, 2, 0])
    'hole'

A tokenizer can be written as a dict, for JSON. The dict travels in a dataset's meta.json and in
every checkpoint, so a model never loses the tokenizer it was trained with:

    >>> tok.to_dict()
    {'kind': 'char', 'chars': 'ehlo'}
    >>> tokenizer_from_dict(tok.to_dict()).decode([1, 3, 2, 0])
    'hole'

The file goes from simple to involved: what all tokenizers share; characters and bytes; how
byte-pair encoding learns, first the plain algorithm, then a fast one; our BPE and OpenAI's;
sentencepiece.
"""
import base64
import codecs
import functools
import heapq
import io
import json
import math
import re
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from pocket.errors import UserError, short_repr

# The names that make_tokenizer() takes, besides those of tiktoken's encodings
TOKENIZER_NAMES = ('char', 'byte', 'bpe', 'sentencepiece', 'sentencepiece_unigram')

# What special tokens are for. Each role goes to the first of these names that a tokenizer has: see
# Tokenizer.special_token_id().
SPECIAL_TOKEN_ROLES = {
    'eos': ('eos', 'eot'),                            # ends a document or a reply
    'decoder_start': ('sep', 'bos', 'eos', 'eot'),    # stands between a source and its target
    'pad': ('pad',),                                  # fills up short rows; only other tools use it
}


# -----------------------------------------------------------------------------
# Helpers for text

def chunks(texts, size):
    """Cut each text into chunks of at most size characters, so that nothing long is copied whole.

    >>> list(chunks(['abcde', 'xy'], 2))
    ['ab', 'cd', 'e', 'xy']
    """
    for text in texts:
        for start in range(0, len(text), size):
            yield text[start:start + size]


def replace_lone_surrogates(text):
    """Replace code points that UTF-8 cannot encode with U+FFFD.

    A str from a JSON file can hold surrogates: halves of the pairs that UTF-16 encodes rarer
    characters with. Two halves that belong together become the character they stand for.

    >>> replace_lone_surrogates('a\\ud83d b\\ud83d\\ude42') == 'a\\ufffd b🙂'
    True
    """
    return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


def bytes_to_unicode():
    """GPT-2's table {byte: character}, with which any bytes can be written as visible text.

    Most of Latin-1 stands for itself. Bytes that would be invisible (spaces, line breaks, control
    characters) get the characters from U+0100 on: a space is Ġ, a line break is Ċ.
    """
    table = {}
    next_free = 256
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != ' ':
            table[byte] = chr(byte)
        else:
            table[byte] = chr(next_free)
            next_free += 1
    return table


BYTES_TO_UNICODE = bytes_to_unicode()


def printable(token):
    """The bytes of a token as visible text, written the way GPT-2 does.

    >>> printable(b' the')
    'Ġthe'
    """
    return token.decode('latin-1').translate(BYTES_TO_UNICODE)


# -----------------------------------------------------------------------------
# Special tokens: our names and other people's

def check_special_token_names(names):
    """Raise UserError unless names are distinct strings of letters, digits, _ and -."""
    valid = all(isinstance(name, str) and re.fullmatch(r'[\w-]+', name) for name in names)
    if not valid or len(set(names)) < len(names):
        raise UserError('special tokens need distinct names made of letters, digits, _ and -, '
                        f'got {short_repr(list(names))}')


def special_token_name(text):
    """Our name for a special token as OpenAI and Hugging Face write it.

    >>> special_token_name('<|endoftext|>'), special_token_name('<|fim_prefix|>')
    ('eot', 'fim_prefix')
    """
    return text.strip('<|>').replace('endoftext', 'eot')


def special_token_text(name):
    """How OpenAI and Hugging Face write the special token of this name.

    >>> special_token_text('eot'), special_token_text('pad')
    ('<|endoftext|>', '<|pad|>')
    """
    if name == 'eot':
        return '<|endoftext|>'
    return f'<|{name}|>'


class UnknownCharacters(ValueError):
    """The text has characters that the tokenizer does not know.

    characters: list of str, each once, in order of appearance.
    """

    def __init__(self, characters):
        self.characters = characters
        shown = ' '.join(f'{c!r} (U+{ord(c):04X})' for c in characters[:5])
        if len(characters) > 5:
            shown += ' …'
        super().__init__(f'the tokenizer does not know {shown}')


class VocabularyTooSmall(UserError):
    """sentencepiece needs a larger vocabulary for this text: at least `needed` tokens."""

    def __init__(self, vocab_size, needed):
        self.needed = needed
        super().__init__(f'sentencepiece cannot make a vocabulary of {vocab_size:,} from this: '
                         f'it needs at least {needed}')


# -----------------------------------------------------------------------------
# What all tokenizers share

class Tokenizer:
    """Base class. A subclass sets `kind` and provides encode_to_numpy(), to_dict() and from_dict().

    tokens: list of bytes, the UTF-8 behind each id; b'' for special tokens and unused ids.
    special_tokens: {name: id}; names have no brackets: eot, pad, bos, … No text is ever encoded to
    the id of a special token: a user who types <eot> has typed five characters.
    """
    kind = ''

    # Whether the dataset that it was made for consists of documents, each with eos_id at its end.
    # Then an empty prompt means the start of a document: see encode_prompt()
    has_documents = False

    def __init__(self, tokens, special_tokens=()):
        """tokens: the bytes behind each ordinary id; special_tokens: names that get the next ids.

        Raises UserError if a name is not allowed.
        """
        check_special_token_names(special_tokens)
        self.tokens = list(tokens)
        self.special_tokens = {}
        for name in special_tokens:
            self.special_tokens[name] = len(self.tokens)
            self.tokens.append(b'')
        self.vocab_size = len(self.tokens)

    # Text to ids

    def encode_to_numpy(self, text):
        """str to (T,) uint32 array. This is where tokenizers differ."""
        raise NotImplementedError

    def encode(self, text):
        """str to list of ids."""
        return self.encode_to_numpy(text).tolist()

    def encode_batch(self, texts):
        """Iterable of str to list of uint32 arrays."""
        return [self.encode_to_numpy(text) for text in texts]

    def encode_prompt(self, text):
        """str to the list of ids to generate from, which is never empty.

        An empty prompt is the start of a document, if the training text had several. Else it
        becomes a line break, or id 0 if the tokenizer does not know line breaks.
        """
        if text:
            return self.encode(text) or [0]
        if self.has_documents and self.eos_id is not None:
            return [self.eos_id]
        try:
            return self.encode('\n') or [0]
        except UnknownCharacters:
            return [0]

    # Ids to text

    def decode(self, ids):
        """ids to str. Special tokens become nothing, bytes that are not UTF-8 become U+FFFD."""
        return b''.join(map(self.tokens.__getitem__, ids)).decode('utf-8', errors='replace')

    def stream_decoder(self):
        """A function that decodes one id at a time and returns the text that is now complete.

        A token can end in the middle of a character, whose bytes are then held back until the rest
        arrives. None instead of an id flushes what is left.

        >>> decode_next = ByteTokenizer().stream_decoder()
        >>> [decode_next(i) for i in 'né'.encode()] + [decode_next(None)]
        ['n', '', 'é', '']
        """
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

        def decode_next(token_id):
            if token_id is None:
                return decoder.decode(b'', final=True)
            return decoder.decode(self.tokens[token_id])

        return decode_next

    # Special tokens by role

    def special_token_id(self, role):
        """The id of the special token for a role in SPECIAL_TOKEN_ROLES, or None."""
        for name in SPECIAL_TOKEN_ROLES[role]:
            if name in self.special_tokens:
                return self.special_tokens[name]
        return None

    @property
    def eos_id(self):
        """The id that ends a document or a reply, or None."""
        return self.special_token_id('eos')

    @property
    def eos_ids(self):
        """All ids that end a reply; some models have several."""
        return [] if self.eos_id is None else [self.eos_id]

    @property
    def decoder_start_id(self):
        """The id between a source and its target, which a decoder starts from, or None."""
        return self.special_token_id('decoder_start')

    # The vocabulary

    def byte_lengths(self):
        """(vocab_size,) int64: bytes of UTF-8 behind each id, for bits per byte."""
        return np.array([len(token) for token in self.tokens], dtype=np.int64)

    def vocabulary_listing(self):
        """The vocabulary as text to read: one id and its token per line, special tokens by name."""
        shown = [repr(token.decode('utf-8', 'backslashreplace')) for token in self.tokens]
        for name, token_id in self.special_tokens.items():
            shown[token_id] = f'<{name}>'
        return ''.join(f'{token_id:6}  {token}\n' for token_id, token in enumerate(shown))

    def to_dict(self):
        """The tokenizer as a dict for JSON, from which tokenizer_from_dict() restores it."""
        raise NotImplementedError

    def mark_documents(self, d):
        """What to_dict() returns: d, with a mark if the training text consists of documents."""
        if self.has_documents:
            d['documents'] = True
        return d


# -----------------------------------------------------------------------------
# Characters and bytes

class CharTokenizer(Tokenizer):
    """A token per character that occurs in the training text.

    The vocabulary is small and easy to read, but sequences are long, and characters that are not in
    the training text raise UnknownCharacters.

    >>> tok = CharTokenizer.train('hello')
    >>> tok.chars
    'ehlo'
    >>> tok.encode('hole')
    [1, 3, 2, 0]
    """
    kind = 'char'

    def __init__(self, chars, special_tokens=()):
        """chars: str, sorted by code point, each character once: a character's index is its id."""
        super().__init__([c.encode('utf-8', 'surrogatepass') for c in chars], special_tokens)
        self.chars = chars
        self.code_points = np.array([ord(c) for c in chars], dtype=np.uint32)

    @classmethod
    def train(cls, text, special_tokens=()):
        """text: a str, or any iterable of characters."""
        return cls(''.join(sorted(set(text))), special_tokens)

    def encode_to_numpy(self, text):
        """str to (T,) uint32 array. Raises UnknownCharacters."""
        # The same as [self.chars.index(c) for c in text], but fast for millions of characters:
        # UTF-32 gives their code points, and a binary search finds these among the sorted ones
        code_points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = np.searchsorted(self.code_points, code_points)
        ids = ids.clip(max=len(self.code_points) - 1)

        # The search says where a character would have to be; check that it is there
        unknown = self.code_points[ids] != code_points
        if unknown.any():
            repaired = replace_lone_surrogates(text)  # as train() did
            if repaired != text and '\ufffd' in self.chars:
                return self.encode_to_numpy(repaired)
            characters = map(chr, code_points[unknown])
            raise UnknownCharacters(list(dict.fromkeys(characters)))
        return ids.astype(np.uint32)

    def to_dict(self):
        d = {'kind': 'char', 'chars': self.chars}
        if self.special_tokens:
            d['specials'] = list(self.special_tokens)
        return self.mark_documents(d)

    @classmethod
    def from_dict(cls, d):
        chars = d['chars']
        if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
            raise ValueError('the characters of a char tokenizer must be sorted and distinct')
        return cls(chars, d.get('specials', ()))


class ByteTokenizer(Tokenizer):
    """A token per byte of UTF-8: 256 ids are enough for all text, and there is nothing to learn.

    >>> tok = ByteTokenizer()
    >>> tok.encode('hé')
    [104, 195, 169]
    >>> tok.vocab_size, tok.special_tokens
    (257, {'eot': 256})
    """
    kind = 'byte'

    def __init__(self, special_tokens=('eot',)):
        super().__init__([bytes([byte]) for byte in range(256)], special_tokens)

    def encode_to_numpy(self, text):
        """str to (T,) uint32 array."""
        data = text.encode('utf-8', 'surrogatepass')
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint32)

    def to_dict(self):
        d = {'kind': 'byte'}
        if list(self.special_tokens) != ['eot']:
            d['specials'] = list(self.special_tokens)
        return self.mark_documents(d)

    @classmethod
    def from_dict(cls, d):
        return cls(d.get('specials', ('eot',)))


# -----------------------------------------------------------------------------
# How byte-pair encoding learns
# (Sennrich et al. 2016, arXiv:1508.07909; with bytes: Radford et al. 2019, the GPT-2 paper)
#
# Text is a long sequence of bytes. BPE makes it shorter: frequent sequences of bytes get ids of
# their own.
#
#     1. The first 256 ids are the bytes.
#     2. Count how often each pair of neighboring ids occurs in the training text.
#     3. Merge the most frequent pair: replace it everywhere with a new id, the next one.
#     4. Repeat from 2 until there are enough ids.
#
# What has been learned is the list of merges. To encode other text, apply them in the same order.
#
# Merges stay within words. So "dog.", "dog!" and "dog?" do not become three tokens, and training
# can work on the distinct words, each with the number of times it occurs.

# How GPT-2 cuts text into words. \p{L} is a letter, \p{N} a digit; ++ is a + that never backtracks
GPT2_SPLIT = '|'.join([
    r"'(?:[sdmt]|ll|ve|re)",    # English endings: 's, 't, 'll, …
    r' ?\p{L}++',               # letters, with the space before them
    r' ?\p{N}++',               # digits, likewise
    r' ?[^\s\p{L}\p{N}]++',     # other characters, such as punctuation, likewise
    r'\s++$',                   # white space at the end of the text
    r'\s+(?!\S)',               # other white space, without its last character if a word follows
    r'\s',                      # that last character, if it is not a space
])

# Training cuts words that are longer than this many bytes, because a merge in a word takes time
# proportional to its length
LONGEST_WORD = 256


def count_words(texts):
    """Cut texts, an iterable of str that is read once, into words: a Counter {bytes: occurrences}.

    >>> dict(count_words(['low lower', ' low']))
    {b'low': 1, b' lower': 1, b' low': 1}
    """
    import regex
    from tqdm import tqdm
    find_words = regex.compile(GPT2_SPLIT).findall
    counts = Counter()
    progress = tqdm(chunks(texts, 2**20), desc='counting words', unit=' chunks', disable=None)
    for chunk in progress:
        counts.update(find_words(chunk))

    words = Counter()
    for word, count in counts.items():
        for part in chunks([word.encode('utf-8', 'replace')], LONGEST_WORD):
            words[part] += count
    return words


def count_pairs(words):
    """How often each pair of neighboring ids occurs. words: {tuple of ids: occurrences}.

    >>> dict(count_pairs({(1, 2, 3): 10, (1, 2): 5}))
    {(1, 2): 15, (2, 3): 10}
    """
    pairs = Counter()
    for word, count in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += count
    return pairs


def merge_pair(word, pair, new_id):
    """The word, a tuple of ids, with each occurrence of pair replaced by new_id.

    >>> merge_pair((1, 2, 3, 1, 2), (1, 2), 4)
    (4, 3, 4)
    """
    merged = []
    i = 0
    while i < len(word):
        if word[i:i + 2] == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def learn_merges_plain(words, num_merges):
    """BPE training in its plain form: the reference that learn_merges() is tested against.

    words: {bytes: occurrences}. Returns a list of pairs of ids; the pair at index n becomes the id
    256 + n. There are fewer than num_merges if no remaining pair occurs twice.

    >>> learn_merges_plain({b'low': 3, b'lower': 2, b'slow': 1}, 2)    # l + o, then lo + w
    [(108, 111), (256, 119)]
    """
    words = {tuple(word): count for word, count in words.items()}
    merges = []
    while len(merges) < num_merges:
        pairs = count_pairs(words)
        if not pairs:
            break

        # The most frequent pair; among equally frequent ones, the one with the smaller ids
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[pair] < 2:
            break    # there is nothing to learn from a pair that occurs once

        new_id = 256 + len(merges)
        merges.append(pair)
        words = {merge_pair(word, pair, new_id): count for word, count in words.items()}
    return merges


# The plain algorithm counts all pairs of all words again for every merge, which takes minutes for a
# megabyte of text. But a merge changes only the words that contain the pair, and few of the counts.
# The fast version counts once, then updates: it keeps an index from pairs to the words that contain
# them, and a heap with the most frequent pair on top.

class PairIndex:
    """The words of a text, the pairs in them, and how often each pair occurs.

    An id is a character here, chr(id): a word is a str, a pair is a str of two characters, and
    str.replace() does the merging, much faster than a loop in Python could.
    """

    def __init__(self, words):
        """words: {bytes: occurrences}"""
        self.words = []                         # the words as they are after the merges so far
        self.word_counts = []                   # how often each of them occurs
        self.pair_counts = defaultdict(int)     # how often each pair occurs
        self.words_with = defaultdict(list)     # pair -> indices of the words that have or had it
        for word, count in words.items():
            self.add_word(word.decode('latin-1'), count)    # Latin-1 decodes byte i to chr(i)

        # Python's heaps have the smallest entry on top: because of the minus sign, that is the most
        # frequent pair and, among equally frequent ones, the one with the smaller ids
        self.heap = [(-count, pair) for pair, count in self.pair_counts.items()]
        heapq.heapify(self.heap)

    def add_word(self, word, count):
        index = len(self.words)
        self.words.append(word)
        self.word_counts.append(count)
        for left, right in zip(word, word[1:]):
            self.pair_counts[left + right] += count
            self.words_with[left + right].append(index)

    def pop_most_frequent_pair(self):
        """Take the pair to merge next from the heap; None if no pair occurs twice.

        A merge also lowers the counts of other pairs, whose entries in the heap are then stale.
        Since counts never rise again, a stale entry comes up too early, never too late. It then
        goes back with the current count, and the next entry is tried.
        """
        while self.heap:
            negative_count, pair = heapq.heappop(self.heap)
            count = self.pair_counts[pair]
            if count != -negative_count:
                heapq.heappush(self.heap, (-count, pair))
            elif count < 2:
                return None
            else:
                return pair
        return None

    def merge(self, pair, new):
        """Replace pair by the character new in every word, and update the counts."""
        new_pairs = set()
        for index in set(self.words_with.pop(pair)):
            if pair in self.words[index]:    # an earlier merge may have used up one of the two
                self.merge_in_word(index, pair, new, new_pairs)
        for new_pair in new_pairs:
            heapq.heappush(self.heap, (-self.pair_counts[new_pair], new_pair))

    def merge_in_word(self, index, pair, new, new_pairs):
        """merge() in one word. Adds the pairs that arise, which all contain new, to new_pairs."""
        old_word = self.words[index]
        new_word = old_word.replace(pair, new)
        self.words[index] = new_word

        # Subtract the pairs of the old word from the counts and add those of the new one
        count = self.word_counts[index]
        pair_counts = self.pair_counts
        for left, right in zip(old_word, old_word[1:]):
            pair_counts[left + right] -= count
        for left, right in zip(new_word, new_word[1:]):
            pair_counts[left + right] += count
            if left == new or right == new:
                self.words_with[left + right].append(index)
                new_pairs.add(left + right)


def learn_merges(words, num_merges):
    """Learn the same merges as learn_merges_plain(), in a fraction of the time.

    >>> learn_merges({b'low': 3, b'lower': 2, b'slow': 1}, 2)
    [(108, 111), (256, 119)]
    """
    from tqdm import tqdm
    index = PairIndex(words)
    merges = []
    with tqdm(total=num_merges, desc='merges', disable=None) as progress:
        while len(merges) < num_merges:
            pair = index.pop_most_frequent_pair()
            if pair is None:
                break
            index.merge(pair, chr(256 + len(merges)))
            merges.append((ord(pair[0]), ord(pair[1])))
            progress.update()
    return merges


def lowest_rank_pair(parts, ranks):
    """Index of the pair of neighbors in parts whose merge was learned first; None if none was.

    parts: list of bytes. ranks: {token as bytes: its id}; ids are in the order of the merges.
    """
    best = None
    best_rank = None
    for i in range(len(parts) - 1):
        rank = ranks.get(parts[i] + parts[i + 1])
        if rank is not None and (best is None or rank < best_rank):
            best = i
            best_rank = rank
    return best


def encode_word_plain(word, ranks):
    """Encode one word, as bytes, to a list of ids: what the tiktoken library does, in plain Python.

    >>> ranks = {b'l': 0, b'o': 1, b'w': 2, b'lo': 3, b'low': 4}
    >>> encode_word_plain(b'lowlo', ranks)
    [4, 3]
    """
    parts = [word[i:i + 1] for i in range(len(word))]
    while True:
        i = lowest_rank_pair(parts, ranks)
        if i is None:
            return [ranks[part] for part in parts]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


# -----------------------------------------------------------------------------
# Tokenizers that use byte-pair encoding: our own and OpenAI's

class BytePairTokenizer(Tokenizer):
    """What our BPE and OpenAI's share: encoding by the tiktoken library, export to Hugging Face's.

    A subclass sets
        split      the regular expression that cuts text into words
        ranks      {bytes: id} of all tokens that are not special
        merges     list of str, in order: the two tokens that a merge joins, such as 'Ġt he'
        encoding   the tiktoken.Encoding made from split and ranks
    """

    def encode_to_numpy(self, text):
        """str to (T,) uint32 array. Lone surrogates are encoded as U+FFFD."""
        try:
            # disallowed_special=(): <|endoftext|> in a text is text like any other
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_to_numpy(replace_lone_surrogates(text))
        except ValueError:
            # A long run of one kind, such as a million spaces, is too much for the regular
            # expression: cut the text in half, until each part works
            half = len(text) // 2
            first = self.encode_to_numpy(text[:half])
            second = self.encode_to_numpy(text[half:])
            return np.concatenate([first, second])

    def encode_batch(self, texts):
        """Iterable of str to list of uint32 arrays, on all cores if the texts are long enough."""
        texts = list(texts)
        if sum(map(len, texts)) < 2000 * len(texts):    # threads would cost more than they save
            return super().encode_batch(texts)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode_to_numpy, texts))

    def tokenizer_json(self):
        """The content of a tokenizer.json for Hugging Face's libraries, as str.

        One difference remains: those libraries encode a typed <|endoftext|> as the special token.
        """
        special_tokens = {}
        for name, token_id in self.special_tokens.items():
            special_tokens[special_token_text(name)] = token_id
        vocab = {printable(token): token_id for token, token_id in self.ranks.items()}

        # tiktoken reads {1,3}+ as a {1,3} that never backtracks, but Hugging Face's library as a
        # repetition of repetitions
        split = re.sub(r'(\d})\+', r'\1', self.split)
        split_words = {'type': 'Split', 'pattern': {'Regex': split}, 'behavior': 'Isolated',
                       'invert': False}
        byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                      'use_regex': False}
        flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
                 'special': True}
        added_tokens = [{'id': token_id, 'content': text, **flags}
                        for text, token_id in special_tokens.items()]

        content = {
            'version': '1.0',
            'added_tokens': added_tokens,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split_words, byte_level]},
            'decoder': byte_level,
            'model': {'type': 'BPE', 'vocab': vocab | special_tokens, 'merges': self.merges},
        }
        return json.dumps(content, ensure_ascii=False, indent=1)


class BpeTokenizer(BytePairTokenizer):
    """Byte-level BPE learned here: 256 ids for bytes, then one per merge, then the special tokens.

    >>> tok = BpeTokenizer.train(['low lower lowest ' * 10], vocab_size=260)
    >>> tok.merges    # Ġ is a space
    ['l o', 'lo w', 'Ġ low']
    >>> tok.encode(' lowly')
    [258, 108, 121]
    >>> [tok.decode([i]) for i in tok.encode(' lowly')]
    [' low', 'l', 'y']
    """
    kind = 'bpe'
    split = GPT2_SPLIT

    def __init__(self, merges, special_tokens=('eot',)):
        """merges: list of str, written as in GPT-2's own file; the ids follow from their order.

        Raises ValueError if a merge joins tokens that do not exist or makes one that does.
        """
        import tiktoken
        token_bytes = {}    # {printable token: its bytes}, in the order of ids
        for byte, character in BYTES_TO_UNICODE.items():
            token_bytes[character] = bytes([byte])
        for number, merge in enumerate(merges):
            left, _, right = merge.partition(' ')
            known = left in token_bytes and right in token_bytes
            if not known or left + right in token_bytes:
                raise ValueError(f'merge {number} of the bpe tokenizer, {short_repr(merge)}, does '
                                 'not join two earlier tokens into a new one')
            token_bytes[left + right] = token_bytes[left] + token_bytes[right]

        super().__init__(token_bytes.values(), special_tokens)
        self.merges = merges
        self.ranks = {token: token_id for token_id, token in enumerate(token_bytes.values())}
        self.encoding = tiktoken.Encoding('bpe', pat_str=self.split, mergeable_ranks=self.ranks,
                                          special_tokens={})

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=('eot',)):
        """Learn merges from an iterable of str, which is read once and not kept. Raises UserError.

        The order of the texts makes no difference.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise UserError(f'a bpe vocabulary of {vocab_size:,} is too small: bytes and special '
                            f'tokens alone take {smallest}')
        pairs = learn_merges(count_words(texts), vocab_size - smallest)

        largest = smallest + len(pairs)
        if largest < vocab_size:
            print(f'a bpe vocabulary of {vocab_size:,} is too large for this text: '
                  f'made {largest:,}')
        return cls(cls.write_merges(pairs), special_tokens)

    @staticmethod
    def write_merges(pairs):
        """Write merges as pairs of tokens instead of pairs of ids.

        >>> BpeTokenizer.write_merges([(108, 111), (256, 119)])
        ['l o', 'lo w']
        """
        names = [BYTES_TO_UNICODE[byte] for byte in range(256)]
        merges = []
        for left, right in pairs:
            merges.append(f'{names[left]} {names[right]}')
            names.append(names[left] + names[right])
        return merges

    def to_dict(self):
        return self.mark_documents({
            'kind': 'bpe',
            'split': 'gpt2',
            'merges': self.merges,
            'specials': list(self.special_tokens),
        })

    @classmethod
    def from_dict(cls, d):
        if d['split'] != 'gpt2' or not isinstance(d['merges'], list):
            raise ValueError('a bpe tokenizer needs the split gpt2 and a list of merges')
        return cls(d['merges'], d.get('specials', ()))


class TiktokenTokenizer(BytePairTokenizer):
    """One of OpenAI's encodings, by its name in tiktoken.

    Special tokens that the encoding lacks get the ids after its own.
    """
    kind = 'tiktoken'

    def __init__(self, name, special_tokens=()):
        """Raises UserError if there is no such encoding or its files cannot be downloaded."""
        self.name = name
        self.encoding = self.load_encoding(name)
        self.ranks = self.encoding._mergeable_ranks
        self.split = self.encoding._pat_str

        # b'' remains for their special tokens, and for ids that they do not use
        tokens = [b''] * self.encoding.n_vocab
        for token, token_id in self.ranks.items():
            tokens[token_id] = token

        their_special_tokens = {}
        for text, token_id in self.encoding._special_tokens.items():
            their_special_tokens[special_token_name(text)] = token_id
        self.added = [name for name in special_tokens if name not in their_special_tokens]
        super().__init__(tokens, self.added)
        self.special_tokens = their_special_tokens | self.special_tokens

    @staticmethod
    def load_encoding(name):
        import tiktoken
        names = tiktoken.list_encoding_names()
        if name not in names:
            raise UserError(f'there is no tokenizer {name!r}: choose {", ".join(TOKENIZER_NAMES)} '
                            f'or, from tiktoken, {", ".join(names)}')
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:    # errors of requests are OSErrors
            raise UserError(f'cannot download the files of the encoding {name} '
                            f'({type(error).__name__}): without a network, set the environment '
                            'variable TIKTOKEN_CACHE_DIR to a folder that contains them') from None

    @functools.cached_property
    def merges(self):
        """The merges that made the tokens. OpenAI's files have only the tokens.

        The merges before a token's own reduce its bytes to two parts: its own merge joins these.
        """
        merges = []
        for token in sorted(self.ranks, key=self.ranks.get):
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                i = lowest_rank_pair(parts, self.ranks)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append(f'{printable(parts[0])} {printable(parts[1])}')
        return merges

    def to_dict(self):
        return self.mark_documents(
            {'kind': 'tiktoken', 'name': self.name, 'specials': self.added})

    @classmethod
    def from_dict(cls, d):
        return cls(d['name'], d.get('specials', ()))


# -----------------------------------------------------------------------------
# sentencepiece (Kudo and Richardson 2018, arXiv:1808.06226)

class SentencePieceTokenizer(Tokenizer):
    """A model of Google's sentencepiece. Characters that are not in its vocabulary become bytes.

    The library calls tokens pieces, and writes a space as ▁ (U+2581) in them.
    """
    kind = 'sentencepiece'

    def __init__(self, model):
        """model: a .model file in base64; its control symbols are the special tokens.

        Raises ValueError if the model is damaged.
        """
        import sentencepiece
        try:
            model_proto = base64.b64decode(model) or b'?'    # b'' would mean: no model yet
            sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except (RuntimeError, ValueError):
            raise ValueError('the model of the sentencepiece tokenizer is damaged') from None
        self.model = model
        self.sp = sp

        # The library would take a ▁ in a text for a space, so we encode it as its bytes
        self.space_symbol_ids = [sp.piece_to_id(f'<0x{byte:02X}>') for byte in '▁'.encode()]

        # The library has special tokens among its pieces, so they already have ids
        tokens = []
        special_tokens = {}
        for token_id in range(sp.vocab_size()):
            piece = sp.id_to_piece(token_id)
            if sp.is_control(token_id) or sp.is_unknown(token_id):
                special_tokens[piece.strip('<>')] = token_id
                tokens.append(b'')
            elif sp.is_byte(token_id):
                tokens.append(bytes([int(piece[3:5], 16)]))    # '<0x0A>' is a line break
            else:
                tokens.append(piece.replace('▁', ' ').encode('utf-8'))
        super().__init__(tokens)
        self.special_tokens = special_tokens

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=(), algorithm='bpe'):
        """Learn from an iterable of str. algorithm: 'bpe' or 'unigram'. Raises UserError."""
        check_special_token_names(special_tokens)
        lines = list(cls.short_lines(texts))
        while True:
            try:
                model = cls.train_model(lines, vocab_size, special_tokens, algorithm)
                return cls(base64.b64encode(model).decode('ascii'))
            except RuntimeError as error:
                largest = cls.largest_vocab_size(error, vocab_size)
            print(f'a sentencepiece vocabulary of {vocab_size:,} is too large for this text: '
                  f'made {largest:,}')
            vocab_size = largest

    @staticmethod
    def short_lines(texts):
        """The lines of texts in parts of at most 1,000 characters: the library skips long lines."""
        for chunk in chunks(texts, 2**20):
            lines = replace_lone_surrogates(chunk).splitlines()
            yield from chunks(lines, 1000)

    @staticmethod
    def train_model(lines, vocab_size, special_tokens, algorithm):
        """The bytes of a .model file. Raises RuntimeError if the library cannot make one."""
        import sentencepiece
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocab_size,
            minloglevel=2,    # errors only

            # Decoding gives back the exact text: no normalization, no spaces added or removed, and
            # bytes for characters that are not in the vocabulary
            normalization_rule_name='identity',
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            required_chars='▁',

            # Our special tokens instead of the library's <s> and </s>
            bos_id=-1,
            eos_id=-1,
            control_symbols=[f'<{name}>' for name in special_tokens],
        )
        return model.getvalue()

    @staticmethod
    def largest_vocab_size(error, vocab_size):
        """The largest size possible, if vocab_size was too large; for other errors, UserError.

        The library says both only in the text of its error.
        """
        message = str(error)
        largest = re.search(r'too high.* (\d+)', message)
        if largest and int(largest[1]) < vocab_size:
            return int(largest[1])

        smallest = re.search(r'smaller than.*vs (\d+)', message)
        if smallest:
            raise VocabularyTooSmall(vocab_size, int(smallest[1])) from None
        reason = message.split('] ')[-1] or 'there is no text'
        raise UserError(f'sentencepiece cannot make a vocabulary of {vocab_size:,} from this: '
                        f'{reason}') from None

    def encode_to_numpy(self, text):
        """str to (T,) uint32 array. Lone surrogates are encoded as U+FFFD."""
        # No piece continues after a line break, so encoding line by line gives the same ids, and
        # takes the library much less time and memory than a long text at once
        parts = re.findall('▁|[^▁\n]+\n?|\n', replace_lone_surrogates(text))
        ids = chain.from_iterable(map(self.encode_part, parts))
        return np.fromiter(ids, dtype=np.uint32)

    def encode_part(self, part):
        if part == '▁':
            return self.space_symbol_ids
        return self.sp.encode(part)

    def to_dict(self):
        return self.mark_documents({'kind': 'sentencepiece', 'model': self.model})

    @classmethod
    def from_dict(cls, d):
        return cls(d['model'])


# -----------------------------------------------------------------------------
# Tokenizers of other people's models, by Hugging Face's library

class HuggingFaceTokenizer(Tokenizer):
    """What a tokenizer.json says, whatever it is. The whole file travels in the dict.

    Special tokens are those that it marks as special. encode() takes them for plain text, as all
    our tokenizers do; encode_with_specials() is for text that a chat template has made.
    """
    kind = 'huggingface'

    def __init__(self, tokenizer_json, eos_ids=()):
        """tokenizer_json: the content of the file, str. eos_ids: the ids that end a reply.

        Raises ValueError if it is not a tokenizer, UserError if the library is missing.
        """
        self.tokenizer_json = tokenizer_json
        self.library, content = self.load_library(tokenizer_json)
        self.lock = threading.Lock()  # for the one setting that encoding switches

        vocab = self.library.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        if not 0 < size <= 2**24:
            raise ValueError(f'it has ids up to {size - 1:,}, instead of 0 to 2**24 at most')
        added = self.library.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}

        # The bytes behind each token depend on how the library joins tokens to text
        decoder = content.get('decoder') or {}
        self.is_byte_level = decoder.get('type') == 'ByteLevel'
        bytes_of = bytes_of_piece
        if 'ByteLevel' in json.dumps(decoder):
            bytes_of = bytes_of_byte_level
        elif decoder.get('type') == 'WordPiece':
            bytes_of = bytes_of_word_piece
        tokens = [b''] * size
        for token, token_id in vocab.items():
            if token_id not in special:
                tokens[token_id] = bytes_of(token)
        super().__init__(tokens)
        for token_id in sorted(special):
            text = added[token_id].content
            name = special_token_name(text)
            if name in self.special_tokens:  # <|x|> and <x>: then the second goes by its full text
                name = text
            self.special_tokens[name] = token_id
        self.reply_ends = [token_id for token_id in eos_ids if 0 <= token_id < size]

    @staticmethod
    def load_library(tokenizer_json):
        """(a tokenizers.Tokenizer that takes special tokens for plain text, the file's content)."""
        try:
            import tokenizers
        except ImportError:
            raise UserError('this model\'s tokenizer needs one more package: '
                            'pip install tokenizers') from None
        try:
            content = json.loads(tokenizer_json)
            steps = [content.get(part) for part in ('normalizer', 'pre_tokenizer', 'decoder')]
            if text_growth(steps) > MAX_GROWTH:
                raise ValueError('its steps make a text many times longer')
            library = tokenizers.Tokenizer.from_str(tokenizer_json)
        except BaseException as e:  # of the library, which knows Exception, and panics
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(f'it is not a tokenizer.json: {str(e)[:200]}') from None
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        return library, content

    @property
    def eos_id(self):
        """The first of the ids that end a reply, or None."""
        return self.reply_ends[0] if self.reply_ends else super().eos_id

    @property
    def eos_ids(self):
        """All ids that end a reply."""
        return self.reply_ends or super().eos_ids

    def encode_to_numpy(self, text):
        """str to (T,) uint32 array. Raises UserError if the library can't encode it."""
        return np.array(self.run_library([text])[0], dtype=np.uint32)

    def encode_batch(self, texts):
        """Iterable of str to list of uint32 arrays, on all processor cores."""
        return [np.array(ids, dtype=np.uint32) for ids in self.run_library(texts)]

    def encode_with_specials(self, text):
        """str to list of ids, in which the text of a special token becomes its id."""
        return self.run_library([text], parse_specials=True)[0]

    def encode_prompt(self, text):
        """str to the list of ids to generate from: with a start token, if the model wants one."""
        ids = self.run_library([text], add_start=True)[0]
        if ids:
            return ids
        return [self.eos_id or 0]  # an empty prompt is the start of a document

    def run_library(self, texts, parse_specials=False, add_start=False):
        """A list of ids per text. Raises UserError if the library can't encode one of them.

        parse_specials: whether the text of a special token becomes its id. add_start: whether to
        add the special tokens that begin a text.
        """
        texts = [replace_lone_surrogates(text) for text in texts]
        with self.lock:
            self.library.encode_special_tokens = not parse_specials
            try:
                # Fast: without the place of each token in the text
                found = self.library.encode_batch_fast(texts, add_special_tokens=add_start)
            except Exception as e:  # of the library; such as for a character that it doesn't know
                raise UserError(f'the tokenizer cannot encode this text: {e}') from None
            finally:
                self.library.encode_special_tokens = True
        return [encoding.ids for encoding in found]

    def decode(self, ids):
        """ids to str. Special tokens become nothing."""
        if self.is_byte_level:
            return super().decode(ids)
        return self.library.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream_decoder(self):
        """See Tokenizer.stream_decoder()."""
        if self.is_byte_level:
            return super().stream_decoder()

        # What a token adds to the text depends on the one before it, so both are decoded together
        shown = []  # ids whose text has been returned: only the latest of them
        waiting = []  # ids that may end in the middle of a character

        def decode_next(token_id):
            if token_id is not None:
                waiting.append(token_id)
            before = self.decode(shown)
            text = self.decode(shown + waiting)
            if token_id is not None and text.endswith('\ufffd') and len(waiting) < 8:
                return ''
            if text == before:  # a special token: what comes before it still counts
                shown.extend(waiting)
            else:
                shown[:] = waiting
            waiting.clear()
            return text[len(before):]

        return decode_next

    def to_dict(self):
        return {'kind': self.kind, 'json': self.tokenizer_json, 'eos_ids': self.eos_ids}

    @classmethod
    def from_dict(cls, d):
        if not isinstance(d['json'], str):
            raise ValueError('the tokenizer.json of a huggingface tokenizer must be text')
        eos_ids = d.get('eos_ids', [])
        if not all(type(token_id) is int for token_id in eos_ids):
            raise ValueError('the eos_ids of a huggingface tokenizer must be numbers')
        return cls(d['json'], eos_ids)


# About how many times longer a text can become by a step of a tokenizer.json
GROWTH = {'ByteLevel': 2, 'Metaspace': 2, 'NFC': 2, 'NFD': 4, 'NFKC': 4, 'NFKD': 4,
          'Precompiled': 4}
MAX_GROWTH = 2**12  # by all of them


def text_growth(step):
    """About how many times longer a text can become by a step, or steps within it, or a list.

    A step that doubles it takes 60 characters of the file; 40 such steps would fill any memory.

    >>> doubles = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
    >>> text_growth({'type': 'Sequence', 'normalizers': [doubles] * 40}) == 2**40
    True
    """
    if isinstance(step, list):
        return math.prod(map(text_growth, step))
    if not isinstance(step, dict):
        return 1
    if step.get('type') == 'Replace':
        replaced = step['pattern'].get('String')
        if replaced:
            return max(1, len(step['content']) / len(replaced))
        return 1 + len(step['content'])  # a regular expression may match nothing
    return GROWTH.get(step.get('type'), 1) * text_growth(list(step.values()))


UNICODE_TO_BYTES = {character: byte for byte, character in BYTES_TO_UNICODE.items()}


def bytes_of_byte_level(token):
    """The bytes behind a token that is written as GPT-2 does; others stand for themselves.

    >>> bytes_of_byte_level('Ġthe'), bytes_of_byte_level('two words')
    (b' the', b'two words')
    """
    if all(character in UNICODE_TO_BYTES for character in token):
        return bytes(UNICODE_TO_BYTES[character] for character in token)
    return token.encode('utf-8', 'replace')


def bytes_of_piece(token):
    """The bytes behind a token that is written as sentencepiece does.

    >>> bytes_of_piece('▁the'), bytes_of_piece('<0x0A>')
    (b' the', b'\\n')
    """
    if re.fullmatch('<0x[0-9A-F]{2}>', token):
        return bytes([int(token[3:5], 16)])
    return token.replace('▁', ' ').encode('utf-8', 'replace')


def bytes_of_word_piece(token):
    """The bytes behind a token that is written as BERT does: with a space unless it continues.

    >>> bytes_of_word_piece('play'), bytes_of_word_piece('##ing')
    (b' play', b'ing')
    """
    if token.startswith('##'):
        return token[2:].encode('utf-8', 'replace')
    return b' ' + token.encode('utf-8', 'replace')


# -----------------------------------------------------------------------------
# Making a tokenizer by name, or from its dict

TOKENIZER_KINDS = {
    'char': CharTokenizer,
    'byte': ByteTokenizer,
    'bpe': BpeTokenizer,
    'tiktoken': TiktokenTokenizer,
    'sentencepiece': SentencePieceTokenizer,
    'huggingface': HuggingFaceTokenizer,
}


def make_tokenizer(name, texts=None, vocab_size=None, special_tokens=()):
    """A new tokenizer. Raises UserError.

    name: one of TOKENIZER_NAMES, or the name of one of tiktoken's encodings.
    texts: iterable of str to learn from. byte and tiktoken's encodings do not need it.
    vocab_size: for bpe and sentencepiece; includes the special tokens.
    special_tokens: names. If none are given, byte, bpe and tiktoken's encodings still have eot.
    """
    if name == 'char':
        texts = map(replace_lone_surrogates, texts)
        characters = (character for text in texts for character in set(text))
        return CharTokenizer.train(characters, special_tokens)
    if name == 'byte':
        return ByteTokenizer(special_tokens or ('eot',))
    if name == 'bpe':
        return BpeTokenizer.train(texts, vocab_size, special_tokens or ('eot',))
    if name == 'sentencepiece':
        return SentencePieceTokenizer.train(texts, vocab_size, special_tokens, 'bpe')
    if name == 'sentencepiece_unigram':
        return SentencePieceTokenizer.train(texts, vocab_size, special_tokens, 'unigram')
    return TiktokenTokenizer(name, special_tokens)


def tokenizer_from_dict(d):
    """The tokenizer that to_dict() described. Raises ValueError if d does not describe one."""
    if not isinstance(d, dict) or 'kind' not in d:
        raise ValueError('not the description of a tokenizer')

    kind = d['kind']
    if not isinstance(kind, str) or kind not in TOKENIZER_KINDS:
        raise ValueError(f'unknown kind of tokenizer {short_repr(kind)}: this version knows '
                         f'{", ".join(TOKENIZER_KINDS)}')

    # d comes from a file, and can be anything
    try:
        if not isinstance(d.get('specials', []), (list, tuple)):
            raise ValueError('the special tokens of a tokenizer must be a list')
        tok = TOKENIZER_KINDS[kind].from_dict(d)
        tok.has_documents = d.get('documents') is True
        return tok
    except (KeyError, TypeError, AttributeError):    # a field is missing, or of another type
        raise ValueError('not the description of a tokenizer') from None
