"""
Write a trained model for others: as a folder that Hugging Face's transformers read as a GPT-2, or as a checkpoint that is small.

    python export.py --out_dir=out/RUN --to=FOLDER      a GPT, for Hugging Face's tools
    python export.py --out_dir=out/RUN --to=FILE.pt     any model: what sample.py needs, in bfloat16: a quarter of best.pt or less
"""
from pathlib import Path
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError
from pocket.files import ROOT, find_path, short_path

out_dir: str | None = None         # the run
to: str | None = None              # the folder to make, or the file
weights: Literal['best', 'last'] = 'best'  # which of the run's checkpoints
configure(__file__, globals())

if not out_dir or not to:
    raise UserError('name a run and a new folder or file: python export.py --out_dir=out/RUN --to=FOLDER')
import torch

from pocket import checkpoint
from pocket.files import make_folder
from pocket.pretrained import export_folder

path, target = short_path(find_path(out_dir)) / f'{weights}.pt', short_path(Path(to).expanduser())
state = checkpoint.load(path)
model, tok = checkpoint.build(state, path)
if target.suffix == '.pt':
    if target.exists():
        raise UserError(f'{target} is there already: name a new file with --to=, or remove it')
    make_folder(target.parent, '--to=…')
    slim = {key: value for key, value in state.items() if key not in ('optimizers', 'scaler')}
    slim['config'] = slim['config'] | {'out_dir': None, 'data_dir': None}  # paths that mean nothing elsewhere
    checkpoint.save(target, slim | {'model': model.to(torch.bfloat16).state_dict()})
    print(f'{target}: {target.stat().st_size / 1e6:.2f} MB, {path} has {path.stat().st_size / 1e6:.2f}')
    print(f'next: python {short_path(ROOT / "sample.py")} --out_dir={target.parent if target.name == "best.pt" else target}')
    raise SystemExit(0)
export_folder(model, tok, target)
kind = tok.to_dict()['kind']
print(f'{target}: {", ".join(sorted(p.name for p in target.iterdir()))}'
      + ('' if (target / 'tokenizer.json').is_file() else f'; no tokenizer.json, which can\'t describe a {kind} tokenizer'))
print(f'next: AutoModelForCausalLM.from_pretrained({str(target)!r})')
