"""
How much memory training takes, and what for. train.py prints it before it starts; this prints a table for GPT-2's shapes.

    python memory.py                                              on a GPU, with micro-batches of 4 x 1,024 tokens
    python memory.py --batch_size=1 --block_size=512 --device=cpu --measure=124M     and what a real step takes, on this machine
"""
from typing import Literal

from configurator import UserError, configure

batch_size = 4                     # rows of a micro-batch; how many of them make a step does not matter
block_size = 1024                  # tokens in a row
optimizer: Literal['adamw', 'muon'] = 'adamw'  # adamw keeps two numbers a parameter, muon one for each in a matrix
processes = 1                      # of torchrun: with more than one, gradients also lie in the buffers that are exchanged
dtype: Literal['bfloat16', 'float32'] = 'bfloat16'  # of matrix products
device: Literal['cuda', 'cpu', 'mps'] = 'cuda'  # the table is for this
measure: tuple[str, ...] = ()      # shapes of which a real step is taken here (124M, 350M, 774M, 1.5B); may be given several times
worker = ''                        # for this script's own use: the shape that this process measures
if __name__ == '__main__':
    configure(__file__, globals())

import subprocess
import sys

import torch

from device import DTYPES, autocast, peak_memory, pick_device
from head import MAX_LOGITS
from model import GPT, GPTConfig
from muon import Muon

SHAPES = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600)}  # layers, heads, width


def estimate(c, others, matrices, tokens, precision, device, world=1):
    """{what for: bytes} of training a model of config c: an estimate, good to about a third.

    others, matrices: how many parameters AdamW has, and how many Muon. tokens: of a micro-batch. device: cpu, cuda or mps.
    Parameters are float32; where products run in 16 bits, there is a copy for them. An activation is what the backward pass
    needs again: of attention its norm's input and output, q, k, v, result and projection, of the MLP the norm's and both sides
    of the nonlinearity, which swiglu has twice. One layer more is at work. Checkpointing keeps only what enters each layer.
    """
    n, e, C, T = others + matrices, 4 if precision == torch.float32 else 2, c.n_embd, c.block_size
    scores = c.n_head * T if device == 'cpu' and T <= 1024 else 0  # attend() holds them there
    layer = e * (10 * C + (4 if c.act == 'swiglu' else 2) * (c.n_inner or 4 * C) + scores)
    return {
        'parameters': n * (4 if e == 4 else 4 + e),
        'gradients': n * 4 * (1 if world == 1 else 2),
        'optimizer': others * 8 + matrices * 4,
        'activations': tokens * (layer + c.n_layer * (e * C if c.gradient_checkpointing else layer)),
        'head': min(tokens * c.vocab_size, MAX_LOGITS) * (8 + e) + (c.vocab_size * (4 + e) + 2 * e * tokens) * C,
        'PyTorch': 3e8 if device == 'cpu' else 0,  # a GPU's own share of it counts in no allocator
    }


def in_words(parts):
    """An estimate in a few words, its parts where it is large."""
    whole = sum(parts.values())
    named = ', '.join(f'{name} {size / 1e9:.1f}' for name, size in parts.items() if size >= 5e7)
    return f'about {whole / 1e9:.1f} GB of memory' + (f' ({named})' if whole >= 1e9 else '')


def take_steps(name, checkpointed):
    """Bytes that training such a GPT-2 takes at the most, by two real steps with two micro-batches each."""
    where, precision = pick_device(device), DTYPES[dtype]
    model = GPT(config_of(name, checkpointed)).to(where)
    matrices, others = share_out(model)
    optimizers = [torch.optim.AdamW(others, fused=True)] + ([Muon(matrices)] if matrices else [])
    idx, targets = torch.randint(50257, (2, batch_size, block_size), device=where)
    for _ in range(2):
        for _ in range(2):
            with autocast(where, precision):
                loss = model(idx, targets)[1]
            loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
    return peak_memory(where)


def config_of(name, checkpointed=False):
    """GPTConfig of a shape."""
    n_layer, n_head, n_embd = SHAPES[name]
    return GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, gradient_checkpointing=checkpointed)


def share_out(model):
    """(parameters for Muon, parameters for AdamW), as in train.py."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and '.h.' in name] if optimizer == 'muon' else []
    return matrices, [p for p in model.parameters() if all(p is not m for m in matrices)]


def main():
    """The table, in Markdown."""
    if wrong := [name for name in measure if name not in SHAPES] or batch_size < 1 or block_size < 1 or processes < 1:
        raise UserError(f'measure must be one of {", ".join(SHAPES)}, batch_size, block_size and processes at least 1, '
                        f'got {wrong if wrong is not True else (batch_size, block_size, processes)}')
    parts = ('parameters', 'gradients', 'optimizer', 'head', 'activations')
    print(f'GB for micro-batches of {batch_size} x {block_size:,} tokens, {dtype} products, {optimizer}, on {device}\n')
    columns = ['shape', 'parameters, M', *parts, 'in all', 'activations checkpointed', 'in all'] + ['measured', '… checkpointed'] * bool(measure)
    print('|'.join(['', *columns, '']) + '\n' + '|---' * len(columns) + '|')
    for name in SHAPES:
        with torch.device('meta'):
            model = GPT(config_of(name))
        matrices, others = (sum(p.numel() for p in group) for group in share_out(model))
        plain, checkpointed = (estimate(config_of(name, c), others, matrices, batch_size * block_size, DTYPES[dtype], device, processes)
                               for c in (False, True))
        sizes = [*(plain[part] for part in parts), sum(plain.values()), checkpointed['activations'], sum(checkpointed.values())]
        if name in measure:
            for c in ('', ' checkpointed'):
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f'--worker={name}{c}'], stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise UserError(f'the process that measures {name} failed: see above')
                sizes.append(int(done.stdout))
        print('|'.join(['', name, f'{(matrices + others) / 1e6:,.1f}', *(f'{size / 1e9:.1f}' for size in sizes),
                        *([''] * (2 if measure and name not in measure else 0)), '']), flush=True)


if __name__ == '__main__' and worker:
    print(take_steps(worker.split()[0], 'checkpointed' in worker))
elif __name__ == '__main__':
    main()
