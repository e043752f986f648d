"""The odd cases that samplers get wrong; against probability theory: test_properties.py, too."""
import math

import pytest
import torch

from pocket.generate import check_sampling, next_token

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])
N = 40_000


def token_counts(seed=0, logits=LOGITS, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    got = next_token(logits.expand(N, -1), generator=generator, **kwargs)
    return torch.bincount(got, minlength=len(logits)).double()


def agrees(counts, p):
    """Chi-square at 1e-4: what should never occur does not, the rest as often as p says."""
    p = p.double() / p.sum()
    assert counts[p == 0].sum() == 0
    live = p > 0
    chi2 = ((counts - N * p)[live] ** 2 / (N * p)[live]).sum().item()
    assert chi2 < {1: 1e-9, 2: 15.1, 3: 18.4, 4: 21.1, 5: 23.5, 6: 25.7}[int(live.sum())], (counts, N * p)


def test_top_k_with_ties_keeps_exactly_k():
    assert (token_counts(logits=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), top_k=2) > 0).sum() == 2


def test_top_p_keeps_the_token_that_crosses():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, kept in ((0.01, 1), (0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.97, 4), (1.0, 4)):
        want = p.clone()
        want[kept:] = 0
        agrees(token_counts(logits=p.log(), top_p=top_p), want)


@pytest.mark.parametrize('shift', [-10.0, 0.0, 10.0])
def test_repetition_penalty_lowers_whatever_the_sign(shift):
    logits, seen = LOGITS + shift, torch.tensor([True, True, False, False, True, False]).expand(N, -1)
    lowered = torch.tensor([(x / 1.5 if x > 0 else x * 1.5) if s else x for x, s in zip(logits.tolist(), seen[0].tolist())])
    assert (lowered[seen[0]] <= logits[seen[0]]).all()
    agrees(token_counts(logits=logits, seen=seen, repetition_penalty=1.5), lowered.softmax(0))


def test_banned_tokens_never_come():
    banned, before = torch.tensor([0, 5]), LOGITS.clone()
    agrees(token_counts(banned=banned), LOGITS.softmax(0).index_fill(0, banned, 0))
    assert next_token(LOGITS[None], temperature=0, banned=banned).item() == 3 and torch.equal(LOGITS, before)


def test_greedy_and_rows_are_independent():
    assert next_token(torch.stack([LOGITS, -LOGITS]), temperature=0).tolist() == [0, 4]
    rows = torch.tensor([[0.0, 30.0], [30.0, 0.0]])
    assert next_token(rows, generator=torch.Generator().manual_seed(1)).tolist() == [1, 0]


def test_seeds():
    a, b, c = (token_counts(seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_extreme_logits_stay_finite():
    assert next_token(torch.tensor([[1e30, -1e30, 0.0]]), top_p=0.9, min_p=0.1).item() == 0
    assert next_token(torch.tensor([[-math.inf, 5.0, -math.inf]])).item() == 1


@pytest.mark.parametrize('kwargs', [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5), dict(min_p=-0.1),
                                    dict(repetition_penalty=0)])
def test_out_of_range(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        check_sampling(**kwargs)
