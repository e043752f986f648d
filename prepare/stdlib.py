"""The source of the Python standard library that is running this: real text, megabytes of it, on every machine, with no download.

A byte a token, and an end-of-text token behind each file. Every fortieth file is val (a whole pass over it is then quick). Files are taken in the order of their names,
so the same Python gives the same corpus.
"""
import sys
import sysconfig
from pathlib import Path

import numpy as np
from common import UserError, dataset_folder, write_stream
from configurator import configure
from tokenizer import ByteTokenizer

data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
configure(__file__, globals())

# Left out: tests and packages that some systems don't install, generated tables, and what differs from build to build
SKIP = {'test', 'tests', 'idlelib', 'tkinter', 'turtledemo', 'lib2to3', 'ensurepip', 'encodings', 'pydoc_data', 'site-packages', 'dist-packages'}

folder = dataset_folder(data_dir, 'stdlib')
lib = Path(sysconfig.get_paths()['stdlib'])
files = sorted((p.relative_to(lib).as_posix(), p) for p in lib.rglob('*.py'))
files = [(name, p) for name, p in files if not SKIP & set(name.split('/')) and '-' not in name.split('/')[0] and not name.startswith('_sysconfigdata')]
tokenizer, splits, size = ByteTokenizer(), {'train': [], 'val': []}, 0
for i, (name, path) in enumerate(files):
    source = path.read_bytes().replace(b'\r\n', b'\n')
    size += len(source)
    splits['val' if i % 40 == 39 else 'train'] += [np.frombuffer(source, dtype=np.uint8).astype(np.uint16), np.array([tokenizer.specials['eot']], dtype=np.uint16)]
if size < 1_000_000:
    raise UserError(f'only {size:,} bytes of Python source in {lib}: this Python comes without its library\'s source; '
                    f'try python prepare/shakespeare_char.py instead')
print(f'{len(files)} files, {size:,} bytes of Python {sys.version.split()[0]}')
write_stream(folder, tokenizer, np.concatenate(splits['train']), np.concatenate(splits['val']),
             {'source': f'standard library of Python {sys.version.split()[0]}'}, 'every 40th file is val')
