"""Numbers that can't lie: whatever the shapes and settings are, what is computed is what an independent formula says."""
import ast
import math
from collections import Counter
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from conftest import CHECKOUT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig, pad_left
from pocket.data import Pairs, Stream
from pocket.generate import next_token

SEEDS = st.integers(0, 2**32).map(Random)


def examples(n):
    """n random generators, always the same."""
    def decorate(f):
        return settings(derandomize=True, database=None, deadline=None, max_examples=n)(given(rng=SEEDS)(f))
    return decorate


@cache
def code_of(script, name):
    tree = ast.parse((CHECKOUT / script).read_text(encoding='utf-8'))
    return compile(ast.Module([next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)], []), script, 'exec')


def function_of(script, name, **namespace):
    """A function of a script, with these as its globals."""
    exec(code_of(script, name), namespace)
    return namespace[name]


def distribution(logits, seen, temperature, top_k, top_p, min_p, penalty):
    """What next_token() should draw from, in plain Python: {id: probability}."""
    logits = [(x / penalty if x > 0 else x * penalty) if s else x for x, s in zip(logits, seen)]
    p = {i: math.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    order = sorted(p, key=lambda i: -p[i])[:top_k]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        if top_p is None or mass < top_p:
            kept.append(i)
        mass += p[i] / total
    p = {i: p[i] for i in kept if min_p is None or p[i] >= min_p * p[kept[0]]}
    return {i: x / sum(p.values()) for i, x in p.items()}


@examples(60)
def test_the_sampler_draws_from_what_its_settings_say(rng):
    V, N, choose = rng.choice((2, 5, 9)), 4000, rng.choice
    logits = [rng.gauss(0, 2) for _ in range(V)]
    seen, how = [rng.random() < 0.5 for _ in logits], (choose((0.5, 1.0, 2.0)), choose((None, 1, 2, 4, 99)), choose((None, 0.001, 0.3, 0.7, 0.999)),
                                                       choose((None, 0.05, 0.3)), choose((1.0, 0.7, 1.5)))
    want = distribution(logits, seen, *how)
    temperature, top_k, top_p, min_p, penalty = how
    got = Counter(next_token(torch.tensor(logits).expand(N, V), torch.tensor(seen).expand(N, V), temperature, top_k, top_p, min_p, penalty,
                             generator=torch.Generator().manual_seed(rng.randrange(2**32))).tolist())
    assert got.keys() <= want.keys(), (got, want)
    often = sorted((i for i, p in want.items() if N * p >= 10), key=want.get)
    cells = [[i] for i in often[1:]] + [[often[0], *want.keys() - set(often)]]  # chi-square is for counts, not for rarities
    expected = [(sum(got[i] for i in cell), N * sum(want[i] for i in cell)) for cell in cells]
    df, chi2 = len(cells) - 1, sum((n - e) ** 2 / e for n, e in expected)
    # the quantile that one of a million honest samplers is above, by Wilson and Hilferty's approximation
    assert chi2 <= (df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3 if df else 1e-9), (got, want, how)
    if top_k and not top_p and not min_p:
        assert len(want) == min(top_k, V)


def some_model(rng, kind='gpt', **fields):
    """A random small model in eval mode, of weights so large that mistakes show."""
    torch.manual_seed(rng.randrange(2**32))
    switches = {'n_layer': rng.choice((1, 2)), 'n_head': rng.choice((1, 2, 4)), 'n_embd': rng.choice((8, 16)), 'pos': rng.choice(('learned', 'sinusoidal', 'rotary')),
                'token_shift': rng.random() < 0.5, 'qk_norm': rng.random() < 0.5, 'norm_position': rng.choice(('pre', 'post')),
                'act': rng.choice(('gelu', 'relu2', 'swiglu')), 'norm': rng.choice(('layernorm', 'rmsnorm')), 'bias': rng.random() < 0.5,
                'block_size': rng.randrange(4, 14), 'vocab_size': 19, **fields}
    net = GPT(GPTConfig(**switches)) if kind == 'gpt' else Seq2Seq(Seq2SeqConfig(src_block_size=12, n_encoder_layer=1, **switches))
    with torch.no_grad():
        [p.add_(torch.randn_like(p) * 0.15) for p in net.parameters()]
    return net.eval()


def rows(rng, lengths, vocab_size=19):
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize('kind', ['gpt', 'seq2seq'])
@examples(8)
def test_cached_equals_uncached_equals_alone(kind, rng):
    """Logits of ragged rows read in pieces, with a cache, are those of each row alone without one; and so is greedy text, past the context."""
    net, B = some_model(rng, kind), rng.randrange(1, 5)
    T = net.config.block_size
    sources = rows(rng, [rng.randrange(1, 13) for _ in range(B)])
    first, given, alone = rng.randrange(1, T + 1), {}, [{}] * B  # the columns of the first piece: padding ends in it
    texts = rows(rng, [rng.randrange(T - first + 1, T + 1) for _ in range(B)]) if kind == 'gpt' else rows(rng, [T] * B)
    with torch.no_grad():
        if kind == 'seq2seq':
            given, alone = {'memory': net.encode(*pad_left(sources, 'cpu'))}, [{'src': torch.tensor([s])} for s in sources]
        idx, pad = pad_left(texts, 'cpu')
        cache, got, at = net.new_cache(B, T), [], 0
        while at < idx.size(1):
            n = first if at == 0 else rng.randrange(1, 4)
            got.append(net(idx[:, at:at + n], cache=cache, pad=pad, **given)[0])
            at += n
        for row, text, kw in zip(torch.cat(got, dim=1), texts, alone):
            torch.testing.assert_close(row[-len(text):], net(torch.tensor([text]), **kw)[0][0], atol=2e-5, rtol=1e-4)
    how = {'temperature': 0, 'start': 0, 'eot': 1}
    prompts = sources if kind == 'seq2seq' else rows(rng, [rng.randrange(1, 2 * T) for _ in range(B)])
    assert net.generate(prompts, T + 5, **how) == [net.generate([p], T + 5, use_cache=False, **how)[0] for p in prompts]


@pytest.mark.parametrize('kind', ['gpt', 'seq2seq'])
@examples(5)
def test_padding_and_batches_add_nothing(kind, rng, tmp_path_factory):
    """Loss and gradient over the padded batches of a dataset of pairs are those over its pairs one by one, plainly cut and joined."""
    net, folder, start = some_model(rng, kind, block_size=12).double(), tmp_path_factory.mktemp('pairs'), 0
    pairs = [rows(rng, (rng.randrange(1, 15), rng.randrange(1, 15))) for _ in range(rng.randrange(1, 12))]
    ids = [side for pair in pairs for side in pair]
    np.array(sum(ids, []), dtype='<u2').tofile(folder / 'train.bin')
    np.cumsum([0] + [len(side) for side in ids], dtype='<i8').tofile(folder / 'train.idx')
    meta = {'vocab_size': 19, 'dtype': 'uint16', 'counts': {'train': sum(map(len, ids))}, 'pairs': {'train': len(pairs)}}
    data = Pairs(folder, meta, 'train', [start], 12, 12 if kind == 'seq2seq' else None, rng.choice((20, 60, 1000)))
    net.zero_grad()
    total = sum(net(**batch, reduction='sum')[1] for batch in data.eval_batches())
    total.backward()
    gradient = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    want = torch.zeros(())
    for source, target in pairs:
        if kind == 'seq2seq':
            source, target = source[-12:], target[:12]
            logits = net(torch.tensor([[start, *target[:-1]]]), src=torch.tensor([source]))[0][0]
        else:
            target = target[:12 - min(len(source), 6)]
            source = source[-(12 - len(target)):]
            logits = net(torch.tensor([[*source, start, *target[:-1]]]))[0][0, len(source):]
        want = want + F.cross_entropy(logits, torch.tensor(target), reduction='sum')
    want.backward()
    torch.testing.assert_close(total.double(), want, atol=1e-3, rtol=1e-5)
    for g, p in zip(gradient, net.parameters()):
        torch.testing.assert_close(g, p.grad, atol=1e-5, rtol=1e-5)


@examples(10)
def test_adaptive_softmax_is_a_product_of_probabilities(rng):
    """That of a rare id: its cluster's in the head, times its own in the cluster; the order of frequency may be any."""
    net = some_model(rng, tie_weights=False, n_embd=16, vocab_size=30, cutoffs=(7, 15), div_value=2.0, block_size=8)
    head, idx = net.lm_head, torch.tensor(rows(rng, [8, 8], 30))
    head.rank.copy_(torch.tensor(rng.sample(range(30), 30)))
    with torch.no_grad():
        x, got = net.transformer(idx), net(idx)[0]
        first = F.linear(x, head.softmax.head.weight).softmax(-1)
        inside = [F.linear(F.linear(x, tail[0].weight), tail[1].weight).softmax(-1) for tail in head.softmax.tail]
        for i in range(30):
            place = int(head.rank[i])
            want = first[..., place] if place < 7 else first[..., 7] * inside[0][..., place - 7] if place < 15 else first[..., 8] * inside[1][..., place - 15]
            torch.testing.assert_close(got[..., i], want.log(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(net(idx, idx, reduction='sum')[1], -got.gather(-1, idx[..., None]).sum(), atol=1e-3, rtol=1e-4)


@examples(60)
def test_an_epoch_is_a_permutation_whatever_shares_it_out(rng, tmp_path_factory):
    """Samples of all ranks, step after step: each epoch has every window once, and none of two windows overlap."""
    T, folder = rng.randrange(1, 9), tmp_path_factory.mktemp('stream')
    n, B, micro, world, seed = rng.randrange(T + 1, 120), rng.randrange(1, 5), rng.randrange(1, 4), rng.randrange(1, 4), rng.randrange(2**31)
    np.arange(n).astype('<u2').tofile(folder / 'train.bin')
    data = Stream(folder, {'vocab_size': n, 'dtype': 'uint16', 'counts': {'train': n}}, 'train', T, B)
    starts = []
    for step in range(-(-3 * data.epoch // (B * micro))):
        batches = [b for rank in range(world) for b in data.batches(seed, step, micro, rank, world)]
        starts += [row[0] - 1 for b in batches for row in b['targets'].tolist() if row[0] >= 0]
    assert data.epoch == max(1, n // T - 1)
    for epoch in range(3):
        cut = sorted(starts[epoch * data.epoch:(epoch + 1) * data.epoch])
        assert len(set(cut)) == data.epoch and all(b - a == T for a, b in zip(cut, cut[1:])) and cut[0] >= 0 and cut[-1] + T < n


@examples(80)
def test_schedules_at_their_corners(rng):
    """From the peak behind the warm-up to the floor at the end, never above or below; steps and settings of every kind."""
    choose, math_of = rng.choice, {'linear': lambda x: 1 - x, 'cosine': lambda x: 0.5 + 0.5 * math.cos(math.pi * x), 'constant': lambda x: 1.0}
    now = {'schedule': choose(tuple(math_of)), 'warmup_iters': choose((0, 1, 5, 50)), 'max_iters': choose((1, 2, 6, 40)), 'lr_decay_iters': choose((None, 0, 1, 3, 60)),
           'min_lr': choose((0.0, 0.1, 0.5)), 'learning_rate': choose((0.0, 0.5)), 'max_minutes': None}
    factor, warm = function_of('train.py', 'lr_factor', math=math, **now), now['warmup_iters']
    end = now['max_iters'] if now['lr_decay_iters'] is None else now['lr_decay_iters']
    floor = now['min_lr'] / now['learning_rate'] if now['learning_rate'] else 0.0
    for step in (0, 1, warm - 1, warm, warm + 1, end - 1, end, end + 1, rng.randrange(70)):
        if step < 0:
            continue
        passed = min(1.0, (step - warm) / (end - warm)) if end > warm else 1.0
        want = (step + 1) / (warm + 1) if step < warm else 1.0 if now['schedule'] == 'constant' else floor + (1 - floor) * math_of[now['schedule']](passed)
        assert factor(step) == pytest.approx(want, abs=1e-12) and 0 <= factor(step) <= 1


@examples(80)
def test_no_source_of_val_is_known_from_train(rng):
    """prepare/office.py: no side has a source that begins one of the other, and no run or scene is on both."""
    texts = [' '.join(rng.choices(('a', 'ab', 'b'), k=rng.randrange(1, 6))) for _ in range(rng.randrange(2, 80))]
    pairs = [(text, None, 'reply', rng.randrange(len(texts))) for text in texts]
    val, moved = function_of('prepare/office.py', 'split_blocks', Random=Random, seed=rng.randrange(99))(pairs)
    sides = [{p[0] + ' ' for p in pairs if (p[3] in val) == is_val} for is_val in (True, False)]
    assert not any(a.startswith(b) or b.startswith(a) for a in sides[0] for b in sides[1]) and 0 <= moved <= len(pairs)
