"""The source of the Python standard library that is running this: real text, megabytes of it, on every machine, no download.

A byte a token, and an end-of-text token behind each file. Every fortieth file is val, so a whole pass over it is quick. Files
are taken in the order of their names: the same Python gives the same corpus.
"""
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that pocket/ is found from any working directory

from pocket.configurator import configure
from pocket.datasets import dataset_folder, write_stream
from pocket.errors import UserError
from pocket.tokenizer import ByteTokenizer

data_dir: str | None = None  # where datasets live (None: data/ beside the scripts)
configure(__file__, globals())

# Left out: what some systems don't install, generated tables, and files that differ from build to build
SKIP = {'test', 'tests', 'idlelib', 'tkinter', 'turtledemo', 'lib2to3', 'ensurepip', 'encodings', 'pydoc_data',
        'site-packages', 'dist-packages', 'sitecustomize.py', 'usercustomize.py'}

folder = dataset_folder(data_dir, 'stdlib')
lib, tokenizer = Path(sysconfig.get_paths()['stdlib']), ByteTokenizer()
eot = np.array([tokenizer.special_tokens['eot']], dtype=np.uint16)
train, val, files, size = [], [], 0, 0
for name, path in sorted((p.relative_to(lib).as_posix(), p) for p in lib.rglob('*.py')):
    if SKIP & set(name.split('/')) or name.startswith(('config-', '_sysconfigdata')) or not path.is_file():
        continue
    source = path.read_bytes().replace(b'\r\n', b'\n')
    (val if files % 40 == 39 else train).extend([np.frombuffer(source, dtype=np.uint8).astype(np.uint16), eot])
    files, size = files + 1, size + len(source)
if size < 1_000_000:
    raise UserError(f'only {size:,} bytes of Python source in {lib}: this Python comes without its library\'s source; '
                    f'try python prepare/shakespeare_char.py instead')
print(f'{files} files, {size:,} bytes of Python {sys.version.split()[0]}')
write_stream(folder, tokenizer, np.concatenate(train), np.concatenate(val),
             {'source': f'standard library of Python {sys.version.split()[0]}'}, 'every 40th file is val')
