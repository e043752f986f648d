"""What the scripts in this folder share: downloading, and writing a dataset. They import it before anything of the project's."""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import ROOT, UserError, nearby
from files import FORMAT, download, lock, make_folder, sha256_of, write_whole

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
    return nearby(Path(data_dir or ROOT / 'data') / name)


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
    write_whole(folder / 'meta.json', lambda f: f.write(text))
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
            write_whole(folder / f'{name}.bin', lambda f, content=content: f.write(content))
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
                ids = np.append(ids, dtype.type(tokenizer.end)) if i % 2 and isinstance(side, str) else ids
                starts[i + 1] = starts[i] + len(ids)
                f.write(ids.tobytes())
    write_whole(folder / f'{name}.bin', write)
    write_whole(folder / f'{name}.idx', lambda f: f.write(starts.tobytes()))
    return int(starts[-1])
