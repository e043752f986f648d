"""
How much memory training takes, and what for. train.py says it before it starts; this prints a table for GPT-2's shapes.

    python memory.py                                                              on a GPU, micro-batches of 4 x 1,024 tokens
    python memory.py --device=cpu --batch_size=1 --block_size=512 --measure=124M  and what real steps take, on this machine
"""
from typing import Literal

from pocket.configurator import configure
from pocket.errors import UserError

batch_size = 4                     # rows of a micro-batch; how many of these make a step costs nothing
block_size = 1024                  # tokens in a row
dtype: Literal['bfloat16', 'float16', 'float32'] = 'bfloat16'  # of matrix products
device: Literal['cuda', 'mps', 'cpu'] = 'cuda'  # the table is for such a machine
measure: tuple[str, ...] = ()      # 124M, 350M, 774M or 1.5B: take real steps here; may be given several times
worker = ''                        # for this script's own use: what this process measures
if __name__ == '__main__':
    configure(__file__, globals())

import subprocess
import sys

import torch

from model import GPT, GPTConfig
from pocket.device import DTYPES, autocast, peak_memory, pick_device
from pocket.kernels import MAX_LOGITS


def estimate(c, others, matrices, tokens, precision, device, world=1):
    """{what for: bytes} of training a model of config c: an estimate, good to about a third.

    others, matrices: how many parameters AdamW has, and Muon. tokens: of a micro-batch. device: cpu, cuda or mps.
    """
    n, e, C = others + matrices, 4 if precision == torch.float32 else 2, c.n_embd
    # What a layer keeps of a token for the backward pass: norms, q, k, v and result of attention are ten times its width, both
    # sides of the nonlinearity are twice that of the MLP; and on a CPU attend() holds the scores of each head, of long rows half
    scores = c.n_head * min(c.block_size, c.block_size // 2 + 128) if device == 'cpu' and c.block_size <= 1024 else 0
    layer = e * (10 * C + (4 if c.act == 'swiglu' else 2) * (c.n_inner or 4 * C) + scores)
    logits = min(tokens * c.vocab_size, MAX_LOGITS) * (e if device == 'cpu' else 2 + e)
    kept = e * C if c.gradient_checkpointing else layer  # checkpointing: only what enters the layer
    return {
        'parameters': n * (4 if e == 4 else 4 + e),             # in float32, and a copy for products in 16 bits
        'gradients': n * (4 if world == 1 else 8),              # and what DistributedDataParallel exchanges
        'optimizer': others * 8 + matrices * 4,                 # two moments of AdamW, one of Muon
        'activations': tokens * (c.n_layer * kept + layer),     # one layer is at work
        'head': logits + (c.vocab_size * (4 + e) + tokens * 2 * e) * C,
        'PyTorch': 5e8 if device == 'cpu' else 0,               # its share of a GPU is in no allocator's figure
    }


def in_words(parts):
    """An estimate in a few words; where it is large, with its parts."""
    whole, named = sum(parts.values()), ', '.join(f'{name} {size / 1e9:.1f}' for name, size in parts.items() if size >= 5e7)
    return f'about {whole / 1e9:.1f} GB of memory' + f' ({named})' * (whole >= 1e9)


def shape(name, checkpointed=False):
    """GPTConfig of one of GPT-2's models."""
    sizes = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600)}
    return GPTConfig(block_size, 50257, *sizes[name], gradient_checkpointing=bool(checkpointed))


def take_steps(c):
    """Bytes that training such a GPT takes at the most: two steps of two micro-batches, with AdamW."""
    where, model = pick_device(device), GPT(c)
    optimizer = torch.optim.AdamW(model.to(where).parameters(), fused=True)
    idx, targets = torch.randint(c.vocab_size, (2, batch_size, block_size), device=where)
    for micro in range(4):
        with autocast(where, DTYPES[dtype]):
            loss = model(idx, targets)[1]
        loss.backward()
        if micro % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return peak_memory(where)


def table():
    """Print the table, in Markdown."""
    names = ('124M', '350M', '774M', '1.5B')
    if not set(measure) <= set(names) or min(batch_size, block_size) < 1:
        raise UserError(f'measure must be of {", ".join(names)}, batch_size and block_size at least 1, '
                        f'got {", ".join(measure) or None}, {batch_size} and {block_size}')
    parts = ('parameters', 'gradients', 'optimizer', 'head', 'activations')
    head = ['millions', *parts, '**in all**', 'checkpointed', '**in all**'] + ['measured', '… checkpointed'] * bool(measure)
    print(f'GB, micro-batches of {batch_size} x {block_size:,} tokens, products in {dtype}, AdamW, {device}\n\n'
          f'| {" | ".join(head)} |\n{"|---" * len(head)}|')
    for name in names:
        with torch.device('meta'):
            n = GPT(shape(name)).num_params()
        plain, less = (estimate(shape(name, c), n, 0, batch_size * block_size, DTYPES[dtype], device) for c in (0, 1))
        sizes = [*(plain[part] for part in parts), sum(plain.values()), less['activations'], sum(less.values())]
        for c in ('', ' checkpointed') if name in measure else ():
            argv = [sys.executable, __file__, *sys.argv[1:], f'--worker={name}{c}']  # a process of its own: its peak is its own
            sizes.append(int(subprocess.check_output(argv)))
        print(f'| {n / 1e6:,.1f} | ' + ' | '.join(f'{size / 1e9:.1f}' for size in sizes) + ' |', flush=True)


if __name__ == '__main__' and worker:
    print(take_steps(shape(*worker.split())))
elif __name__ == '__main__':
    table()
