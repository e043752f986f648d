"""
Export a trained model: as a folder for Hugging Face's tools, or as a small checkpoint.

    python -m pocket.export --out_dir=out/RUN --to=FOLDER    a GPT-2 that transformers loads
    python -m pocket.export --out_dir=out/RUN --to=FILE.pt   any model, for sample.py: in bfloat16
                                                             and without the optimizer, a quarter of
                                                             best.pt or less
"""
from pathlib import Path
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError
from pocket.files import ROOT, find_path, make_folder, short_path

out_dir: str | None = None  # the run
to: str | None = None  # the folder to make, or the file
weights: Literal['best', 'last'] = 'best'  # which of the run's checkpoints
configure(__file__, globals())

if not out_dir or not to:
    raise UserError('name a run and a new folder or file: '
                    'python -m pocket.export --out_dir=out/RUN --to=FOLDER')

import torch

from pocket import checkpoint
from pocket.pretrained import export_folder


def export_checkpoint(state, model, file):
    """Write what sample.py needs of a checkpoint, with weights in bfloat16. Raises UserError."""
    if file.exists():
        raise UserError(f'{file} is there already: name a new file with --to=, or remove it')
    small = {}
    for key, value in state.items():
        if key not in ('optimizers', 'scaler'):
            small[key] = value
    small['model'] = model.to(torch.bfloat16).state_dict()
    small['config'] = small['config'] | {'out_dir': None, 'data_dir': None}  # paths of this machine
    make_folder(file.parent, '--to=…')
    checkpoint.save(file, small)


def megabytes(file):
    """The size of a file as text."""
    return f'{file.stat().st_size / 1e6:.2f} MB'


source = short_path(find_path(out_dir)) / f'{weights}.pt'
target = short_path(Path(to).expanduser())
state = checkpoint.load(source)
model, tok = checkpoint.build(state, source)

if target.suffix == '.pt':
    export_checkpoint(state, model, target)
    print(f'{target}: {megabytes(target)}, {source} has {megabytes(source)}')
    # sample.py finds a best.pt by its folder
    run = target.parent if target.name == 'best.pt' else target
    print(f'next: python {short_path(ROOT / "sample.py")} --out_dir={run}')
else:
    export_folder(model, tok, target)
    written = ', '.join(sorted(path.name for path in target.iterdir()))
    if not (target / 'tokenizer.json').is_file():
        kind = tok.to_dict()['kind']
        written += f'; no tokenizer.json, which can\'t describe a {kind} tokenizer'
    print(f'{target}: {written}')
    print(f'next: AutoModelForCausalLM.from_pretrained({str(target)!r})')
