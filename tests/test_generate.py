"""
pocket/generate.py: the fast loop against the plain one, and sampling against probability theory.

Run it alone: pytest -n 0 tests/test_generate.py

Sampling with random settings is in test_properties.py; cached = uncached and beam search on real
models are in test_model.py and test_seq2seq.py.
"""
import doctest
import math

import pytest
import torch

from model import GPT, GPTConfig
from pocket import generate as generate_module
from pocket.generate import (
    SamplingParams,
    beam_search,
    generate,
    generate_plain,
    generate_stream,
    sample_next_token,
    window_length,
)

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])
N = 40_000  # tokens drawn for a test of a distribution


# --------------------------------------------------------------------------------------------------
# the loop

def small_gpt(**switches):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=23, block_size=16, n_layer=2, n_head=2, n_embd=16, **switches))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)  # far from uniform predictions, so that mistakes show
    return model.eval()


@pytest.mark.parametrize('temperature', [0, 0.7, 1.0])
@pytest.mark.parametrize('use_cache', [True, False])
def test_generate_equals_generate_plain(temperature, use_cache):
    """Greedy, and token by token at the same seed, up to a full block_size."""
    model = small_gpt(pos='rotary')
    idx = torch.randint(23, (3, 5))

    generator = torch.Generator().manual_seed(7)
    want = generate_plain(model, idx, 12, temperature, generator)
    got = generate(model, idx, 12, temperature=temperature, seed=7, use_cache=use_cache)
    assert want.shape == (3, 17)
    assert torch.equal(got, want)
    assert temperature == 0 or len(set(want[:, 5:].flatten().tolist())) > 5  # it does sample


def test_without_a_seed_the_global_generator_is_used():
    model = small_gpt()
    idx = torch.randint(23, (2, 5))
    torch.manual_seed(3)
    want = generate_plain(model, idx, 8)
    torch.manual_seed(3)
    assert torch.equal(model.generate(idx, 8), want)


@pytest.mark.parametrize('prompts', [
    [torch.tensor([1, 2, 3]), torch.tensor([4])],
    [list(torch.tensor([1, 2, 3])), (4,)],
])
def test_prompts_may_be_tensors(prompts):
    """What comes back are lists of ints all the same."""
    model = small_gpt()
    texts = generate(model, prompts, 4, temperature=0)
    assert texts == generate(model, [[1, 2, 3], [4]], 4, temperature=0)
    assert all(type(token) is int for text in texts for token in text)
    beams = beam_search(model, prompts, 4, num_beams=2)
    assert beams == beam_search(model, [[1, 2, 3], [4]], 4, num_beams=2)


def test_a_full_block_loses_a_quarter_at_a_time():
    lengths = [window_length(length, block_size=16) for length in (1, 16, 17, 20, 21)]
    assert lengths == [1, 16, 13, 16, 13]
    assert all(12 < window_length(length, block_size=16) <= 16 for length in range(17, 100))
    assert [window_length(length, block_size=1) for length in (1, 2, 3)] == [1, 1, 1]


def test_the_model_is_asked_once_per_step_and_can_stop_generation():
    """A hook on the head is how the server stops a generation whose reader has left."""
    model = small_gpt()
    calls = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    generate(model, [[1, 2], [3]], 6, temperature=0)
    assert len(calls) == 6
    beam_search(model, [[1, 2], [3]], 6, num_beams=3)
    assert len(calls) == 12
    hook.remove()

    def stop_at_third_step(module, inputs):
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    model.lm_head.register_forward_pre_hook(stop_at_third_step)
    calls.clear()
    tokens = []
    with pytest.raises(InterruptedError):
        for token in generate_stream(model, [[1, 2]], 6):
            tokens.append(token)
    assert len(tokens) == 2
    calls.clear()
    with pytest.raises(InterruptedError):
        beam_search(model, [[1, 2]], 6, num_beams=3)


def test_examples_in_docstrings():
    assert doctest.testmod(generate_module).failed == 0


# --------------------------------------------------------------------------------------------------
# sampling

def count_tokens(logits=LOGITS, seed=0, seen=None, banned=None, **sampling):
    """How often each token is chosen in N draws from logits (V,): (V,) float64."""
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(**sampling)
    tokens = sample_next_token(logits.expand(N, -1), params, seen, banned, generator)
    return torch.bincount(tokens, minlength=len(logits)).double()


def assert_distribution(counts, p):
    """Chi-square at 1e-4: what should never occur does not, the rest as often as p says."""
    p = p.double() / p.sum()
    assert counts[p == 0].sum() == 0
    possible = p > 0
    chi2 = ((counts - N * p)[possible] ** 2 / (N * p)[possible]).sum().item()
    limits = {1: 1e-9, 2: 15.1, 3: 18.4, 4: 21.1, 5: 23.5, 6: 25.7}
    assert chi2 < limits[int(possible.sum())], (counts, N * p)


def test_top_k_with_ties_keeps_exactly_k():
    counts = count_tokens(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), top_k=2)
    assert (counts > 0).sum() == 2


@pytest.mark.parametrize('top_p, kept', [
    (0.01, 1), (0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.97, 4), (1.0, 4)])
def test_top_p_keeps_the_token_that_crosses(top_p, kept):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    want = p.clone()
    want[kept:] = 0
    assert_distribution(count_tokens(p.log(), top_p=top_p), want)


@pytest.mark.parametrize('shift', [-10.0, 0.0, 10.0])
def test_repetition_penalty_lowers_logits_of_either_sign(shift):
    logits = LOGITS + shift
    seen = torch.tensor([True, True, False, False, True, False])

    want = []
    for x, is_seen in zip(logits.tolist(), seen.tolist()):
        if is_seen and x > 0:
            x = x / 1.5
        elif is_seen:
            x = x * 1.5
        want.append(x)
    want = torch.tensor(want)

    assert (want[seen] <= logits[seen]).all()
    counts = count_tokens(logits, seen=seen.expand(N, -1), repetition_penalty=1.5)
    assert_distribution(counts, want.softmax(0))


def test_banned_tokens_never_come_and_logits_stay_as_they_were():
    banned = torch.tensor([0, 5])
    before = LOGITS.clone()
    want = LOGITS.softmax(0).index_fill(0, banned, 0)
    assert_distribution(count_tokens(banned=banned), want)
    greedy = sample_next_token(LOGITS[None], SamplingParams(temperature=0), banned=banned)
    assert greedy.item() == 3
    assert torch.equal(LOGITS, before)


def test_greedy_takes_the_most_probable_token():
    rows = torch.stack([LOGITS, -LOGITS])
    assert sample_next_token(rows, SamplingParams(temperature=0)).tolist() == [0, 4]


def test_rows_are_independent():
    rows = torch.tensor([[0.0, 30.0], [30.0, 0.0]])
    generator = torch.Generator().manual_seed(1)
    assert sample_next_token(rows, SamplingParams(), generator=generator).tolist() == [1, 0]


def test_same_seed_same_tokens():
    first = count_tokens(seed=1)
    assert torch.equal(first, count_tokens(seed=1))
    assert not torch.equal(first, count_tokens(seed=2))


@pytest.mark.parametrize('temperature', [1e-7, 1e-40, 5e-324])
def test_temperatures_next_to_zero_are_zero(temperature):
    logits = torch.randn(50, 23)
    got = sample_next_token(logits, SamplingParams(temperature=temperature, top_k=5))
    assert torch.equal(got, logits.argmax(dim=-1))


@pytest.mark.parametrize('use_cache', [True, False])
def test_beam_search_gives_each_prompt_its_own_room(use_cache):
    """A long prompt beside a short one: both end where their own context is full."""
    model = small_gpt(pos='rotary')
    prompts = [[1, 2, 3], [4] * 12, [5, 6], [7] * 16]
    together = beam_search(model, prompts, 10, num_beams=2, use_cache=use_cache)
    assert [len(beams[0][0]) for beams in together] == [10, 5, 10, 1]
    for prompt, beams in zip(prompts, together):
        [alone] = beam_search(model, [prompt], 10, num_beams=2, use_cache=use_cache)
        assert alone[0][0] == beams[0][0]


@pytest.mark.parametrize('prompts', [[], [[]], [[1], []]])
def test_beam_search_needs_prompts(prompts):
    with pytest.raises(ValueError, match='at least one token'):
        beam_search(small_gpt(), prompts, 4, num_beams=2)


def test_extreme_logits_stay_finite():
    huge = torch.tensor([[1e30, -1e30, 0.0]])
    assert sample_next_token(huge, SamplingParams(top_p=0.9, min_p=0.1)).item() == 0
    one_left = torch.tensor([[-math.inf, 5.0, -math.inf]])
    assert sample_next_token(one_left, SamplingParams()).item() == 1


BAD_VALUES = {
    'temperature': (-1, -0.001, math.inf, math.nan),
    'top_k': (0, -5),
    'top_p': (0.0, -0.5, 1.5, math.nan),
    'min_p': (-0.1, 1.1, math.nan),
    'repetition_penalty': (0, -1.0, math.nan),
}


@pytest.mark.parametrize('name, value', [
    (name, value) for name, values in BAD_VALUES.items() for value in values])
def test_sampling_params_refuse_bad_values(name, value):
    params = SamplingParams(**{name: value})
    with pytest.raises(ValueError, match=f'{name} must be .*, got {value}'):
        params.check()
    with pytest.raises(ValueError, match=f'{name} must be .*, got {value}'):
        generate(small_gpt(), [[1]], 1, **{name: value})


@pytest.mark.parametrize('name, value', [
    ('temperature', 0), ('temperature', 100.0), ('top_k', 1), ('top_k', 10**9), ('top_p', 1.0),
    ('top_p', 1e-9), ('min_p', 0.0), ('min_p', 1.0), ('repetition_penalty', 0.5)])
def test_sampling_params_accept_the_ends_of_their_ranges(name, value):
    params = SamplingParams(**{name: value})
    params.check()
    assert 0 <= sample_next_token(LOGITS[None], params, seen=LOGITS[None] > 0).item() < 6
