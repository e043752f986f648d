"""
The GPT in model.py: against PyTorch's own Transformer layers, against plain formulas in float64,
and with a cache against itself without one.

Run it alone: pytest -n 0 tests/test_model.py

The encoder-decoder is in test_seq2seq.py, attention and loss by themselves are in test_kernels.py,
models with random switches in test_properties.py.
"""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import (
    GPT,
    MLP,
    Block,
    Context,
    GPTConfig,
    RMSNorm,
    position_angles,
    rotate,
    shift_tokens,
)
from pocket.checkpoint import check_config
from pocket.generate import new_cache, pad_left, window_length

SWITCHES = {
    'gpt2': {},
    'sinusoidal': {'pos': 'sinusoidal', 'bias': False},
    'modern': {'pos': 'rotary', 'qk_norm': True, 'norm': 'rmsnorm', 'act': 'relu2',
               'tie_weights': False, 'token_shift': True},
    'post': {'norm_position': 'post', 'act': 'relu'},
    'swiglu': {'act': 'swiglu', 'softcap': 5.0, 'n_inner': 24, 'norm': 'rmsnorm'},
    'rotary post': {'pos': 'rotary', 'norm_position': 'post', 'norm': 'rmsnorm',
                    'gradient_checkpointing': True},
    'adaptive': {'tie_weights': False, 'cutoffs': (5, 11), 'div_value': 2.0},
}


def small_gpt(**switches):
    """A small random GPT in eval mode.

    Its weights are so large that attention is far from uniform, and mistakes show.
    """
    torch.manual_seed(0)
    shape = {'block_size': 16, 'vocab_size': 23, 'n_layer': 2, 'n_head': 2, 'n_embd': 16}
    model = GPT(GPTConfig(**{**shape, **switches}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.06)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# The parts


def test_rmsnorm_equals_its_formula():
    torch.manual_seed(0)
    norm = RMSNorm(6)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


ACTIVATIONS = {
    'gelu': lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    'gelu_erf': lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    'relu': lambda x: max(0.0, x),
    'relu2': lambda x: max(0.0, x) ** 2,
    'swiglu': lambda x: x * sigmoid(x),  # of the gate
}


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_mlp_applies_the_activation_of_its_config(act):
    mlp = MLP(GPTConfig(n_embd=8, n_head=1, n_inner=5, act=act))
    x = torch.linspace(-3, 3, 10)
    if act == 'swiglu':
        gate, up = x.chunk(2)
        want = [ACTIVATIONS[act](g) * u for g, u in zip(gate.tolist(), up.tolist())]
        assert mlp.c_fc.out_features == 10
    else:
        want = [ACTIVATIONS[act](number) for number in x.tolist()]
        assert mlp.c_fc.out_features == 5
    torch.testing.assert_close(mlp.activate(x), torch.tensor(want))


def test_rotary_depends_on_distance_only():
    torch.manual_seed(0)
    q = torch.randn(8)
    k = torch.randn(8)
    angles = position_angles(40, 8)

    def turn(x, position):
        cos = angles[position].cos().view(1, 1, 4)
        sin = angles[position].sin().view(1, 1, 4)
        return rotate(x.view(1, 1, 1, 8), cos, sin).flatten()

    def score(i, j):
        return turn(q, i) @ turn(k, j)

    assert torch.allclose(score(5, 2), score(38, 35), atol=1e-5)
    assert not torch.allclose(score(5, 2), score(5, 3), atol=1e-3)


def test_token_shift_takes_half_of_the_channels_from_the_token_before():
    """A row's padding counts as nothing."""
    x = torch.randn(2, 5, 6)
    first = (torch.arange(5) == torch.tensor([[0], [2]]))[..., None]  # where each row begins
    got = shift_tokens(x, is_first=first)
    want = x.clone()
    for row, start in enumerate((0, 2)):
        for t in range(5):
            if t == 0 or t == start:
                want[row, t, :3] = 0
            else:
                want[row, t, :3] = x[row, t - 1, :3]
    assert torch.equal(got, want)


@pytest.mark.parametrize('token_shift', [False, True])
@pytest.mark.parametrize('cross', [False, True])
@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_block_equals_its_formula(norm_position, cross, token_shift):
    torch.manual_seed(0)
    config = GPTConfig(n_embd=16, n_head=2, norm_position=norm_position, token_shift=token_shift)
    block = Block(config, layer=0, cross=cross)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 7, 16)
    source = torch.randn(2, 5, 16)
    source_mask = torch.rand(2, 1, 1, 5) > 0.4
    source_mask[..., 0] = True

    def attention(x):
        return block.attn(shift_tokens(x) if token_shift else x, is_causal=True)

    def cross_attention(x):
        return block.cross(x, mask=source_mask, encoded=source)

    def mlp(x):
        return block.mlp(shift_tokens(x) if token_shift else x)

    if norm_position == 'pre':
        want = x + attention(block.ln_1(x))
        if cross:
            want = want + cross_attention(block.ln_x(want))
        want = want + mlp(block.ln_2(want))
    else:
        want = block.ln_1(x + attention(x))
        if cross:
            want = block.ln_x(want + cross_attention(want))
        want = block.ln_2(want + mlp(want))
    memory = (source, source_mask) if cross else None
    got = block(x, Context(is_causal=True), memory=memory)
    torch.testing.assert_close(got, want)


# --------------------------------------------------------------------------------------------------
# The whole model


def test_gpt2_has_its_124_million_parameters_and_names():
    with torch.device('meta'):  # shapes without numbers
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808
    names = set(model.state_dict())
    assert len(names) == 12 * 12 + 5
    assert names >= {
        'transformer.wte.weight', 'transformer.wpe.weight',
        'transformer.h.11.attn.c_attn.bias', 'transformer.h.0.mlp.c_proj.weight',
        'transformer.ln_f.bias', 'lm_head.weight',
    }
    assert model.lm_head.weight is model.transformer.wte.weight


def test_init_is_gpt2s():
    """A standard deviation of 0.02, divided by √(2 n_layer) where a block adds to what it reads."""
    model = GPT(GPTConfig(vocab_size=64, n_layer=3))
    mlp = model.transformer.h[1].mlp
    assert abs(mlp.c_fc.weight.std().item() - 0.02) < 2e-4
    assert abs(mlp.c_proj.weight.std().item() - 0.02 / math.sqrt(6)) < 2e-4


def copy_block(block, layer):
    """Copy the weights of one of our blocks into an nn.TransformerEncoderLayer."""
    layer.self_attn.in_proj_weight.data.copy_(block.attn.c_attn.weight)
    layer.self_attn.in_proj_bias.data.copy_(block.attn.c_attn.bias)
    layer.self_attn.out_proj.load_state_dict(block.attn.c_proj.state_dict())
    layer.linear1.load_state_dict(block.mlp.c_fc.state_dict())
    layer.linear2.load_state_dict(block.mlp.c_proj.state_dict())
    layer.norm1.load_state_dict(block.ln_1.state_dict())
    layer.norm2.load_state_dict(block.ln_2.state_dict())


@pytest.mark.parametrize('norm_position', ['pre', 'post'])
def test_gpt_equals_pytorchs_transformer_layers(norm_position):
    model = small_gpt(n_layer=3, n_embd=32, n_head=4, norm_position=norm_position)
    idx = torch.randint(23, (3, 16))
    mask = nn.Transformer.generate_square_subsequent_mask(16)

    def gelu(x):
        return F.gelu(x, approximate='tanh')

    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(16))
    for block in model.transformer.h:
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation=gelu,
                                           norm_first=norm_position == 'pre', batch_first=True)
        copy_block(block, layer)
        x = layer(x, src_mask=mask, is_causal=True)
    if norm_position == 'pre':
        x = F.layer_norm(x, (32,), model.transformer.ln_f.weight, model.transformer.ln_f.bias)
    want = x @ model.transformer.wte.weight.T

    logits, loss = model(idx)
    assert loss is None
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_modern_parts_equal_plain_formulas_in_float64():
    """Rotary positions, QK-norm, RMSNorm, SwiGLU and softcap, a number at a time."""
    H, D, T = 2, 8, 9
    model = small_gpt(pos='rotary', qk_norm=True, norm='rmsnorm', act='swiglu', tie_weights=False,
                      softcap=7.0, bias=False, n_layer=1, n_inner=20).double()
    idx = torch.randint(23, (1, T))
    weights = model.state_dict()

    def weight(name):
        return weights[f'transformer.h.0.{name}.weight']

    def rms_norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def layer_norm(x):
        variance = x.var(-1, unbiased=False, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()

    def turn(x, t):
        """The rotation of each pair of channels, written as a complex multiplication."""
        frequencies = (10000.0 ** (-torch.arange(0, D, 2) / D)).double()
        z = torch.complex(x[:D // 2], x[D // 2:]) * torch.exp(1j * t * frequencies)
        return torch.cat((z.real, z.imag))

    x = weights['transformer.wte.weight'][idx[0]]
    h = rms_norm(x, weight('ln_1'))
    q, k, v = (h @ weight('attn.c_attn').T).split(H * D, dim=-1)
    y = torch.zeros(T, H * D, dtype=torch.float64)
    for head in range(H):
        channels = slice(head * D, (head + 1) * D)
        for t in range(T):
            query = turn(layer_norm(q[t, channels]), t)
            scores = []
            for s in range(t + 1):
                key = turn(layer_norm(k[s, channels]), s)
                scores.append(query @ key / math.sqrt(D))
            y[t, channels] = torch.stack(scores).softmax(0) @ v[:t + 1, channels]
    x = x + y @ weight('attn.c_proj').T
    gate, up = (rms_norm(x, weight('ln_2')) @ weight('mlp.c_fc').T).chunk(2, -1)
    x = x + (gate * torch.sigmoid(gate) * up) @ weight('mlp.c_proj').T
    x = rms_norm(x, weights['transformer.ln_f.weight'])
    want = 7 * torch.tanh(x @ weights['lm_head.weight'].T / 7)

    logits, _ = model(idx)
    torch.testing.assert_close(logits[0], want, atol=1e-6, rtol=1e-6)  # the angles are float32


@pytest.mark.parametrize('name', SWITCHES)
def test_no_token_sees_the_future(name):
    model = small_gpt(**SWITCHES[name])
    idx = torch.randint(23, (2, 16))
    before, _ = model(idx)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 23
        after, _ = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t:], after[:, t:])


def test_loss_ignores_tokens_without_a_target():
    model = small_gpt()
    idx = torch.randint(23, (2, 16))
    logits, _ = model(idx)
    targets = torch.randint(23, (2, 16))
    targets[0, :5] = logits[0, :5].argmax(-1)  # otherwise hardly any would be correct
    targets[1, 3:] = -1
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                           reduction='sum')
    no_logits, mean = model(idx, targets)
    assert no_logits is None
    torch.testing.assert_close(mean, want / 19)
    _, summed = model(idx, targets, reduction='sum')
    torch.testing.assert_close(summed, want)

    _, sum_and_correct = model(idx, targets, reduction='sum_and_correct')
    correct = (logits.argmax(-1) == targets).sum().float()
    assert 5 <= correct < 19
    torch.testing.assert_close(sum_and_correct, torch.stack((want, correct)))


@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(dropout):
    idx = torch.arange(16)[None]
    gradients = []
    for gradient_checkpointing in (False, True):
        model = small_gpt(gradient_checkpointing=gradient_checkpointing, dropout=dropout,
                          attn_dropout=dropout, pos='rotary').train()
        torch.manual_seed(5)
        _, loss = model(idx, idx + 1)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for without, with_checkpointing in zip(*gradients):
        assert torch.equal(without, with_checkpointing)


def test_bfloat16_autocast_is_close():
    model = small_gpt(pos='rotary', qk_norm=True, n_embd=32)
    idx = torch.randint(23, (2, 16))
    want, _ = model(idx)
    with torch.autocast('cpu', torch.bfloat16):
        logits, _ = model(idx)
    assert (logits.float() - want).abs().max() < 0.05 * want.abs().max()


def test_a_text_longer_than_block_size_is_refused():
    model = small_gpt()
    message = "17 tokens exceed the model's block_size 16"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = new_cache(model, 1, 17)
    model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 7, dtype=torch.long), cache=cache)


# --------------------------------------------------------------------------------------------------
# Initial weights: the table in LanguageModel._init_weights, row by row


def assert_std(weight, std):
    """That weights have a standard deviation, up to five standard errors; 0 means all are zero."""
    standard_error = std / math.sqrt(2 * weight.numel())
    assert abs(weight.std().item() - std) <= 5 * standard_error
    assert abs(weight.mean().item()) <= 5 * std / math.sqrt(weight.numel())


def assert_xavier(weight):
    """That a matrix is uniform, between bounds that depend on its fan-in and fan-out."""
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert_std(weight, bound / math.sqrt(3))


def assert_biases_are_zero(model):
    biases = [p for name, p in model.named_parameters() if name.endswith('bias')]
    assert len(biases) > 0
    for bias in biases:
        assert not bias.any()


@pytest.mark.parametrize('zero_init', [False, True])
def test_initial_weights_of_gpt2(zero_init):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=3, n_head=2, n_embd=64,
                          tie_weights=False, head_bias=True, zero_init=zero_init))
    assert_std(model.transformer.wte.weight, 0.02)
    assert_std(model.transformer.wpe.weight, 0.02)
    assert_std(model.lm_head.weight, 0 if zero_init else 0.02)
    for block in model.transformer.h:
        assert_std(block.attn.c_attn.weight, 0.02)
        assert_std(block.mlp.c_fc.weight, 0.02)
        for c_proj in (block.attn.c_proj, block.mlp.c_proj):
            assert_std(c_proj.weight, 0 if zero_init else 0.02 / math.sqrt(2 * 3))
        for norm in (block.ln_1, block.ln_2):
            assert torch.equal(norm.weight, torch.ones(64))
    assert_biases_are_zero(model)


@pytest.mark.parametrize('zero_init', [False, True])
def test_initial_weights_by_xavier(zero_init):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=3, n_head=2, n_embd=64,
                          init='xavier', tie_weights=False, head_bias=True, zero_init=zero_init))
    assert_std(model.transformer.wte.weight, 1 / 8)
    assert_std(model.transformer.wpe.weight, 1 / 8)
    assert_std(model.lm_head.weight, 0 if zero_init else 1 / 8)
    for block in model.transformer.h:
        for matrix in block.attn.c_attn.weight.split(64):  # queries, keys, values
            assert_xavier(matrix)
        assert_xavier(block.mlp.c_fc.weight)
        for c_proj in (block.attn.c_proj, block.mlp.c_proj):
            if zero_init:
                assert_std(c_proj.weight, 0)
            else:
                assert_xavier(c_proj.weight)
    assert_biases_are_zero(model)


@pytest.mark.parametrize('init, std', [('gpt2', 0.02), ('xavier', 1 / 8)])
def test_zero_init_leaves_a_tied_embedding_alone(init, std):
    model = GPT(GPTConfig(block_size=8, vocab_size=500, n_layer=1, n_head=2, n_embd=64, init=init,
                          zero_init=True))
    assert_std(model.transformer.wte.weight, std)


def test_zero_init_starts_with_the_loss_of_guessing():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8,
                          zero_init=True, tie_weights=False))
    idx = torch.randint(11, (1, 8))
    logits, _ = model(idx)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert not model.transformer.h[0].attn.c_proj.weight.any()
    _, loss = model(idx, idx)
    assert loss.item() == pytest.approx(math.log(11), abs=1e-6)


# --------------------------------------------------------------------------------------------------
# The cache


def prefill(model, idx, cache, chunk_size):
    """Logits (B, T, V) of idx, read in chunks."""
    logits = []
    for chunk in idx.split(chunk_size, dim=1):
        logits_of_chunk, _ = model(chunk, cache=cache)
        logits.append(logits_of_chunk)
    assert cache.length == idx.size(1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize('name', SWITCHES)
@pytest.mark.parametrize('chunk_size', [1, 3, 7, 16])
@torch.no_grad()
def test_prefill_in_chunks_equals_one_pass(name, chunk_size):
    model = small_gpt(**SWITCHES[name])
    idx = torch.randint(23, (3, 16))
    got = prefill(model, idx, new_cache(model, 3, 16), chunk_size)
    want, _ = model(idx)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', SWITCHES)
@pytest.mark.parametrize('chunk_size', [1, 3, 7, 16])
@torch.no_grad()
def test_prefill_of_padded_rows_equals_each_row_alone(name, chunk_size):
    """Also when the padding of a row is longer than the first chunk."""
    model = small_gpt(**SWITCHES[name])
    rows = [torch.randint(23, (length,)).tolist() for length in (16, 11, 5, 1)]
    idx, pad = pad_left(rows, 'cpu')
    got = prefill(model, idx, new_cache(model, 4, 16, pad), chunk_size)
    for i, row in enumerate(rows):
        want, _ = model(torch.tensor([row]))
        torch.testing.assert_close(got[i, -len(row):], want[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', SWITCHES)
@torch.no_grad()
def test_next_token_logits_are_the_last_logits(name):
    model = small_gpt(**SWITCHES[name])
    idx = torch.randint(23, (3, 16))
    want, _ = model(idx)
    cache = new_cache(model, 3, 16)
    after_prompt = model.next_token_logits(idx[:, :9], cache)
    torch.testing.assert_close(after_prompt, want[:, 8], atol=1e-5, rtol=1e-5)
    after_another = model.next_token_logits(idx[:, 9:10], cache)
    torch.testing.assert_close(after_another, want[:, 9], atol=1e-5, rtol=1e-5)
    assert cache.length == 10


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize('name', ['gpt2', 'sinusoidal', 'modern'])  # others: test_properties.py
def test_generation_is_the_same_with_and_without_cache_in_a_batch_and_alone(name):
    """Greedy, from short prompts to ones longer than block_size."""
    model = small_gpt(**SWITCHES[name])
    prompts = [torch.randint(23, (length,)).tolist() for length in (1, 3, 16, 40)]
    got = model.generate(prompts, 45, temperature=0)
    assert [len(row) for row in got] == [46, 48, 61, 85]
    assert got == model.generate(prompts, 45, temperature=0, use_cache=False)
    alone = [model.generate([prompt], 45, temperature=0)[0] for prompt in prompts]
    assert got == alone

    # And it is what the model, asked anew for each token, says of the documented window
    row = got[1]
    for length in range(3, len(row)):
        window = row[length - window_length(length, 16):length]
        logits, _ = model(torch.tensor([window]))
        assert row[length] == logits[0, -1].argmax()


def test_generate_continues_a_tensor_and_stops_lists_at_eos():
    model = small_gpt()
    idx = torch.randint(23, (2, 5))
    continued = model.generate(idx, 7, temperature=0)
    assert continued.shape == (2, 12)
    assert torch.equal(continued[:, :5], idx)

    eos_id = continued[0, 7].item()
    rows = model.generate(idx.tolist(), 7, temperature=0, eos_id=eos_id)
    first = continued[0, 5:].tolist().index(eos_id)
    assert rows[0] == continued[0, :5 + first + 1].tolist()
    assert model.generate([[1, 2]], 0) == [[1, 2]]


@pytest.mark.parametrize('prompts, message', [
    ([[]], 'at least one token'), ([], 'at least one token'), ([[1, 23]], '23'), ([[-1]], '-1')])
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        small_gpt().generate(prompts, 3)


# --------------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize('name', SWITCHES)
def test_configs_of_these_tests_pass_the_check(name):
    check_config(small_gpt(**SWITCHES[name]).config)


@pytest.mark.parametrize('wrong, message', [
    ({'n_embd': 384, 'n_head': 5}, 'n_embd must be divisible by n_head, got 384 and 5'),
    ({'pos': 'rope'}, "pos must be one of learned, sinusoidal, rotary, got 'rope'"),
    ({'act': 'tanh'}, "act must be one of gelu, .*, got 'tanh'"),
    ({'dropout': 1.0}, 'dropout must be at least 0 and below 1, got 1.0'),
    ({'n_layer': 0}, 'n_layer must be from 1 to 1,024, got 0'),
    ({'n_inner': 0}, 'n_inner must be from 1 to'),
    ({'n_embd': 6, 'n_head': 2, 'pos': 'rotary'}, 'rotary positions need an even n_embd / n_head'),
    ({'n_embd': 15, 'n_head': 3, 'token_shift': True}, 'token_shift needs an even n_embd, got 15'),
])
def test_a_config_that_no_model_can_have_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_config(GPTConfig(**wrong))


def test_all_that_is_wrong_with_a_config_is_said_at_once():
    config = GPTConfig(pos='rope', act='tanh', n_layer=0, n_embd=384, n_head=5)
    with pytest.raises(ValueError) as error:
        check_config(config)
    for name in ('pos', 'act', 'n_layer', 'n_embd'):
        assert f'{name} must be' in str(error.value)


def test_a_model_whose_heads_do_not_divide_its_width_is_refused():
    with pytest.raises(AssertionError, match='n_embd must be divisible by n_head'):
        GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_embd=16, n_head=3))
