"""
The source of the Python standard library that runs this script: megabytes of real text on every
machine, without a download.

One token per byte, and an end-of-text token after each file. Every 40th file is val, so a whole
pass over val is quick. Files are taken in the order of their names: the same Python gives the same
dataset.
"""
import sys
import sysconfig
from pathlib import Path

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure

data_dir: str | None = None  # where datasets live (None: data/ beside train.py)
configure(__file__, globals())

import numpy as np

from pocket.datasets import dataset_folder, write_stream
from pocket.errors import UserError
from pocket.tokenizer import make_tokenizer

# Left out: what some systems do not install, generated tables, files that differ between builds
SKIP = {'test', 'tests', 'idlelib', 'tkinter', 'turtledemo', 'lib2to3', 'ensurepip', 'encodings',
        'pydoc_data', 'site-packages', 'dist-packages', 'sitecustomize.py', 'usercustomize.py'}
SKIP_PREFIXES = ('config-', '_sysconfigdata')


def find_sources(library):
    """The .py files of the standard library, in the order of their names."""
    named = [(path.relative_to(library).as_posix(), path) for path in library.rglob('*.py')]
    sources = []
    for name, path in sorted(named):
        skipped = SKIP.intersection(name.split('/')) or name.startswith(SKIP_PREFIXES)
        if path.is_file() and not skipped:
            sources.append(path)
    return sources


# Read the files: bytes are ids already, so there is nothing to encode
tokenizer = make_tokenizer('byte')
library = Path(sysconfig.get_paths()['stdlib'])
paths = find_sources(library)
size = 0
train = []
val = []
for number, path in enumerate(paths):
    content = path.read_bytes().replace(b'\r\n', b'\n')
    size += len(content)
    ids = np.frombuffer(content, dtype=np.uint8).astype(np.uint16)
    document = np.append(ids, np.uint16(tokenizer.eos_id))
    if number % 40 == 39:
        val.append(document)
    else:
        train.append(document)

version = sys.version.split()[0]
if size < 1_000_000:
    raise UserError(f'only {size:,} bytes of Python source in {library}: this Python comes without '
                    "its library's source; try python prepare/shakespeare_char.py instead")
print(f'{len(paths)} files, {size:,} bytes of Python {version}')

# Write the dataset
folder = dataset_folder(data_dir, 'stdlib')
source = {'source': f'standard library of Python {version}'}
write_stream(folder, tokenizer, np.concatenate(train), np.concatenate(val), source,
             'every 40th file is val')
