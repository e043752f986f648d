"""
What the scripts in prepare/ share: reading text, downloading it, and writing datasets.

A piece is (text, ends): a document is one piece or, where it is long, several; `ends` marks the last of them.
"""
import codecs
import collections
import hashlib
import io
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pocket.errors import UserError
from pocket.files import FORMAT, ROOT, atomic_write, download, lock, make_folder, sha256_of, short_path
from pocket.tokenizer import UnknownCharacters

PIECE = 2**20        # characters: longer documents are cut, and so many are tokenized at a time
SAMPLE = 50_000_000  # characters, at most, that a tokenizer is trained on
SAVE_EVERY = 5       # seconds of work that a stop can cost

SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SHAKESPEARE_URLS = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                    'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt',
                    'https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt')


def read_text(path):
    """A UTF-8 text file as str, line ends as they are. Raises UserError with the file's name, and the place of a bad byte."""
    try:
        return Path(path).read_bytes().decode('utf-8')
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    except UnicodeDecodeError as e:
        where = f'byte {e.object[e.start]:#04x} at position {e.start:,}'
        raise UserError(f'{path} is not UTF-8 text: {where}; save it as UTF-8') from None


def input_text(path, urls, sha256, folder):
    """(text, what meta.json should say about its source): of a local file or, where path is None, downloaded into folder."""
    path = path or download(urls, folder / 'input.txt', sha256, 'Without a network, give a copy that you have: '
                            f'python prepare/{Path(sys.argv[0]).name} --input=FILE, or train on the default: python train.py')
    text = read_text(path)
    if len(text) < 20:
        raise UserError(f'{path} has only {len(text)} characters: that is too little to train on')
    return text, {'source': str(path), 'sha256': sha256_of(path)}


def dataset_folder(data_dir, name):
    """data_dir/NAME; data_dir None: beside the scripts."""
    return short_path(Path(data_dir or ROOT / 'data') / name)


def id_type(tokenizer):
    """How the tokenizer's ids are written: nanoGPT's format."""
    return np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')


def clear(folder):
    """Make a dataset's folder and claim it (see lock), without meta.json: it is no dataset until the new one is whole."""
    make_folder(folder)
    claim = lock(folder, 'another process is preparing', '--data_dir=…')
    (folder / 'meta.json').unlink(missing_ok=True)
    return claim


def write_meta(folder, tokenizer, kind, counts, source, split, what='ids', **more):
    """Write meta.json, the last file of a dataset, and say what was made: its `counts` of ids, or its `what` in meta.json."""
    dtype = id_type(tokenizer).name
    meta = {'format': FORMAT, 'kind': kind, 'dtype': dtype, 'vocab_size': tokenizer.vocab_size,
            'tokenizer': tokenizer.to_dict(), 'counts': counts, **more, 'split': split, **source}
    text = json.dumps(meta, ensure_ascii=False, indent=1).encode('utf-8', 'surrogateescape')  # paths under LC_ALL=C
    atomic_write(folder / 'meta.json', lambda f: f.write(text))
    made = ' and '.join(f'{n:,} {name}' for name, n in meta.get(what, counts).items())
    print(f'{folder}: {made} {what}, {tokenizer.vocab_size:,} in the vocabulary ({meta["tokenizer"]["kind"]}, {dtype}'
          + (': more than 65,536 take 4 bytes an id)' if dtype == 'uint32' else ')'))


def write_stream(folder, tokenizer, train, val, source, split):
    """Write train.bin, val.bin and, when both are whole, meta.json; says what was made.

    train, val: arrays of ids. source: dict of what meta.json should say about where the text is from. split: how it was divided.
    """
    with clear(folder):
        for name, ids in (('train', train), ('val', val)):
            content = np.asarray(ids).astype(id_type(tokenizer)).tobytes()
            atomic_write(folder / f'{name}.bin', lambda f, content=content: f.write(content))
        write_meta(folder, tokenizer, 'stream', {'train': len(train), 'val': len(val)}, source, split)


def write_pairs(folder, tokenizer, splits, source, split, chat=None):
    """Write {split}.bin, {split}.idx and, when all are whole, meta.json; says what was made.

    splits: {name: [(source, target)]}, each side a text or a list of ids. A target that is text gets the tokenizer's end id,
    ids are taken as they are. source, split: as in write_stream. chat: how conversations are written (chat.py), if they are.
    """
    with clear(folder):
        counts = {name: write_pair_files(folder, tokenizer, name, pairs) for name, pairs in splits.items()}
        more = {'pairs': {name: len(pairs) for name, pairs in splits.items()}} | ({'chat': chat} if chat else {})
        write_meta(folder, tokenizer, 'pairs', counts, source, split, 'pairs', **more)


def write_pair_files(folder, tokenizer, name, pairs):
    """NAME.bin, the ids of all sources and targets, and NAME.idx, where each begins and the last ends. Returns how many ids."""
    from tqdm import tqdm
    dtype, starts = id_type(tokenizer), np.zeros(2 * len(pairs) + 1, dtype='<i8')

    def write(f):
        for first in tqdm(range(0, len(pairs), 1000), desc=f'{name}: thousand pairs', disable=None):
            sides = [side for pair in pairs[first:first + 1000] for side in pair]
            encoded = iter(tokenizer.encode_batch([side for side in sides if isinstance(side, str)]))
            for i, side in enumerate(sides, 2 * first):
                ids = np.asarray(next(encoded) if isinstance(side, str) else side).astype(dtype)
                ids = np.append(ids, dtype.type(tokenizer.eos_id)) if i % 2 and isinstance(side, str) else ids
                starts[i + 1] = starts[i] + len(ids)
                f.write(ids.tobytes())
    atomic_write(folder / f'{name}.bin', write)
    atomic_write(folder / f'{name}.idx', lambda f: f.write(starts.tobytes()))
    return int(starts[-1])


def read_blocks(path):
    """The text of a UTF-8 file in blocks of PIECE bytes; line ends become \\n, a byte order mark goes.

    Raises UserError with the file's name, and the place of a byte that is not text.
    """
    decoder, done, block = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder('utf-8-sig')(), translate=True), 0, b'-'
    try:
        with open(path, 'rb') as f:
            while block:
                block = f.read(PIECE)
                text = decoder.decode(block, final=not block)
                if '\0' in text:
                    raise UserError(f'{path} looks binary: byte 0x00 at position {done + block.find(0):,}; leave it out')
                done += len(block)
                yield text
    except UnicodeDecodeError as e:
        where = f'byte {e.object[e.start]:#04x} at position {done + len(block) - len(e.object) + e.start:,}'
        raise UserError(f'{path} is not UTF-8 text: {where}; save it as UTF-8, or leave it out') from None
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None


def read_lines(path):
    """The lines of a UTF-8 file, without their ends. Raises UserError as read_blocks() does."""
    rest = ''
    for block in read_blocks(path):
        *lines, rest = (rest + block).split('\n')
        yield from lines
    if rest:
        yield rest


def read_documents(path, separator=None):
    """Pieces of a text file: one document or, with a separator, as many as it separates; blank ones are left out.

    Where a space stands between two letters every tokenizer may be stopped and started again, and gives the same ids: long
    documents are cut there.
    """
    rest, inside = '', False  # what is read but not given yet, and whether a part of its document is
    for block in read_blocks(path):
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for text in whole:
            if inside or text.strip():
                yield text.strip('\n'), True
            inside = False
        rest = rest.lstrip('\n') if separator and not inside else rest
        while len(rest) > 2 * PIECE:
            cut = rest.rfind(' ', 0, PIECE)
            while cut > 0 and not (rest[cut - 1].isalpha() and rest[cut + 1].isalpha()):
                cut = rest.rfind(' ', 0, cut)
            cut = cut if cut > 0 else PIECE
            yield rest[:cut], False
            rest, inside = rest[cut:], True
    if inside or rest.strip():
        yield rest.strip('\n') if separator else rest, True


def hugging_face(endpoint, dataset):
    """The address of a dataset's files: endpoint is that of a mirror, or None."""
    return f'{endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"}/datasets/{dataset}/resolve/main/'


def size_of(path):
    """Bytes of a file. Raises UserError where it is not there."""
    try:
        return os.stat(path).st_size
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None


def train_texts(shards):
    """The first train texts of shards (see write_corpus), SAMPLE characters of them: what a tokenizer is trained on."""
    size = 0
    for split, text, _ in itertools.chain.from_iterable(shard() for shard in shards):
        if split == 'train':
            yield text[:SAMPLE - size]
            size += len(text)
        if size >= SAMPLE:
            return


def in_order(pool, function, items, ahead):
    """map() on a pool's threads that takes items only as they are needed: `ahead` of them are under way."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def chunks(pieces):
    """Lists of pieces that come to PIECE characters or a little more."""
    chunk, size = [], 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece[1])
        if size >= PIECE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def write_corpus(folder, tokenizer, shards, source, split, characters=None):
    """Tokenize into train.bin and val.bin and, when both are whole, write meta.json. Memory does not grow with the text.

    shards: functions that each give an iterator of (split, text, ends): pieces that say where they go, the same at every call.
    source, split: as in write_stream. characters: how many there are, where that is known. A call that was stopped goes on
    where it was if tokenizer, source and split are the same: source must tell one text from another.
    """
    from tqdm import tqdm
    claim, dtype, progress, start = clear(folder), id_type(tokenizer), folder / '.progress.json', time.monotonic()
    key = hashlib.sha256(json.dumps([tokenizer.to_dict(), source, split]).encode()).hexdigest()
    state = {'key': key, 'shard': 0, 'pieces': 0, 'characters': 0, 'counts': {'train': 0, 'val': 0}}
    parts = {name: folder / f'{name}.bin.part' for name in state['counts']}
    try:
        old = json.loads(progress.read_text(encoding='utf-8'))
        if old['key'] == key and all(parts[name].stat().st_size >= n * dtype.itemsize for name, n in old['counts'].items()):
            state |= {name: old[name] for name in state}
            print(f'going on after {sum(state["counts"].values()):,} ids that an earlier run has made')
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # there is none, or it is damaged
    new, seconds, before = 0, 1, sum(state['counts'].values())

    def encode(chunk):
        """A chunk's bytes for each file, its number of pieces and of characters."""
        made = {name: [] for name in parts}
        for name, text, ends in chunk:
            made[name].append(tokenizer.encode_to_numpy(text).astype(dtype).tobytes())
            if ends and tokenizer.eos_id is not None:
                made[name].append(dtype.type(tokenizer.eos_id).tobytes())
        return {name: b''.join(ids) for name, ids in made.items()}, len(chunk), sum(len(text) for _, text, _ in chunk)

    def save():
        """What was written up to here is not done again."""
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
        atomic_write(progress, lambda f: f.write(json.dumps(state).encode()))

    # Threads, not processes: they share one tokenizer, and the libraries work outside of Python's lock
    threads, due = min(os.cpu_count() or 1, 16), start + SAVE_EVERY
    bar = tqdm(total=characters, initial=state['characters'], unit='char', unit_scale=True, desc=folder.name, disable=None)
    try:
        with open(parts['train'], 'ab') as train, open(parts['val'], 'ab') as val, ThreadPoolExecutor(threads) as pool, bar:
            files = {'train': train, 'val': val}
            for name, f in files.items():
                f.truncate(state['counts'][name] * dtype.itemsize)
            for shard in shards[state['shard']:]:
                pieces = itertools.islice(shard(), state['pieces'], None)
                for made, number, size in in_order(pool, encode, chunks(pieces), 2 * threads):
                    for name, content in made.items():
                        files[name].write(content)
                        state['counts'][name] += len(content) // dtype.itemsize
                    state['pieces'] += number
                    state['characters'] += size
                    new, seconds = sum(state['counts'].values()) - before, time.monotonic() - start
                    bar.set_postfix_str(f'{new / seconds:,.0f} tok/s', refresh=False)
                    bar.update(size)
                    if time.monotonic() > due:
                        save()
                        due = time.monotonic() + SAVE_EVERY
                state['shard'], state['pieces'] = state['shard'] + 1, 0
                save()
        for name, part in parts.items():
            os.replace(part, folder / f'{name}.bin')
    except UnknownCharacters as e:
        raise UserError(f'{e}; --tokenizer=byte knows every character') from None
    except OSError as e:
        raise UserError(f'cannot write in {folder}: {e.strerror}; free some space, then the same command goes on') from None
    print(f'{new:,} ids in {seconds:.1f} s, {new / seconds:,.0f} tok/s')
    write_meta(folder, tokenizer, 'stream', state['counts'], source, split)
    progress.unlink()
    claim.close()
