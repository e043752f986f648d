"""What the scripts in this folder share: downloading, and writing a dataset. They import it before anything of the project's."""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import ROOT, UserError, nearby
from files import FORMAT, download, make_folder, sha256_of, write_whole

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
    path = path or download(urls, folder / 'input.txt', sha256, 'Without a network, give a local copy with --input=FILE, '
                            'or train on the default dataset: python train.py')
    text = read_text(path)
    if len(text) < 20:
        raise UserError(f'{path} has only {len(text)} characters: that is too little to train on')
    return text, {'source': str(path), 'sha256': sha256_of(path)}


def dataset_folder(data_dir, name):
    """data_dir/NAME; data_dir None: beside the scripts."""
    return nearby(Path(data_dir or ROOT / 'data') / name)


def write_stream(folder, tokenizer, train, val, source, split):
    """Write train.bin, val.bin and, when both are whole, meta.json; says what was made.

    train, val: arrays of ids. source: dict of what meta.json should say about where the text is from. split: how it was divided.
    """
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')
    meta = {'format': FORMAT, 'kind': 'stream', 'dtype': dtype.name, 'vocab_size': tokenizer.vocab_size,
            'tokenizer': tokenizer.to_dict(), 'counts': {'train': len(train), 'val': len(val)}, 'split': split, **source}
    make_folder(folder)
    (folder / 'meta.json').unlink(missing_ok=True)  # a dataset without it does not count as there
    for name, ids in (('train', train), ('val', val)):
        content = np.asarray(ids).astype(dtype).tobytes()
        write_whole(folder / f'{name}.bin', lambda f, content=content: f.write(content))
    write_whole(folder / 'meta.json', lambda f: f.write(json.dumps(meta, ensure_ascii=False, indent=1).encode('utf-8')))
    print(f'{folder}: {len(train):,} train and {len(val):,} val ids, '
          f'{tokenizer.vocab_size:,} in the vocabulary ({meta["tokenizer"]["kind"]}, {dtype.name})')
