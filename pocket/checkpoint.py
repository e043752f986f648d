"""
Checkpoints: one file that is enough by itself (weights, optimizer, step, scores, configuration, tokenizer).
Tensors and plain types only, so loading never executes anything: torch.load(weights_only=True).
"""
import math
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import template, tokenizer
from pocket.errors import UserError
from pocket.files import FORMAT, atomic_write

KINDS = {'gpt': (GPT, GPTConfig), 'seq2seq': (Seq2Seq, Seq2SeqConfig)}
NUMBERS = {'step': int, 'tokens': int, 'evaluated': int, 'bad_evals': int, 'loss_tokens': int, 'loss_sum': float,
           'grad_norm': float, 'seconds': float, 'best': float}  # how far a run is: what was only exported may lack them


def save(path, state):
    """Write a checkpoint; a format version is added. Raises UserError where it can't be written, the old file intact."""
    atomic_write(path, lambda f: torch.save({'format': FORMAT, **state}, f))


class Blank(TorchFunctionMode):
    """Modules built in its scope have weights that are shapes only, without memory or random numbers; small tables are as ever.

    Not `with torch.device('meta')`: there the first arithmetic and the first random number cost seconds, for imports.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__.endswith(('normal_', 'uniform_')):
            return None
        large = func is torch.empty or func is torch.arange and args[0] > 2**20  # the latter: of a vocabulary
        return func(*args, **(kwargs or {}) | ({'device': 'meta'} if large else {}))


def blank(Model, config):
    """A model whose weights are shapes only. Raises RuntimeError or TypeError where they are too large even for that."""
    with Blank():
        return Model(config)


def finite(t):
    """Whether all of a tensor's numbers are numbers."""
    return all(map(math.isfinite, t.float().aminmax()))


def check_weights(state, size):
    """Raise ValueError where a checkpoint's weights are not those of the model that it speaks of, before any is made.

    size: of the file; what is tied counts once. Few bytes can claim to be a large tensor, of numbers that are repeated.
    """
    Model, Config = KINDS[state['kind']]
    want, held = blank(Model, Config(**state['model_args'])).state_dict(keep_vars=True), {}
    if differ := [str(key)[:100] for key in want.keys() ^ state['model'].keys()]:
        raise ValueError(f'weights are missing or surplus: {", ".join(sorted(differ)[:3])}')
    for key, w in want.items():
        t, floats = state['model'][key], w.is_floating_point()
        if type(t) is not torch.Tensor or t.layout is not torch.strided or t.device.type != 'cpu' or t.shape != w.shape \
                or t.is_floating_point() != floats or not floats and t.dtype != w.dtype:
            raise ValueError(f'{key} must be {tuple(w.shape)} of {w.dtype}')
        held[id(w)] = t.nbytes
        if sum(held.values()) > size:
            raise ValueError('the file is smaller than its weights say they are')
        if floats and not finite(t):
            raise ValueError(f'{key} has values that are infinite or no numbers (NaN): take an earlier checkpoint')
        if not floats and not torch.equal(t.sort().values, torch.arange(len(t))):  # AdaptiveHead's
            raise ValueError(f'{key} must have each place once')


def check_optimizer(saved, optimizer):
    """Raise ValueError where saved, an optimizer's state from a file, has not what this optimizer keeps of its parameters."""
    adam, shapes = isinstance(optimizer, torch.optim.AdamW), [p.shape for g in optimizer.param_groups for p in g['params']]
    for i, kept in saved['state'].items():  # Muon keeps matrices of a shape together
        shape = shapes[i]
        want = {'step': (), 'exp_avg': shape, 'exp_avg_sq': shape} if adam else {'momentum': (shapes.count(shape), *shape)}
        if {key: t.shape for key, t in kept.items()} != want:
            raise ValueError('what the optimizer has kept of the steps before is damaged')


def load(path):
    """The checkpoint as a dict, its tensors on the CPU, those of a model that can be built. Raises UserError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}')
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as z:  # as torch.save writes it: nothing in it is larger than it is in the file
            if any(f.compress_type for f in z.infolist()) or sum(f.file_size for f in z.infolist()) > size:
                raise ValueError
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a file from a stranger: it can be anything
        why = 'it holds code, which is never loaded' if 'weights_only' in str(e) else 'it is cut short or something else'
        raise UserError(f'{path} is not a checkpoint of pocketGPT: {why}') from None
    if not isinstance(state, dict) or type(state.get('format')) is not int or not 1 <= state['format'] < 2**31:
        raise UserError(f'{path} is not a checkpoint of pocketGPT: parts are missing')
    if state['format'] > FORMAT:  # before all else: what follows may have changed
        raise UserError(f'{path} has format {state["format"]}, this version reads up to {FORMAT}: use a newer pocketGPT')
    parts = {'kind': str, 'model': dict, 'model_args': dict, 'config': dict, 'tokenizer': dict}
    wrong = [part for part, kind in parts.items() if not isinstance(state.get(part), kind)]
    wrong += [name for name, kind in NUMBERS.items() if type(value := state.get(name, kind())) is not kind
              or name != 'grad_norm' and not 0 <= value <= (math.inf if name == 'best' else 2**46)]
    if not wrong and state.get('step') != state.get('evaluated') and state.get('loss_tokens') == 0:
        wrong = ['loss_tokens']
    if wrong:
        raise UserError(f'{path} is not a checkpoint of pocketGPT: parts are missing or no such thing ({", ".join(wrong)})')
    if state['kind'] not in KINDS:
        raise UserError(f'{path} holds a {state["kind"]!r}, this version knows {", ".join(KINDS)}')
    if state['kind'] == 'seq2seq' and state.get('chat') is None:  # as older ones were
        state['chat'] = template.PLAIN_TEMPLATE
    try:
        check_weights(state, size)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'{path} does not fit together: {str(e).splitlines()[0]}') from None
    return state


def build(state, path, **overrides):
    """(model in eval mode, tokenizer) from a loaded checkpoint; overrides: fields of its config that do not change its shape."""
    Model, Config = KINDS[state['kind']]
    try:
        model = Model(Config(**{**state['model_args'], **overrides}))
        model.load_state_dict(state['model'])
        tok = tokenizer.tokenizer_from_dict(state['tokenizer'])
        if tok.vocab_size > model.config.vocab_size:
            raise ValueError(f'the tokenizer has {tok.vocab_size} ids, the model {model.config.vocab_size}')
        if state.get('chat') is not None:
            template.check(state['chat'], tok)
        return model.eval(), tok
    except UserError:  # an encoding that has to be downloaded, say
        raise
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'{path} does not fit together: {str(e).splitlines()[-1].strip()}') from None


def model_state(model, tok, config, chat=None):
    """The part of a checkpoint that sample.py needs. chat: the format of conversations (chat.py), None: it has none."""
    kind = next(kind for kind, (Model, _) in KINDS.items() if isinstance(model, Model))
    return {'kind': kind, 'model_args': asdict(model.config), 'model': model.state_dict(), 'tokenizer': tok.to_dict(),
            'config': config, 'chat': chat}
