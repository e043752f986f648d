"""
What the scripts in prepare/ share: reading text, choosing what is validation, writing a dataset.

Text comes in pieces. A piece is a tuple (split, text, ends): the split that it goes to, 'train' or
'val', the text itself, and whether its document ends there. A short document is one piece, a long
one is several, so no text is too large for memory.

write_stream(), write_pairs(), write_chats() and write_corpus() say what their data looks like as
pieces, and write_dataset() does the rest for all of them: it encodes the pieces and writes the .bin
files, the .idx files of pairs and chats, and meta.json. docs/data.md describes the files.
"""
import array
import codecs
import collections
import hashlib
import io
import itertools
import json
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from pocket.errors import UserError
from pocket.files import (
    FORMAT,
    ROOT,
    atomic_write,
    download,
    find_path,
    lock,
    make_folder,
    replace_patiently,
    sha256_of,
    short_path,
)
from pocket.template import template_from_dict
from pocket.tokenizer import UnknownCharacters, make_tokenizer, tokenizer_from_dict

PIECE_SIZE = 2**20             # characters: longer documents are cut into pieces of about this size
TOKENIZER_SAMPLE = 50_000_000  # characters: a tokenizer is trained on at most this much text
EXTENSIONS = {'stream': ['.bin'], 'pairs': ['.bin', '.idx'], 'chats': ['.bin', '.idx', '.mask']}
SAVE_EVERY = 5                 # seconds of work that can be lost when a long tokenization is killed


# --- Where datasets live, and what to do with them ------------------------------------------------

def dataset_folder(data_dir, name):
    """The folder of a dataset: data_dir/NAME. data_dir None: the folder data/ beside train.py."""
    return short_path(Path(data_dir or ROOT / 'data') / name)


def print_next_step(arguments, data_dir):
    """Print the command that trains on the dataset just made: train.py with these arguments.

    arguments: of a shell, so what may contain spaces has to be quoted.
    """
    command = f'python train.py {arguments}'
    if data_dir:
        command += f' --data_dir={shlex.quote(data_dir)}'
    print(f'next: {command}')


# --- Reading --------------------------------------------------------------------------------------

def read_text(path, translate=True):
    """A text file as one str, read as read_blocks() does. Raises UserError.

    Texts to train on and prompts to continue are read alike, or a model would meet line ends that
    it has never seen.
    """
    return ''.join(read_blocks(path, translate))


def read_or_download(path, urls, sha256, folder):
    """The text of a local file or, if path is None, of a file that is downloaded into folder.

    Returns (text, what meta.json should say about its source). Raises UserError.
    """
    if path is None:
        script = f'prepare/{Path(sys.argv[0]).name}'
        advice = (f'Without a network, give a copy that you have: python {script} --input=FILE, '
                  'or train on the default dataset: python train.py')
        path = download(urls, folder / 'input.txt', sha256, advice)

    text = read_text(path)
    if len(text) < 20:
        raise UserError(f'{path} has only {len(text)} characters, too few to train on')
    return text, {'source': str(path), 'sha256': sha256_of(path)}


def read_blocks(path, translate=True):
    r"""Yield the text of a file in blocks of at most PIECE_SIZE bytes.

    The file is UTF-8, or UTF-16 or UTF-32 with a byte order mark. Every line end becomes \n, and a
    byte order mark is dropped. Raises UserError with the name of the file and the place of a byte
    that is not text. translate: False leaves line ends as they are.
    """
    decoder = None
    block = b''
    bytes_before = 0   # in the blocks before this one
    try:
        with open(path, 'rb') as f:
            while True:
                block = f.read(PIECE_SIZE)
                if decoder is None:
                    encoding = encoding_of(block)
                    decode = codecs.getincrementaldecoder(encoding)()
                    decoder = io.IncrementalNewlineDecoder(decode, translate)
                text = decoder.decode(block, final=not block)
                if '\0' in text:
                    position = bytes_before + block.find(0)
                    raise UserError(f'{path} looks binary: byte 0x00 at position {position:,}; '
                                    'leave it out, or save it as UTF-8 if it is text')
                yield text
                if not block:
                    break
                bytes_before += len(block)
    except UnicodeDecodeError as e:
        # e.object is this block, preceded by what the decoder had kept of a character cut in two
        position = bytes_before + len(block) - len(e.object) + e.start
        place = f'byte {e.object[e.start]:#04x} at position {position:,}'
        name = encoding.removesuffix('-sig').upper()
        raise UserError(f'{path} is not {name} text: {place}; '
                        'save it as UTF-8, or leave it out') from None
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None


def encoding_of(beginning):
    r"""The encoding of a text, from the byte order mark that its first bytes may be.

    >>> encoding_of(b'\xff\xfeH\0'), encoding_of(b'Hello')
    ('utf-16', 'utf-8-sig')
    """
    if beginning.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return 'utf-32'
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 'utf-16'
    return 'utf-8-sig'


def read_lines(path):
    """Yield the lines of a UTF-8 file without line ends. Raises UserError as read_blocks() does."""
    rest = ''
    for block in read_blocks(path):
        *lines, rest = (rest + block).split('\n')
        yield from lines
    if rest:
        yield rest


def read_documents(path, separator=None):
    """Yield the documents of a text file in pieces (text, ends); blank documents are left out.

    Without a separator the file is one document. Raises UserError as read_blocks() does.
    """
    rest = ''             # text that is read but not yielded yet
    in_document = False   # whether the beginning of the current document is yielded already
    for block in read_blocks(path):
        rest += block

        # Documents that end in this block
        if separator:
            *documents, rest = rest.split(separator)
            for text in documents:
                if in_document or text.strip():
                    yield text.strip('\n'), True
                in_document = False
            if not in_document:
                rest = rest.lstrip('\n')

        # The beginning of a long one that does not
        while len(rest) > 2 * PIECE_SIZE:
            cut = find_cut(rest)
            yield rest[:cut], False
            rest = rest[cut:]
            in_document = True

    if in_document or rest.strip():
        if separator:
            rest = rest.strip('\n')
        yield rest, True


def find_cut(text):
    """Where to cut off the first piece of a long text: before the last space of it that stands
    between two letters.

    At such a space every tokenizer here can stop and start again, and the ids are the same as if
    the text had never been cut. Text without one is cut at PIECE_SIZE.
    """
    cut = text.rfind(' ', 0, PIECE_SIZE)
    while cut > 0:
        if text[cut - 1].isalpha() and text[cut + 1].isalpha():
            return cut
        cut = text.rfind(' ', 0, cut)
    return PIECE_SIZE


def training_sample(shards):
    """Yield the train text of shards (see write_corpus), at most TOKENIZER_SAMPLE characters of it:
    what a tokenizer is trained on."""
    size = 0
    for shard in shards:
        for split, text, _ in shard():
            if split == 'train':
                yield text[:TOKENIZER_SAMPLE - size]
                size += len(text)
            if size >= TOKENIZER_SAMPLE:
                return


def hugging_face_url(dataset, endpoint=None):
    """The address of a dataset's files on Hugging Face. endpoint: that of a mirror, or None."""
    endpoint = endpoint or os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
    return f'{endpoint}/datasets/{dataset}/resolve/main/'


def file_size(path):
    """Size of a file in bytes. Raises UserError if there is none."""
    try:
        return os.stat(path).st_size
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None


# --- Tokenizers -----------------------------------------------------------------------------------

def find_run(name):
    """The checkpoint that a name means, if it is a run of ours: out/RUN, or a file in it.

    None if it is something else, such as a folder in Hugging Face's format. Raises UserError for a
    name in out/ without a checkpoint.
    """
    path = find_path(name)
    if path.is_file():
        return path
    for file in ('best.pt', 'last.pt'):
        if (path / file).is_file():
            return path / file
    if Path(name).parts[:1] == ('out',) and not (path / 'config.json').is_file():
        raise UserError(f'there is no checkpoint in {name}: name a run with a best.pt or a last.pt')
    return None


def make_dataset_tokenizer(name, texts=None, vocab_size=None, special_tokens=()):
    """(tokenizer, its chat template or None) for what --tokenizer of the scripts in prepare/ says.

    name: a kind, which learns from texts (see make_tokenizer()), or a model whose tokenizer is
    taken over: a run of ours (out/RUN), smollm2, OWNER/NAME, or a folder in Hugging Face's format.
    Raises UserError.
    """
    run = find_run(name)
    if run is not None:
        from pocket import checkpoint  # here: it imports torch, which most scripts do without
        state = checkpoint.load(run)
        try:
            tok = tokenizer_from_dict(state['tokenizer'])
            chat = state.get('chat')
            return tok, None if chat is None else template_from_dict(chat)
        except ValueError as e:
            raise UserError(f'{run}: {e}') from None
    if name == 'smollm2' or '/' in name or find_path(name).is_dir():
        from pocket import pretrained
        return pretrained.load_tokenizer(name), pretrained.load_template(name)
    return make_tokenizer(name, texts, vocab_size, special_tokens), None


# --- Choosing what is validation ------------------------------------------------------------------
# A model predicts a text well that it was trained on, which says nothing about other texts. So no
# validation text may occur in train: documents that are equal, or begin alike, share a side.

def hash_documents(pieces):
    """(N,) uint64 hash of the text and (N,) int64 number of characters of each document.

    pieces: iterable of (text, ends), as from read_documents().
    """
    hashes = array.array('Q')
    sizes = array.array('Q')
    digest = hashlib.blake2b(digest_size=8)
    size = 0
    for text, ends in tqdm(pieces, desc='reading', unit=' pieces', disable=None):
        digest.update(text.encode('utf-8', 'surrogatepass'))
        size += len(text)
        if ends:
            hashes.append(int.from_bytes(digest.digest(), 'little'))
            sizes.append(size)
            digest = hashlib.blake2b(digest_size=8)
            size = 0
    return np.array(hashes, dtype=np.uint64), np.array(sizes, dtype=np.int64)


def first_of_each(hashes):
    """(N,) bool: whether a document is the first with its text. The others are duplicates."""
    _, first = np.unique(hashes, return_index=True)
    keep = np.zeros(len(hashes), dtype=bool)
    keep[first] = True
    return keep


def choose_val_by_hash(hashes, sizes, fraction):
    """(N,) bool: which documents are validation, about `fraction` of the characters.

    These are the documents with the lowest hashes, so the choice depends on no name and no order,
    and documents with the same text share a side. All False if there are too few to choose from.
    """
    _, text_number = np.unique(hashes, return_inverse=True)   # equal texts have the same number
    text_sizes = np.bincount(text_number, sizes)              # characters, all copies together
    wanted = fraction * text_sizes.sum()

    is_val = np.zeros(len(text_sizes), dtype=bool)
    used = 0
    for i, size in enumerate(text_sizes):
        if used + size <= wanted:   # a text that is too long is passed over for the ones after it
            is_val[i] = True
            used += size
        if used > 0.9 * wanted:
            break
    if used <= wanted / 2:
        is_val[:] = False
    return is_val[text_number]


def choose_val_by_blocks(sources, units, seed):
    """Choose a tenth of the units of some pairs, in blocks from all over, as validation.

    sources: text of each pair. units: number of what each pair belongs to, such as a scene: a unit
    is never divided. A chosen unit moves to train if one of its sources begins, continues or equals
    one there, word for word. Returns (set of val units, number of pairs that moved to train).
    """
    chosen = random_blocks(sorted(set(units)), Random(seed))
    families = source_families(sources)

    # A unit that moves to train takes all its sources there, which can draw in other units
    val = chosen
    while True:
        train_families = {families[s] for s, unit in zip(sources, units) if unit not in val}
        leaks = {unit for s, unit in zip(sources, units)
                 if unit in val and families[s] in train_families}
        if not leaks:
            break
        val = val - leaks
    moved = sum(unit in chosen and unit not in val for unit in units)
    return val, moved


def random_blocks(units, rng):
    """A tenth of a list of units, at least one, as a set: a block at random from each of up to ten
    equal stretches of the list."""
    stretches = min(10, len(units) // 20 + 1)
    chosen = set()
    for i in range(stretches):
        stretch = units[len(units) * i // stretches:len(units) * (i + 1) // stretches]
        size = max(1, round(len(stretch) / 10))
        start = rng.randrange(len(stretch) - size + 1)
        chosen.update(stretch[start:start + size])
    return chosen


def source_families(sources):
    """{source: the shortest of the sources that it begins with, word for word}.

    Two sources begin alike if one of them begins the other: then they are of one family.
    """
    families = {}
    root = None
    for source in sorted({f'{s} ' for s in sources}):   # the space: 'a' does not begin 'ab'
        # In this order, all sources that begin with a root come right after it
        if root is None or not source.startswith(root):
            root = source
        families[source[:-1]] = root
    return families


# --- Writing --------------------------------------------------------------------------------------

def write_stream(folder, tokenizer, train, val, source, how_split):
    """Write a token stream that fits into memory. Raises UserError.

    train, val: each a text or an array of ids.
    source: dict of what meta.json should say about where the text comes from.
    how_split: a sentence for meta.json that says how train and val were divided.
    """
    pieces = [('train', train, False), ('val', val, False)]
    size = len(train) + len(val)
    write_dataset(folder, tokenizer, [lambda: pieces], source, how_split, size=size)


def write_pairs(folder, tokenizer, splits, source, how_split, template=None):
    """Write pairs of a source and its target. Raises UserError.

    splits: {split: list of (source, target)}, each side a text or a list of ids. A target that is
    text gets the tokenizer's end id; ids are taken as they are.
    source, how_split: as in write_stream(). template: the ChatTemplate of conversations, or None.
    """
    pieces = []
    for split, pairs in splits.items():
        for source_side, target_side in pairs:
            pieces.append((split, source_side, False))
            pieces.append((split, target_side, True))
    size = sum(len(side) for _, side, _ in pieces)
    write_dataset(folder, tokenizer, [lambda: pieces], source, how_split, kind='pairs',
                  splits=list(splits), template=template, size=size)


def write_chats(folder, tokenizer, template, splits, source, how_split):
    """Write conversations. Raises UserError.

    splits: {split: list of (ids, mask)}, a pair of equally long arrays per conversation; for the
    mask see pocket/data.py. template: what wrote them. source, how_split: as in write_stream().
    """
    pieces = []
    masks = {}
    for split, conversations in splits.items():
        pieces += [(split, ids, False) for ids, _ in conversations]
        masks[split] = b''.join(np.asarray(mask, np.uint8).tobytes() for _, mask in conversations)
    size = sum(len(ids) for _, ids, _ in pieces)
    write_dataset(folder, tokenizer, [lambda: pieces], source, how_split, kind='chats',
                  splits=list(splits), template=template, size=size, masks=masks)


def write_corpus(folder, tokenizer, shards, source, how_split, characters=None):
    """Write a token stream of any size: memory does not grow with the text. Raises UserError.

    shards: list of functions. Each returns an iterator of pieces, the same ones at every call.
    source, how_split: as in write_stream(). characters: of all pieces together, if known.

    A call that was stopped is resumed by the same call, if tokenizer, source and how_split are the
    same: so source must tell one text from another.
    """
    write_dataset(folder, tokenizer, shards, source, how_split, size=characters, resumable=True)


def write_dataset(folder, tokenizer, shards, source, how_split, kind='stream',
                  splits=('train', 'val'), template=None, size=None, resumable=False, masks=None):
    """Encode pieces and write all files of a dataset; prints what was made. Raises UserError.

    kind: 'stream', 'pairs' or 'chats'. The pieces of pairs are a source, its target, a source, its
    target …; those of chats are conversations. size: characters in all pieces, for the progress
    bar. masks: {split: bytes of its .mask file}, of chats. For the other arguments see
    write_stream(), write_pairs() and write_corpus().
    """
    call = json.dumps([tokenizer.to_dict(), source, how_split])
    key = hashlib.sha256(call.encode()).hexdigest()   # what can be resumed has the same key
    try:
        with lock_dataset(folder):
            # A folder without meta.json is no dataset: so it goes first and comes back last
            (folder / 'meta.json').unlink(missing_ok=True)
            with TokenFiles(folder, splits, kind, id_type(tokenizer), key, resumable) as files:
                encode_pieces(files, tokenizer, shards, size)
                files.finish()
            for split, mask in (masks or {}).items():
                write_bytes(folder / f'{split}.mask', mask)
            write_meta(files, tokenizer, source, how_split, template)
            files.progress_path.unlink(missing_ok=True)
            (folder / '.progress.json.tmp').unlink(missing_ok=True)   # of a killed process
    except UnknownCharacters as e:
        raise UserError(f'{e}; --tokenizer=byte knows every character') from None
    except OSError as e:
        raise UserError(f'cannot write in {folder}: {e.strerror}; free some space, then run the '
                        'same command again') from None


def lock_dataset(folder):
    """Make a dataset's folder, and lock it against other processes that would prepare it too."""
    make_folder(folder)
    return lock(folder, 'another process is preparing', '--data_dir=…')


def id_type(tokenizer):
    """The dtype of the ids in .bin files: 2 bytes per id, as nanoGPT has it, or 4 if need be."""
    return np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')


def encode_pieces(files, tokenizer, shards, size):
    """Encode the pieces that are not in `files` yet, and append them. See write_dataset()."""
    resumed_ids = files.total_ids()
    if resumed_ids:
        print(f'resuming after {resumed_ids:,} ids that an earlier run has made')

    def encode_chunk(chunk):
        encoded = []
        characters = 0
        for split, text, ends in chunk:
            encoded.append((split, encode_piece(tokenizer, text, ends, files.dtype)))
            characters += len(text)
        return encoded, characters

    begin = time.monotonic()
    last_save = begin
    tokens_per_second = 0

    # Threads, not processes: they share one tokenizer, whose library works outside Python's lock
    threads = min(os.cpu_count() or 1, 16)
    bar = tqdm(total=size, initial=files.characters, unit='', unit_scale=True,
               desc=files.folder.name, disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        for shard in shards[files.shard:]:
            pieces = itertools.islice(shard(), files.pieces, None)   # those not in the files yet
            results = map_in_order(pool, encode_chunk, chunks(pieces), ahead=2 * threads)
            for encoded, characters in results:
                for split, ids in encoded:
                    files.append(split, ids)
                files.pieces += len(encoded)
                files.characters += characters

                now = time.monotonic()
                tokens_per_second = (files.total_ids() - resumed_ids) / max(now - begin, 0.001)
                bar.set_postfix_str(f'{tokens_per_second:,.0f} tok/s', refresh=False)
                bar.update(characters)
                if now > last_save + SAVE_EVERY:
                    files.save_progress()
                    last_save = time.monotonic()

            files.shard += 1
            files.pieces = 0
            files.save_progress()

    if files.resumable:
        new_ids = files.total_ids() - resumed_ids
        seconds = time.monotonic() - begin
        print(f'{new_ids:,} ids in {seconds:.1f} s, {tokens_per_second:,.0f} tok/s')


def encode_piece(tokenizer, text, ends, dtype):
    """Ids of a text, then the end id if its document ends there. Ids are taken as they are."""
    if not isinstance(text, str):
        return np.asarray(text).astype(dtype)
    ids = tokenizer.encode_to_numpy(text)
    if not ends or tokenizer.eos_id is None:
        return ids.astype(dtype)
    document = np.empty(len(ids) + 1, dtype)   # faster than np.append(): there can be millions
    document[:-1] = ids
    document[-1] = tokenizer.eos_id
    return document


def chunks(pieces):
    """Yield lists of pieces, PIECE_SIZE characters or a little more each: work for one thread."""
    chunk = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece[1])
        if size >= PIECE_SIZE:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def map_in_order(pool, function, items, ahead):
    """map() on a pool's threads that takes items as it needs them, at most `ahead` in advance."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class TokenFiles:
    """The .bin files of a dataset while they are written, and the .idx files of pairs and chats.

    Ids are appended to SPLIT.bin.part; finish() gives the files their names when all are complete.
    If resumable, .progress.json says which pieces are in the files, and a later process with the
    same key continues there. If not, files that were not finished are removed.
    """

    def __init__(self, folder, splits, kind, dtype, key, resumable):
        self.folder = folder
        self.kind = kind
        self.dtype = dtype
        self.key = key
        self.resumable = resumable
        self.parts = {split: folder / f'{split}.bin.part' for split in splits}
        self.progress_path = folder / '.progress.json'

        # What is in the files
        self.shard = 0        # shards that are done
        self.pieces = 0       # pieces of the next shard that are done
        self.characters = 0   # characters in all of these
        self.counts = dict.fromkeys(splits, 0)   # ids in each file
        if resumable:
            self.load_progress()

        # Where each piece begins and the last one ends: of pairs, each source and each target
        self.offsets = {split: array.array('q', [0]) for split in splits}

    def __enter__(self):
        if self.total_ids() == 0:
            self.progress_path.unlink(missing_ok=True)   # it describes files that now go
        self.files = {split: open(path, 'ab') for split, path in self.parts.items()}
        for split, file in self.files.items():
            file.truncate(self.counts[split] * self.dtype.itemsize)   # what follows is not counted
        return self

    def __exit__(self, *exception):
        for file in self.files.values():
            file.close()
        if not self.resumable:
            for path in self.parts.values():
                path.unlink(missing_ok=True)

    def total_ids(self):
        """Ids in all files."""
        return sum(self.counts.values())

    def append(self, split, ids):
        """Append the ids of one piece, an array of self.dtype."""
        self.files[split].write(ids.tobytes())
        self.counts[split] += len(ids)
        if self.kind != 'stream':
            self.offsets[split].append(self.counts[split])

    def flush(self):
        """Make sure that what was appended is on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def save_progress(self):
        """What is in the files now need not be done again, if they are resumable."""
        if not self.resumable:
            return
        self.flush()
        progress = {
            'key': self.key,
            'shard': self.shard,
            'pieces': self.pieces,
            'characters': self.characters,
            'counts': self.counts,
        }
        write_bytes(self.progress_path, json.dumps(progress).encode())

    def load_progress(self):
        """Continue where an earlier process with the same key stopped, if its files are there."""
        try:
            progress = json.loads(self.progress_path.read_text(encoding='utf-8'))
            if progress['key'] != self.key:
                return
            for split, path in self.parts.items():
                saved_bytes = progress['counts'][split] * self.dtype.itemsize
                if path.stat().st_size < saved_bytes:
                    return
            shard = progress['shard']
            pieces = progress['pieces']
            characters = progress['characters']
        except (OSError, ValueError, LookupError, TypeError):
            return   # there is no progress, or it is damaged
        self.shard = shard
        self.pieces = pieces
        self.characters = characters
        self.counts = progress['counts']

    def finish(self):
        """Give the files their names, and write the .idx files of pairs and chats."""
        self.flush()
        for split, file in self.files.items():
            file.close()
            replace_patiently(self.parts[split], self.folder / f'{split}.bin')
        if self.kind != 'stream':
            for split, offsets in self.offsets.items():
                content = np.array(offsets, dtype='<i8').tobytes()
                write_bytes(self.folder / f'{split}.idx', content)


def write_meta(files, tokenizer, source, how_split, template):
    """Write meta.json, the last file of a dataset, and print what was made."""
    dtype = files.dtype.name
    meta = {
        'format': FORMAT,
        'kind': files.kind,
        'dtype': dtype,
        'vocab_size': tokenizer.vocab_size,
        'tokenizer': tokenizer.to_dict(),
        'counts': files.counts,
    }
    if files.kind == 'pairs':
        meta['pairs'] = {split: len(offsets) // 2 for split, offsets in files.offsets.items()}
    if files.kind == 'chats':
        meta['chats'] = {split: len(offsets) - 1 for split, offsets in files.offsets.items()}
    if template is not None:
        meta['chat'] = template.to_dict()
    meta['files'] = {}   # so that damage is noticed
    for split in files.counts:
        for extension in EXTENSIONS[files.kind]:
            path = files.folder / f'{split}{extension}'
            meta['files'][path.name] = sha256_of(path)
    meta['split'] = how_split
    meta.update(source)
    text = json.dumps(meta, ensure_ascii=False, indent=1)
    try:
        # surrogateescape: in some locales, the path of a source comes with bytes that are UTF-8
        content = text.encode('utf-8', 'surrogateescape')
        content.decode('utf-8')
    except UnicodeError:
        # What is no UTF-8, such as odd bytes in a path, JSON writes as \udc80
        content = text.encode('utf-8', 'backslashreplace')
    write_bytes(files.folder / 'meta.json', content)

    unit = {'stream': 'ids', 'pairs': 'pairs', 'chats': 'conversations'}[files.kind]
    amounts = meta['counts'] if files.kind == 'stream' else meta[files.kind]
    made = ' and '.join(f'{amount:,} {split}' for split, amount in amounts.items())
    details = f'{meta["tokenizer"]["kind"]}, {dtype}'
    if dtype == 'uint32':
        details += ': more than 65,536 take 4 bytes per id'
    print(f'{files.folder}: {made} {unit}, {tokenizer.vocab_size:,} in the vocabulary ({details})')


def write_bytes(path, content):
    """Write a small file atomically. Raises UserError."""
    atomic_write(path, lambda file: file.write(content))
