"""
Checkpoints: one file that is enough by itself (weights, optimizer, step, scores, configuration, tokenizer).
Tensors and plain types only, so loading never executes anything: torch.load(weights_only=True).
"""
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

import tokenizer
from configurator import UserError
from files import FORMAT, write_whole
from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig

KINDS = {'gpt': (GPT, GPTConfig), 'seq2seq': (Seq2Seq, Seq2SeqConfig)}


def save(path, state):
    """Write a checkpoint; a format version is added. Raises UserError where it can't be written, the old file intact."""
    write_whole(path, lambda f: torch.save({'format': FORMAT, **state}, f))


def load(path):
    """The checkpoint as a dict, its tensors on the CPU. Raises UserError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a file from a stranger: it can be anything
        whole = zipfile.is_zipfile(path) and 'weights_only' in str(e)
        why = 'it holds code, which is never loaded' if whole else 'it is cut short or something else'
        raise UserError(f'{path} is not a checkpoint of pocketGPT: {why}') from None
    parts = {'format': int, 'kind': str, 'model': dict, 'model_args': dict, 'config': dict, 'tokenizer': dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(part), kind) for part, kind in parts.items()):
        raise UserError(f'{path} is not a checkpoint of pocketGPT: parts are missing')
    if state['format'] > FORMAT:
        raise UserError(f'{path} has format {state["format"]}, this version reads up to {FORMAT}: use a newer pocketGPT')
    return state


def build(state, path, **overrides):
    """(model in eval mode, tokenizer) from a loaded checkpoint; overrides: fields of its config that do not change its shape."""
    if state['kind'] not in KINDS:
        raise UserError(f'{path} holds a {state["kind"]!r}, this version knows {", ".join(KINDS)}')
    Model, Config = KINDS[state['kind']]
    try:
        model = Model(Config(**{**state['model_args'], **overrides}))
        model.load_state_dict(state['model'])
        return model.eval(), tokenizer.from_dict(state['tokenizer'])
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise UserError(f'{path} does not fit together: {str(e).splitlines()[-1].strip()}') from None


def model_state(model, tok, config, chat=None):
    """The part of a checkpoint that sample.py needs. chat: the format of conversations (chat.py), None: it has none."""
    kind = next(kind for kind, (Model, _) in KINDS.items() if isinstance(model, Model))
    return {'kind': kind, 'model_args': asdict(model.config), 'model': model.state_dict(), 'tokenizer': tok.to_dict(),
            'config': config, 'chat': chat}
