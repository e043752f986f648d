"""
pocket/optim.py: Muon against torch.optim.Muon, which parameters go to which optimizer, and the
learning-rate schedule.

Run it alone: pytest -n 0 tests/test_optim.py

The schedule with random settings, at its corners, is in test_properties.py.
"""
import copy
import doctest
import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import optim
from pocket.optim import (
    Muon,
    base_learning_rates,
    lr_factor,
    make_optimizers,
    orthogonalize,
    pick_muon_dtype,
    set_learning_rates,
    split_parameters,
)

# --------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_muon_equals_torch_muon(weight_decay):
    """One matrix at a time there, all matrices of a shape in one batch here."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32), (24, 8), (8, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    our_muon = Muon(ours, lr=0.02, momentum=0.9, weight_decay=weight_decay)
    their_muon = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=weight_decay)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        our_muon.step()
        their_muon.step()
    for p, q in zip(ours, theirs):
        # bfloat16 rounds differently in batches: by a hundredth of what the steps moved
        torch.testing.assert_close(p, q, atol=3e-3, rtol=0)


@pytest.mark.parametrize('shape', [(3, 16, 64), (3, 64, 16), (1, 32, 32)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape, dtype):
    torch.manual_seed(0)
    G = torch.randn(shape)
    X = orthogonalize(G, dtype=dtype)
    assert X.dtype == dtype
    assert X.shape == G.shape
    X = X.float()
    singular_values = torch.linalg.svdvals(X)
    assert singular_values.min() > 0.3
    assert singular_values.max() < 1.4

    U, _, V = torch.linalg.svd(G, full_matrices=False)
    nearest = U @ V  # the nearest semi-orthogonal matrices, exactly
    assert F.cosine_similarity(nearest.flatten(1), X.flatten(1)).min() > 0.9


def test_muon_state_survives_saving():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.ones(4, 4))
    q = torch.nn.Parameter(torch.ones(4, 4))
    muon = Muon([p])
    resumed = Muon([q])
    for step in range(4):
        if step == 2:
            q.data.copy_(p)
            resumed.load_state_dict(copy.deepcopy(muon.state_dict()))  # as from a file
        p.grad = torch.randn(4, 4)
        q.grad = p.grad.clone()
        muon.step()
        if step >= 2:
            resumed.step()
    assert torch.equal(p, q)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r'\(3,\)'):
        Muon([torch.nn.Parameter(torch.ones(3))])


def test_muon_leaves_parameters_without_a_gradient_alone():
    p = torch.nn.Parameter(torch.ones(4, 4))
    Muon([p], weight_decay=0.1).step()
    assert torch.equal(p, torch.ones(4, 4))


@pytest.mark.parametrize('device, amp_dtype, expected', [
    ('cpu', torch.float32, torch.float32),
    ('cpu', torch.bfloat16, torch.bfloat16),
    ('cuda', torch.float32, torch.bfloat16),
    ('cuda', torch.float16, torch.bfloat16),
])
def test_muon_computes_in_bfloat16_unless_that_is_slow(device, amp_dtype, expected):
    assert pick_muon_dtype(torch.device(device), amp_dtype) == expected


# --------------------------------------------------------------------------------------------------
# Which parameter goes to which optimizer

SHAPE = {'block_size': 8, 'vocab_size': 60, 'n_layer': 2, 'n_head': 2, 'n_embd': 16}


MODELS = {
    'gpt': (GPT, GPTConfig(**SHAPE)),
    'gpt, untied': (GPT, GPTConfig(tie_weights=False, head_bias=True, **SHAPE)),
    'gpt, adaptive': (GPT, GPTConfig(tie_weights=False, cutoffs=(10, 30), div_value=2.0, **SHAPE)),
    'seq2seq': (Seq2Seq, Seq2SeqConfig(**SHAPE)),
}


def make_model(name):
    Model, config = MODELS[name]
    return Model(config)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_every_parameter_is_in_exactly_one_list(name, optimizer):
    model = make_model(name)
    matrices, others = split_parameters(model, optimizer)
    ids = [id(p) for p in matrices + others]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}
    assert optimizer == 'muon' or matrices == []


@pytest.mark.parametrize('name', MODELS)
def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else(name):
    model = make_model(name)
    if name == 'seq2seq':
        blocks = [*model.encoder.h, *model.decoder.h]
    else:
        blocks = list(model.transformer.h)
    expected = []
    for block in blocks:
        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        expected += [id(linear.weight) for linear in linears]

    matrices, _ = split_parameters(model, 'muon')
    assert sorted(id(p) for p in matrices) == sorted(expected)
    if name == 'seq2seq':
        assert len(matrices) == 2 * 4 + 2 * 7  # cross-attention has three
    else:
        assert len(matrices) == 2 * 4  # attention and MLP have two each


def test_weight_decay_is_for_matrices_alone():
    model = GPT(GPTConfig(**SHAPE))
    matrices, others = split_parameters(model, 'muon')
    adamw, muon = make_optimizers(matrices, others, 1e-3, (0.9, 0.95), 0.02, 0.9, 0.1,
                                  torch.float32)
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, Muon)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            for p in group['params']:
                assert group['weight_decay'] == (0.1 if p.ndim == 2 else 0.0)
    assert all(group['lr'] == 1e-3 for group in adamw.param_groups)
    assert all(group['betas'] == (0.9, 0.95) for group in adamw.param_groups)
    assert muon.param_groups[0]['lr'] == 0.02
    assert muon.param_groups[0]['momentum'] == 0.9
    assert muon.dtype == torch.float32

    held = []
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            held += [id(p) for p in group['params']]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_without_matrices_there_is_only_adamw():
    matrices, others = split_parameters(GPT(GPTConfig(**SHAPE)), 'adamw')
    optimizers = make_optimizers(matrices, others, 1e-3, (0.9, 0.95), 0.02, 0.9, 0.1, torch.float32)
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]


# --------------------------------------------------------------------------------------------------
# The learning-rate schedule


def test_examples_in_docstrings():
    results = doctest.testmod(optim)
    assert results.attempted > 0
    assert results.failed == 0


def test_schedule_rises_falls_and_stays_at_the_floor():
    steps = (0, 1, 3, 4, 8, 12, 13, 100)
    linear = [lr_factor(step, 'linear', 3, 12, 0.1) for step in steps]
    assert linear == pytest.approx([1 / 4, 2 / 4, 1, 0.9, 0.5, 0.1, 0.1, 0.1])
    cosine = [lr_factor(step, 'cosine', 3, 12, 0.1) for step in (3, 6, 12, 13)]
    assert cosine == pytest.approx([1, 0.1 + 0.9 * 0.75, 0.1, 0.1])
    constant = [lr_factor(step, 'constant', 3, 12, 0.1) for step in steps]
    assert constant == pytest.approx([1 / 4, 2 / 4, 1, 1, 1, 1, 1, 1])


def test_schedule_without_warmup_starts_at_its_peak():
    for schedule in ('linear', 'cosine', 'constant'):
        assert lr_factor(0, schedule, 0, 10, 0.0) == 1


@pytest.mark.parametrize('share_left', [1.0, 0.75, 0.5, 0.0])
def test_schedule_by_the_clock_ignores_how_many_steps_are_left(share_left):
    for step in (3, 50, 10**6):
        linear = lr_factor(step, 'linear', 3, 12, 0.2, share_left)
        assert linear == pytest.approx(0.2 + 0.8 * share_left)
        cosine = lr_factor(step, 'cosine', 3, 12, 0.2, share_left)
        expected = 0.2 + 0.8 * (0.5 - 0.5 * math.cos(math.pi * share_left))
        assert cosine == pytest.approx(expected)
        assert lr_factor(step, 'constant', 3, 12, 0.2, share_left) == 1
    assert lr_factor(1, 'linear', 3, 12, 0.2, share_left) == 2 / 4  # the warm-up counts steps


def test_learning_rates_follow_the_factor_and_never_drift():
    """Each is set from its base rate, not from the one before."""
    matrices, others = split_parameters(GPT(GPTConfig(**SHAPE)), 'muon')
    optimizers = make_optimizers(matrices, others, 1e-3, (0.9, 0.95), 0.02, 0.9, 0.1, torch.float32)
    base_lrs = base_learning_rates(optimizers)
    assert base_lrs == [[1e-3, 1e-3], [0.02]]
    for factor in (0.5, 0.0, 0.25, 1.0):
        set_learning_rates(optimizers, base_lrs, factor)
        rates = base_learning_rates(optimizers)
        assert rates == [[1e-3 * factor, 1e-3 * factor], [0.02 * factor]]
    assert base_lrs == [[1e-3, 1e-3], [0.02]]
