"""
How fast this machine trains and writes, beside peers: the same work, in processes of their own, in turns.

    python bench.py                       ours, and the peers that need nothing installed
    python bench.py --nanogpt=FOLDER      FOLDER holds a clone of github.com/karpathy/nanoGPT
    python bench.py --work=decode         only the rows whose name holds this

Peers: nanoGPT; transformers, where it is installed; `uncached`, our own models without a cache; and `padded`, PyTorch's
nn.Transformer in float32 on pairs padded to 256 + 127, the way small encoder-decoder projects train. Prints medians, with minimum
and maximum over the rounds, and peak memory; and one line of JSON last.
"""
from typing import Literal

from configurator import UserError, configure

nanogpt: str | None = None         # a clone of nanoGPT to run beside us
work = ''                          # only rows whose name holds this
rounds = 3                         # processes of each, in turns: A B A B …
seconds = 8.0                      # of timed steps in each process
device = 'auto'                    # auto, cpu, cuda, cuda:1 or mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of our products; peers run in theirs
worker = ''                        # for this script's own use: whose turn it is
config, _ = configure(__file__, globals())

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from data import group
from device import autocast, peak_memory, pick_device, pick_dtype
from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from packed import pack

SMALL = dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)
PAPER = dict(vocab_size=50260, block_size=128, src_block_size=256, attn_bias=False, head_bias=True, tie_source=False)
where = pick_device(device)
precision = pick_dtype(where, dtype)[0]


def timed(step, amounts):
    """Work a second: step(i) does amounts[i % len] of it. Runs for `seconds`, the first steps, which warm up, apart."""
    rates, n, warm = [], len(amounts), min(3, len(amounts))
    for i in range(warm):
        step(i)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 2 * n:
        start = time.perf_counter()
        step(len(rates))
        rates.append((amounts[len(rates) % n], time.perf_counter() - start))
    if n == 1:
        return amounts[0] / median(t for _, t in rates)
    rates = rates[:len(rates) // n * n]  # whole rounds over batches of different sizes
    return sum(a for a, _ in rates) / sum(t for _, t in rates)


def trainer(net, precision, fused=True):
    """A function that takes one step of training on a batch: forward, backward, clipping, AdamW."""
    net.to(where).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)

    def step(**batch):
        with autocast(where, precision):
            loss = net(**{key: t.to(where) for key, t in batch.items()})[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
    return step


def train_gpt(who, B, T, args):
    """Tokens a second of training on random ids."""
    args = {**args, 'block_size': max(T, args['block_size']) if args is GPT2 else T}
    if who == 'nanogpt':
        sys.path.insert(0, nanogpt)
        for module in ('model', 'configurator'):
            sys.modules.pop(module)
        import model as peer
        theirs = torch.float32 if where.type == 'cpu' else torch.bfloat16  # what its train.py does
        step = trainer(peer.GPT(peer.GPTConfig(**args)), theirs, where.type == 'cuda')
    else:
        net = GPT(GPTConfig(act='gelu_erf', attn_dropout=args.get('dropout', 0.0), **args))
        step = trainer(net, precision)
    idx, targets = torch.randint(args['vocab_size'], (2, B, T))
    return timed(lambda i: step(idx=idx, targets=targets), [B * T])


class Padded(torch.nn.Module):
    """The base model of 2017 on PyTorch's own modules."""

    def __init__(self, V):
        super().__init__()
        self.body = torch.nn.Transformer(512, 8, 6, 6, 2048, 0.1, batch_first=True, norm_first=True)
        self.src, self.tgt, self.head = torch.nn.Embedding(V, 512), torch.nn.Embedding(V, 512), torch.nn.Linear(512, V)

    def forward(self, idx, targets, src):
        causal = torch.nn.Transformer.generate_square_subsequent_mask(idx.size(1), device=idx.device)
        hidden = src == 0
        x = self.body(self.src(src), self.tgt(idx), tgt_mask=causal, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        return None, torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten(), ignore_index=-1)


def train_pairs(who):
    """Pairs a second of training, their lengths as in chats: sources of 52 tokens in the mean, targets of 20."""
    rng = np.random.default_rng(0)
    lengths = np.stack((rng.gamma(1.9, 27, 8863), rng.gamma(1.5, 13, 8863)), axis=1).astype(int) + 1
    lengths = lengths.clip(max=(256, 127))
    if who == 'padded':
        step, groups = trainer(Padded(PAPER['vocab_size']), torch.float32), [np.arange(32)]
    else:
        step = trainer(Seq2Seq(Seq2SeqConfig(dropout=0.1, **PAPER)), precision)
        groups = group(lengths, 2048)
        groups = [groups[i] for i in rng.permutation(len(groups))[:24]]

    def batch(members):
        S, T = (256, 127) if who == 'padded' else lengths[members].max(axis=0)
        src, idx = (torch.randint(1, PAPER['vocab_size'], (len(members), int(n))) for n in (S, T))
        s, t = torch.from_numpy(lengths[members]).T[:, :, None]
        if who == 'padded':
            return {'src': src.where(torch.arange(256) < s, 0), 'idx': idx, 'targets': idx.where(torch.arange(127) < t, -1)}
        return {'src': src, 'src_pad': S - s[:, 0], 'idx': idx, 'targets': idx.where(torch.arange(T) < t, -1)}
    batches = [batch(members) for members in groups]
    return timed(lambda i: step(**batches[i % len(batches)]), [len(members) for members in groups])


def decode_gpt(who, B, n=128):
    """Tokens a second of greedy decoding behind 16 tokens, GPT-2 124M's shape, random weights."""
    idx = torch.randint(GPT2['vocab_size'], (B, 16), device=where)
    if who == 'transformers':
        from transformers import GPT2Config, GPT2LMHeadModel
        net = GPT2LMHeadModel(GPT2Config()).eval().to(where, precision)
        how = {'max_new_tokens': n, 'min_new_tokens': n, 'do_sample': False, 'pad_token_id': 0}
        return timed(lambda i: net.generate(idx, **how).sum().item(), [B * n])
    net, n = pack(GPT(GPTConfig(**GPT2)).eval().to(where, precision)), n if who == 'ours' else 32
    return timed(lambda i: net.generate(idx, n, temperature=0, use_cache=who == 'ours').sum().item(), [B * n])


def decode_seq2seq(who, B, n=64):
    """Tokens a second of greedy decoding of B sources of 45 tokens, the base shape, random weights."""
    net = pack(Seq2Seq(Seq2SeqConfig(**PAPER)).eval().to(where, precision))
    src = torch.randint(PAPER['vocab_size'], (B, 45)).tolist()
    return timed(lambda i: net.generate(src, n, start=0, temperature=0, use_cache=who == 'ours'), [B * n])


WORK = {  # name: (unit, peers, what to time); nanoGPT's two published configurations first
    'train nanoGPT\'s CPU example, 12 x 64': ('tok/s', ['nanogpt'], lambda who: train_gpt(
        who, 12, 64, SMALL | dict(n_layer=4, n_head=4, n_embd=128, dropout=0.0))),
    'train shakespeare_char, 64 x 256': ('tok/s', ['nanogpt'], lambda who: train_gpt(who, 64, 256, SMALL | dict(dropout=0.0))),
    '… with dropout 0.2, train': ('tok/s', ['nanogpt'], lambda who: train_gpt(who, 64, 256, SMALL | dict(dropout=0.2))),
    'train GPT-2 124M, 4 x 512': ('tok/s', ['nanogpt'], lambda who: train_gpt(who, 4, 512, GPT2)),
    'train Seq2Seq base, chats': ('pairs/s', ['padded'], train_pairs),
    'decode GPT-2 124M, batch 1': ('tok/s', ['transformers', 'uncached'], lambda who: decode_gpt(who, 1)),
    'decode GPT-2 124M, batch 8': ('tok/s', ['transformers', 'uncached'], lambda who: decode_gpt(who, 8)),
    'decode Seq2Seq base, batch 1': ('tok/s', ['uncached'], lambda who: decode_seq2seq(who, 1)),
    'decode Seq2Seq base, batch 32': ('tok/s', ['uncached'], lambda who: decode_seq2seq(who, 32)),
}


def ceilings():
    """{what: the most that could be had}: FLOP/s of a square matrix product, bytes/s of reading memory; the best of ten each."""
    def best(f):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return min(times)
    found, n = {}, 2048
    for p in {torch.float32, precision}:
        a, b = torch.randn(2, n, n, device=where).to(p)
        found[f'{str(p).removeprefix("torch.")} FLOP/s'] = 2 * n ** 3 / best(lambda a=a, b=b: (a @ b)[0, 0].item())
    x = torch.ones(2**27, device=where)
    found['bytes/s'] = x.nbytes / best(lambda: x.sum().item())
    return found


if nanogpt and not (Path(nanogpt) / 'model.py').is_file():
    raise UserError(f'--nanogpt={nanogpt} holds no model.py: name the folder of a clone of nanoGPT')
if rounds < 1 or seconds <= 0:
    raise UserError(f'rounds must be at least 1 and seconds above 0, got {rounds} and {seconds}')
if worker:
    torch.manual_seed(0)
    print(json.dumps([WORK[work][2](worker), peak_memory(where)]))
    raise SystemExit(0)
rows = [name for name in WORK if work in name]
if not rows:
    raise UserError(f'no row holds {work!r}: there are {", ".join(WORK)}')
limits = ceilings()
print(f'{where}, {torch.get_num_threads()} threads, torch {torch.__version__}; the ceilings here: '
      + ', '.join(f'{v / 1e9:,.0f} G{k}' for k, v in limits.items()))
result = {'torch': torch.__version__, 'device': str(where), 'threads': torch.get_num_threads(), 'limits': limits, 'work': {}}
installed = {'nanogpt': nanogpt, 'transformers': importlib.util.find_spec('transformers'), 'padded': True, 'uncached': True}
for name in rows:
    unit, peers, _ = WORK[name]
    got = {who: [] for who in ['ours', *(peer for peer in peers if installed[peer])]}
    for _ in range(rounds):
        for who in got:
            told = [a for a in sys.argv[1:] if not a.startswith('--work=')] + [f'--worker={who}', f'--work={name}']
            done = subprocess.run([sys.executable, __file__, *told], stdout=subprocess.PIPE, text=True, encoding='utf-8')
            if done.returncode:
                raise UserError(f'the {who} process of {name!r} failed: see above')
            got[who].append(json.loads(done.stdout.splitlines()[-1]))
    print(name)
    for who, values in got.items():
        rates, peak = [rate for rate, _ in values], median(peak or 0 for _, peak in values)
        ours = median(rate for rate, _ in got['ours'])
        ratio = '' if who == 'ours' else f'   ours is {ours / median(rates):.2f} times that'
        print(f'    {who:14}{median(rates):>10,.1f} {unit} ({min(rates):,.1f} - {max(rates):,.1f}), {peak / 1e9:.2f} GB{ratio}',
              flush=True)
    result['work'][name] = got
print(json.dumps(result))
