"""
Export a trained model, for other tools or as a small checkpoint.

    python -m pocket.export --out_dir=out/RUN --to=FOLDER     a model that transformers loads, in
                                                              Hugging Face's format
    python -m pocket.export --out_dir=out/RUN --to=FILE.gguf  one that llama.cpp and ollama run
    python -m pocket.export --out_dir=out/RUN --to=FILE.pt    any model, for sample.py: in bfloat16
                                                              and without the optimizer, a quarter
                                                              of best.pt or less
    python -m pocket.export --out_dir=out/RUN --to=FILE.html  one page that runs the model by itself
                                                              in any browser: docs/page.md

The first two are for models that are made of nothing that GPT-2, Llama, Qwen2 or Qwen3 lack, such
as that of config/llama_small.py.
"""
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError
from pocket.files import ROOT, find_path, make_folder, short_path

out_dir: str | None = None  # the run
to: str | None = None  # the folder to make, or the file
weights: Literal['best', 'last'] = 'best'  # which of the run's checkpoints
gguf_type: Literal['f32', 'f16', 'q8_0'] = 'f16'  # of the weights in a .gguf file
html_weights: Literal['int8', 'float32'] = 'int8'  # of the weights in a .html file
configure(__file__, globals())

if not out_dir or not to:
    raise UserError('name a run and a new folder or file: '
                    'python -m pocket.export --out_dir=out/RUN --to=FOLDER')

import torch

from pocket import checkpoint
from pocket.template import template_from_dict

# Each kind of export writes a target, and returns what to print: what it has made, what comes next


def export_checkpoint(state, model, tok, template, target):
    """Write what sample.py needs of a checkpoint, with weights in bfloat16. Raises UserError."""
    if target.exists():
        raise UserError(f'{target} is there already: name a new file with --to=, or remove it')
    small = {}
    for key, value in state.items():
        if key not in ('optimizers', 'scaler'):
            small[key] = value
    small['model'] = model.to(torch.bfloat16).state_dict()
    small['config'] = small['config'] | {'out_dir': None, 'data_dir': None}  # paths of this machine
    make_folder(target.parent, '--to=…')
    checkpoint.save(target, small)
    # sample.py finds a best.pt by its folder
    run = target.parent if target.name == 'best.pt' else target
    return (f'{megabytes(target)}, {source} has {megabytes(source)}',
            f'python {short_path(ROOT / "sample.py")} --out_dir={run}')


def export_gguf(state, model, tok, template, target):
    """Write a .gguf file. Raises UserError."""
    from pocket import gguf_export
    gguf_export.export_gguf(model, tok, target, template, gguf_type)
    return f'{megabytes(target)}', f'llama-cli -m {target}'


def export_html(state, model, tok, template, target):
    """Write a page that runs the model. Raises UserError."""
    from pocket import page
    if target.exists():
        raise UserError(f'{target} is there already: name a new file with --to=, or remove it')
    page.export_page(model, tok, template, target, html_weights,
                     settings=checkpoint.sampling_of(state))
    return f'{megabytes(target)}', 'open it in a browser'


def export_folder(state, model, tok, template, target):
    """Write a folder in Hugging Face's format. Raises UserError."""
    from pocket import pretrained
    pretrained.export_folder(model, tok, target, template)
    written = ', '.join(sorted(path.name for path in target.iterdir()))
    if not (target / 'tokenizer.json').is_file():
        kind = tok.to_dict()['kind']
        written += f'; no tokenizer.json, which can\'t describe a {kind} tokenizer'
    return written, f'AutoModelForCausalLM.from_pretrained({str(target)!r})'


EXPORTS = {  # by the suffix of --to
    '.pt': export_checkpoint,
    '.gguf': export_gguf,
    '.html': export_html,
}


def megabytes(file):
    """The size of a file as text."""
    return f'{file.stat().st_size / 1e6:.2f} MB'


source = short_path(find_path(out_dir)) / f'{weights}.pt'
target = short_path(to)
state = checkpoint.load(source, mapped=True)
model, tok = checkpoint.build(state, source)
template = None if state.get('chat') is None else template_from_dict(state['chat'])
export = EXPORTS.get(target.suffix.lower(), export_folder)
made, next_step = export(state, model, tok, template, target)
print(f'{target}: {made}')
print(f'next: {next_step}')
