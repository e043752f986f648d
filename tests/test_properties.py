"""
Whatever the shapes and settings are, what is computed is what an independent formula says:
property-based tests.

    pytest -n 0 tests/test_properties.py
"""
import math
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket.data import Pairs, Stream
from pocket.datasets import choose_val_by_blocks
from pocket.generate import SamplingParams, new_cache, pad_left, sample_next_token
from pocket.optim import lr_factor

VOCAB_SIZE = 19


def examples(n):
    """Run a test with n random generators, always the same, as its argument rng."""
    def decorate(test):
        generators = st.integers(0, 2**32).map(Random)
        configure = settings(derandomize=True, database=None, deadline=None, max_examples=n)
        return configure(given(rng=generators)(test))

    return decorate


# --------------------------------------------------------------------------------------------------
# Sampling


def expected_distribution(logits, seen, params):
    """What sample_next_token() should draw from, in plain Python: {id: probability}."""
    penalized = []
    for logit, was_seen in zip(logits, seen):
        if was_seen and logit > 0:
            logit = logit / params.repetition_penalty
        elif was_seen:
            logit = logit * params.repetition_penalty
        penalized.append(logit)
    largest = max(penalized)
    weights = {}
    for i, logit in enumerate(penalized):
        weights[i] = math.exp((logit - largest) / params.temperature)

    best_first = sorted(weights, key=lambda i: -weights[i])
    top_k = best_first[:params.top_k]
    total = sum(weights[i] for i in top_k)
    kept = []
    mass = 0.0  # of those before
    for i in top_k:
        if params.top_p is None or mass < params.top_p:
            kept.append(i)
        mass += weights[i] / total
    if params.min_p is not None:
        kept = [i for i in kept if weights[i] >= params.min_p * weights[kept[0]]]

    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


def chi_square(counts, probabilities, n):
    """(the statistic, degrees of freedom) of counts of n draws. Rare ids are counted together: the
    test is not for rarities.
    """
    frequent = sorted((i for i, p in probabilities.items() if n * p >= 10), key=probabilities.get)
    rare = [i for i in probabilities if i not in frequent]
    cells = [[i] for i in frequent[1:]]
    cells.append([frequent[0], *rare])
    statistic = 0.0
    for cell in cells:
        count = sum(counts[i] for i in cell)
        expected = n * sum(probabilities[i] for i in cell)
        statistic += (count - expected) ** 2 / expected
    return statistic, len(cells) - 1


def chi_square_limit(df):
    """What one in a million honest samplers exceeds, by Wilson and Hilferty's approximation."""
    if df == 0:
        return 1e-9
    return df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3


@examples(60)
def test_sampler_draws_from_the_distribution_of_its_settings(rng):
    vocab_size = rng.choice((2, 5, 9))
    n = 4000
    logits = [rng.gauss(0, 2) for _ in range(vocab_size)]
    seen = [rng.random() < 0.5 for _ in logits]
    params = SamplingParams(
        temperature=rng.choice((0.5, 1.0, 2.0)),
        top_k=rng.choice((None, 1, 2, 4, 99)),
        top_p=rng.choice((None, 0.001, 0.3, 0.7, 0.999)),
        min_p=rng.choice((None, 0.05, 0.3)),
        repetition_penalty=rng.choice((1.0, 0.7, 1.5)),
    )
    expected = expected_distribution(logits, seen, params)

    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    logits_of_rows = torch.tensor(logits).expand(n, vocab_size)
    seen_of_rows = torch.tensor(seen).expand(n, vocab_size)
    drawn = sample_next_token(logits_of_rows, params, seen_of_rows, generator=generator)
    counts = Counter(drawn.tolist())
    assert counts.keys() <= expected.keys(), (counts, expected)
    statistic, df = chi_square(counts, expected, n)
    assert statistic <= chi_square_limit(df), (counts, expected, params)
    if params.top_k and not params.top_p and not params.min_p:
        assert len(expected) == min(params.top_k, vocab_size)


# --------------------------------------------------------------------------------------------------
# Models


def random_model(rng, kind='gpt', **fields):
    """A small model in eval mode with random switches. Its weights are so large that mistakes show.
    """
    torch.manual_seed(rng.randrange(2**32))
    switches = {
        'n_layer': rng.choice((1, 2)),
        'n_head': rng.choice((1, 2, 4)),
        'n_embd': rng.choice((8, 16)),
        'pos': rng.choice(('learned', 'sinusoidal', 'rotary')),
        'token_shift': rng.random() < 0.5,
        'qk_norm': rng.random() < 0.5,
        'norm_position': rng.choice(('pre', 'post')),
        'act': rng.choice(('gelu', 'relu2', 'swiglu')),
        'norm': rng.choice(('layernorm', 'rmsnorm')),
        'bias': rng.random() < 0.5,
        'block_size': rng.randrange(4, 14),
        'vocab_size': VOCAB_SIZE,
        **fields,
    }
    if kind == 'gpt':
        model = GPT(GPTConfig(**switches))
    else:
        model = Seq2Seq(Seq2SeqConfig(src_block_size=12, n_encoder_layer=1, **switches))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.eval()


def random_rows(rng, lengths, vocab_size=VOCAB_SIZE):
    """Rows of random ids, of these lengths."""
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize('kind', ['gpt', 'seq2seq'])
@examples(8)
def test_cached_logits_equal_uncached(kind, rng):
    """Logits of ragged rows, read in pieces with a cache, are those of each row alone without one.
    """
    model = random_model(rng, kind)
    B = rng.randrange(1, 5)
    T = model.config.block_size
    first_piece = rng.randrange(1, T + 1)
    memory = None
    alone = [{}] * B  # the source of each row
    if kind == 'gpt':  # padding must end within the first piece
        rows = random_rows(rng, [rng.randrange(T - first_piece + 1, T + 1) for _ in range(B)])
    else:
        rows = random_rows(rng, [T] * B)
        sources = random_rows(rng, [rng.randrange(1, 13) for _ in range(B)])
        alone = [{'src': torch.tensor([source])} for source in sources]
    with torch.no_grad():
        if kind == 'seq2seq':
            memory = model.encode(*pad_left(sources, 'cpu'))
        idx, pad = pad_left(rows, 'cpu')
        cache = new_cache(model, B, T, pad, memory)
        pieces = []
        start, length = 0, first_piece
        while start < idx.size(1):
            logits, _ = model(idx[:, start:start + length], cache=cache)
            pieces.append(logits)
            start += length
            length = rng.randrange(1, 4)
        cached = torch.cat(pieces, dim=1)
        for i, row in enumerate(rows):
            uncached, _ = model(torch.tensor([row]), **alone[i])
            torch.testing.assert_close(cached[i, -len(row):], uncached[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('kind', ['gpt', 'seq2seq'])
@examples(8)
def test_a_batch_generates_what_each_prompt_alone_does_without_cache(kind, rng):
    """Greedily, and past the end of the context."""
    model = random_model(rng, kind)
    T = model.config.block_size
    longest = 12 if kind == 'seq2seq' else 2 * T - 1
    prompts = random_rows(rng, [rng.randrange(1, longest + 1) for _ in range(rng.randrange(1, 5))])
    options = {'temperature': 0, 'decoder_start': 0, 'eos_id': 1}
    together = model.generate(prompts, T + 5, **options)
    alone = [model.generate([prompt], T + 5, use_cache=False, **options)[0] for prompt in prompts]
    assert together == alone


def write_pairs(folder, pairs):
    """Write a training split; returns its meta.json."""
    sides = [side for pair in pairs for side in pair]
    ids = [i for side in sides for i in side]
    np.array(ids, dtype='<u2').tofile(folder / 'train.bin')
    np.cumsum([0] + [len(side) for side in sides], dtype='<i8').tofile(folder / 'train.idx')
    return {
        'vocab_size': VOCAB_SIZE, 'dtype': 'uint16',
        'counts': {'train': len(ids)}, 'pairs': {'train': len(pairs)},
    }


@pytest.mark.parametrize('kind', ['gpt', 'seq2seq'])
@examples(5)
def test_loss_and_gradient_of_padded_batches_are_those_of_single_pairs(kind, rng, tmp_path_factory):
    block_size = 12
    start = 0
    model = random_model(rng, kind, block_size=block_size).double()
    pairs = []
    for _ in range(rng.randrange(1, 12)):
        source_and_target = random_rows(rng, (rng.randrange(1, 15), rng.randrange(1, 15)))
        pairs.append(source_and_target)

    folder = tmp_path_factory.mktemp('pairs')
    meta = write_pairs(folder, pairs)
    src_block_size = 12 if kind == 'seq2seq' else None
    batch_tokens = rng.choice((20, 60, 1000))
    data = Pairs(folder, meta, 'train', [start], block_size, src_block_size, batch_tokens)
    model.zero_grad()
    batched = sum(model(**batch, reduction='sum')[1] for batch in data.eval_batches())
    batched.backward()
    batched_gradient = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    expected = torch.zeros(())
    for source, target in pairs:
        if kind == 'seq2seq':
            source = source[-12:]
            target = target[:block_size]
            logits, _ = model(torch.tensor([[start, *target[:-1]]]), src=torch.tensor([source]))
            logits = logits[0]
        else:  # source and target share a row; the source is promised half of it
            target = target[:block_size - min(len(source), block_size // 2)]
            source = source[-(block_size - len(target)):]
            logits, _ = model(torch.tensor([[*source, start, *target[:-1]]]))
            logits = logits[0, len(source):]
        expected = expected + F.cross_entropy(logits, torch.tensor(target), reduction='sum')
    expected.backward()
    torch.testing.assert_close(batched.double(), expected, atol=1e-3, rtol=1e-5)
    for gradient, p in zip(batched_gradient, model.parameters()):
        torch.testing.assert_close(gradient, p.grad, atol=1e-5, rtol=1e-5)


@examples(10)
def test_adaptive_softmax_is_a_product_of_probabilities(rng):
    """The probability of a rare id is that of its cluster times its own within the cluster; any
    order of ids will do.
    """
    V = 30
    model = random_model(rng, tie_weights=False, n_embd=16, vocab_size=V, cutoffs=(7, 15),
                         div_value=2.0, block_size=8)
    head = model.lm_head
    head.rank.copy_(torch.tensor(rng.sample(range(V), V)))
    idx = torch.tensor(random_rows(rng, [8, 8], V))
    with torch.no_grad():
        x = model.hidden(idx)
        log_probs, _ = model(idx)
        shortlist = F.linear(x, head.softmax.head.weight).softmax(-1)  # 7 frequent ids, 2 clusters
        clusters = []
        for narrow, out in head.softmax.tail:
            clusters.append(F.linear(F.linear(x, narrow.weight), out.weight).softmax(-1))
        for i in range(V):
            rank = int(head.rank[i])
            if rank < 7:
                expected = shortlist[..., rank]
            elif rank < 15:
                expected = shortlist[..., 7] * clusters[0][..., rank - 7]
            else:
                expected = shortlist[..., 8] * clusters[1][..., rank - 15]
            torch.testing.assert_close(log_probs[..., i], expected.log(), atol=1e-4, rtol=1e-4)

        _, loss = model(idx, idx, reduction='sum')
        expected_loss = -log_probs.gather(-1, idx[..., None]).sum()
        torch.testing.assert_close(loss, expected_loss, atol=1e-3, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# Data and schedules


@examples(60)
def test_an_epoch_is_a_permutation_however_it_is_divided(rng, tmp_path_factory):
    """The samples of all ranks, step after step: every epoch has each window once, and no two
    windows overlap.
    """
    block_size = rng.randrange(1, 9)
    num_ids = rng.randrange(block_size + 1, 120)
    batch_size = rng.randrange(1, 5)
    micro_batches = rng.randrange(1, 4)
    world_size = rng.randrange(1, 4)
    seed = rng.randrange(2**31)
    folder = tmp_path_factory.mktemp('stream')
    np.arange(num_ids).astype('<u2').tofile(folder / 'train.bin')  # ids are their own positions
    meta = {'vocab_size': num_ids, 'dtype': 'uint16', 'counts': {'train': num_ids}}
    data = Stream(folder, meta, 'train', block_size, batch_size)
    windows = max(1, num_ids // block_size - 1)  # of an epoch
    assert data.steps_for(1, 1) == math.ceil(windows / batch_size)

    starts = []
    for step in range(math.ceil(3 * windows / (batch_size * micro_batches))):
        for rank in range(world_size):
            for batch in data.batches(seed, step, micro_batches, rank, world_size):
                first_targets = batch['targets'][:, 0].tolist()
                # -1: a row without a sample, for a rank that gets none
                starts += [target - 1 for target in first_targets if target >= 0]
    for epoch in range(3):
        here = sorted(starts[epoch * windows:(epoch + 1) * windows])
        assert len(set(here)) == windows
        assert all(b - a == block_size for a, b in zip(here, here[1:]))
        assert here[0] >= 0 and here[-1] + block_size < num_ids


SCHEDULES = {  # of how far the run is, from 0 after the warm-up to 1 at the end
    'linear': lambda x: 1 - x,
    'cosine': lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    'constant': lambda x: 1.0,
}


@examples(80)
def test_learning_rate_schedule_at_its_corners(rng):
    """From the peak after the warm-up to the floor at the end, never above or below, for settings
    of every kind.
    """
    schedule = rng.choice(list(SCHEDULES))
    warmup = rng.choice((0, 1, 5, 50))
    end = rng.choice((0, 1, 2, 3, 6, 40, 60))
    floor = rng.choice((0.0, 0.2, 1.0))
    for step in (0, 1, warmup - 1, warmup, warmup + 1, end - 1, end, end + 1, rng.randrange(70)):
        if step < 0:
            continue
        progress = min(1.0, (step - warmup) / (end - warmup)) if end > warmup else 1.0
        if step < warmup:
            expected = (step + 1) / (warmup + 1)
        elif schedule == 'constant':
            expected = 1.0
        else:
            expected = floor + (1 - floor) * SCHEDULES[schedule](progress)
        factor = lr_factor(step, schedule, warmup, end, floor)
        assert factor == pytest.approx(expected, abs=1e-12)
        assert 0 <= factor <= 1


@examples(80)
def test_no_source_of_val_is_known_from_train(rng):
    """No side has a source that begins one of the other side, and no scene is on both."""
    sources = []
    for _ in range(rng.randrange(2, 80)):
        sources.append(' '.join(rng.choices(('a', 'ab', 'b'), k=rng.randrange(1, 6))))
    scenes = [rng.randrange(len(sources)) for _ in sources]
    val, moved = choose_val_by_blocks(sources, scenes, seed=rng.randrange(99))
    val_sources = {f'{source} ' for source, scene in zip(sources, scenes) if scene in val}
    train_sources = {f'{source} ' for source, scene in zip(sources, scenes) if scene not in val}
    for a in train_sources:
        for b in val_sources:
            assert not a.startswith(b) and not b.startswith(a)
    assert 0 <= moved <= len(sources)
