"""
How fast this machine trains, and beside a peer: the same model, batch and number of threads, in processes of their own, in turns.

    python bench.py
    python bench.py --nanogpt=FOLDER      FOLDER holds a clone of github.com/karpathy/nanoGPT

Prints a table (medians, with minimum and maximum over the rounds) and one line of JSON last.
"""
from typing import Literal

from configurator import UserError, configure

nanogpt: str | None = None         # a clone of nanoGPT to run beside us
rounds = 3                         # processes of each, in turns: A B A B …
seconds = 8.0                      # of timed steps in each process
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of our products; nanoGPT runs a CPU in float32
worker: Literal['', 'ours', 'nanogpt'] = ''  # for this script's own use: what a process of a round times
shape = ''                         # only the work of this name
config, _ = configure(__file__, globals())

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from device import autocast, pick_device, pick_dtype
from model import GPT, GPTConfig

# nanoGPT's two published configurations: batch, and the fields of both projects' GPTConfig
WORK = {
    'cpu example, 0.8 M': (12, dict(block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0)),
    'shakespeare_char, 10.7 M': (64, dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.0)),
    'the same, dropout 0.2': (64, dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2)),
}


def time_training(who, name):
    """Tokens a second of training steps (forward, backward, clipping, AdamW) on random ids: the median of `seconds` of them."""
    torch.manual_seed(0)
    B, args = WORK[name]
    T, where = args['block_size'], pick_device(device)
    if who == 'nanogpt':
        sys.path.insert(0, nanogpt)
        for module in ('model', 'configurator'):
            sys.modules.pop(module)
        import model as peer
        net = peer.GPT(peer.GPTConfig(vocab_size=65, bias=False, **args))
        precision = torch.float32 if where.type == 'cpu' else torch.bfloat16  # what its train.py does
    else:
        net = GPT(GPTConfig(vocab_size=65, bias=False, act='gelu_erf', attn_dropout=args['dropout'], **args))
        precision = pick_dtype(where, dtype)[0]
    net, times, end = net.to(where).train(), [], None
    fused = who == 'ours' or where.type == 'cuda'  # nanoGPT fuses on CUDA only
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)
    while end is None or time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        idx, targets = torch.randint(65, (2, B, T)).to(where)
        with autocast(where, precision):
            loss = net(idx, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - start)
        if end is None and len(times) == 2:  # warm-up
            end, times = time.perf_counter() + seconds, []
    return B * T / median(times)


def matmul_ceiling(where, precision, n=2048):
    """FLOP/s of a square matrix product: the best of ten, the most that training could use."""
    a, b = torch.randn(2, n, n, device=where, dtype=precision)
    best = float('inf')
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


if nanogpt and not (Path(nanogpt) / 'model.py').is_file():
    raise UserError(f'--nanogpt={nanogpt} holds no model.py: name the folder of a clone of nanoGPT')
if rounds < 1:
    raise UserError(f'rounds must be at least 1, got {rounds}')
if worker:
    print(json.dumps(time_training(worker, shape)))
    raise SystemExit(0)
if shape and shape not in WORK:
    raise UserError(f'shape must be one of {", ".join(WORK)}, got {shape!r}')
where = pick_device(device)
precision = pick_dtype(where, dtype)[0]
ceilings = {str(p).removeprefix('torch.'): matmul_ceiling(where, p) for p in {torch.float32, precision}}
print(f'{where}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products: '
      + ', '.join(f'{v / 1e9:,.0f} GFLOP/s in {k}' for k, v in ceilings.items()))
print(f'{"training, tokens/s":28} {"ours (min - max)":>28} {"of the ceiling":>15} {"nanoGPT (min - max)":>28} {"ratio":>6}')
result = {'torch': torch.__version__, 'device': str(where), 'threads': torch.get_num_threads(), 'flops': ceilings, 'training': {}}
for name in [shape] if shape else WORK:
    got = {'ours': []} | ({'nanogpt': []} if nanogpt else {})
    for _ in range(rounds):
        for who in got:
            command = [sys.executable, __file__, *sys.argv[1:], f'--worker={who}', f'--shape={name}']
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f'the {who} process of {name!r} failed: see above')
            got[who].append(json.loads(done.stdout.splitlines()[-1]))
    _, args = WORK[name]
    C, L, T = args['n_embd'], args['n_layer'], args['block_size']
    flops = 6 * (12 * L * C * C + 65 * C) + 6 * L * T * C  # a token, forward and back: weights, the causal half of attention
    share = median(got['ours']) * flops / ceilings[str(precision).removeprefix('torch.')]
    text = {who: f'{median(v):,.0f} ({min(v):,.0f} - {max(v):,.0f})' for who, v in got.items()}
    ratio = median(got['ours']) / median(got['nanogpt']) if nanogpt else None
    shown = f'{ratio:.2f}' if ratio else '-'
    print(f'{name:28} {text["ours"]:>28} {share:>15.0%} {text.get("nanogpt", "-"):>28} {shown:>6}', flush=True)
    result['training'][name] = {**got, 'share_of_ceiling': round(share, 3), 'ratio': ratio}
print(json.dumps(result))
