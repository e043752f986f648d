"""
Write a trained GPT as a folder that Hugging Face's transformers, and what builds on it, read as a GPT-2.

    python export.py --out_dir=out/RUN --to=FOLDER
"""
import shutil
from pathlib import Path
from typing import Literal

from configurator import UserError, configure, find, nearby

out_dir: str | None = None         # the run
to: str | None = None              # the folder to make
weights: Literal['best', 'last'] = 'best'  # which of the run's checkpoints
configure(__file__, globals())

if not out_dir or not to:
    raise UserError('name a run and a new folder: python export.py --out_dir=out/RUN --to=FOLDER')
import checkpoint
from gpt2 import export

path, folder = nearby(find(out_dir)) / f'{weights}.pt', Path(to).expanduser().resolve()
if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f'{folder} is there already: name a new folder, or remove it')
model, tok = checkpoint.build(checkpoint.load(path), path)
unfinished = folder.with_name(f'.{folder.name}.export.tmp')  # the folder is whole or not there
shutil.rmtree(unfinished, ignore_errors=True)
try:
    export(model, tok, unfinished)
    if folder.is_dir():
        folder.rmdir()
    unfinished.rename(folder)
finally:
    shutil.rmtree(unfinished, ignore_errors=True)
kind = tok.to_dict()['kind']
print(f'{folder}: {", ".join(sorted(p.name for p in folder.iterdir()))}'
      + ('' if (folder / 'tokenizer.json').is_file() else f'; no tokenizer.json, which can\'t describe a {kind} tokenizer'))
print(f'next: AutoModelForCausalLM.from_pretrained({str(folder)!r})')
