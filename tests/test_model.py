"""The model's mathematics, against PyTorch's own Transformer layers, plain formulas in float64, and itself without the cache."""
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model as m
from model import GPT, GPTConfig, shift
from pocket import kernels as head_module


def small(seed=0, scale=3.0, **kwargs):
    """A small random GPT; weights are scaled up so that attention is far from uniform and mistakes show."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=16), **kwargs})).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.02 * scale)
    return gpt


SWITCHES = [dict(), dict(pos='sinusoidal', bias=False), dict(pos='rotary', qk_norm=True, norm='rmsnorm', act='relu2', tie_weights=False, token_shift=True),
            dict(norm_position='post', act='relu'), dict(act='swiglu', softcap=5.0, n_inner=24, norm='rmsnorm'),
            dict(pos='rotary', norm_position='post', norm='rmsnorm', gradient_checkpointing=True)]


def test_token_shift():
    """Half of the channels are those of the token before; a row's padding counts as nothing."""
    x = torch.randn(2, 5, 6)
    first = (torch.arange(5) == torch.tensor([[0], [2]]))[..., None]
    got = shift(x, None, None, first)
    want = x.clone()
    for b, start in enumerate((0, 2)):
        for t in range(5):
            want[b, t, :3] = x[b, t - 1, :3] if t > 0 and t != start else 0
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match='token_shift needs an even n_embd, got 15'):
        GPTConfig(n_embd=15, n_head=3, token_shift=True)


def test_gpt2_has_its_124_million_parameters_and_names():
    gpt = GPT(GPTConfig())
    assert gpt.num_params() == 124_439_808
    names = set(gpt.state_dict())
    assert {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.11.attn.c_attn.bias', 'transformer.h.0.mlp.c_proj.weight',
            'transformer.ln_f.bias', 'lm_head.weight'} <= names and len(names) == 12 * 12 + 5
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    proj, fc = gpt.transformer.h[5].mlp.c_proj.weight, gpt.transformer.h[5].mlp.c_fc.weight
    assert abs(fc.std().item() - 0.02) < 2e-4 and abs(proj.std().item() - 0.02 / math.sqrt(24)) < 2e-4


@pytest.mark.parametrize('position', ['pre', 'post'])
def test_equals_pytorchs_transformer_layers(position):
    gpt = small(n_layer=3, n_embd=32, n_head=4, norm_position=position)
    idx = torch.randint(23, (3, 16))
    x = gpt.transformer.wte(idx) + gpt.transformer.wpe(torch.arange(16))
    for block in gpt.transformer.h:
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation=lambda t: F.gelu(t, approximate='tanh'),
                                           norm_first=position == 'pre', batch_first=True)
        for ours, theirs in ((block.attn.c_attn.weight, layer.self_attn.in_proj_weight), (block.attn.c_attn.bias, layer.self_attn.in_proj_bias),
                             (block.attn.c_proj.weight, layer.self_attn.out_proj.weight), (block.attn.c_proj.bias, layer.self_attn.out_proj.bias),
                             (block.mlp.c_fc.weight, layer.linear1.weight), (block.mlp.c_fc.bias, layer.linear1.bias),
                             (block.mlp.c_proj.weight, layer.linear2.weight), (block.mlp.c_proj.bias, layer.linear2.bias),
                             (block.ln_1.weight, layer.norm1.weight), (block.ln_1.bias, layer.norm1.bias),
                             (block.ln_2.weight, layer.norm2.weight), (block.ln_2.bias, layer.norm2.bias)):
            theirs.data.copy_(ours)
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(16), is_causal=True)
    if position == 'pre':
        x = F.layer_norm(x, (32,), gpt.transformer.ln_f.weight, gpt.transformer.ln_f.bias)
    torch.testing.assert_close(gpt(idx)[0], x @ gpt.transformer.wte.weight.T, atol=1e-5, rtol=1e-5)


def test_modern_parts_equal_plain_formulas_in_float64():
    c = dict(pos='rotary', qk_norm=True, norm='rmsnorm', act='swiglu', tie_weights=False, softcap=7.0, bias=False, n_layer=1, n_inner=20)
    gpt = small(**c).double()
    idx, (H, D) = torch.randint(23, (1, 9)), (2, 8)
    w = {k: v for k, v in gpt.state_dict().items()}

    def rms(x, weight=1.0):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def layer_norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def turn(v, t):  # a rotation of each pair of dimensions, written as complex multiplication
        z = torch.complex(v[:D // 2], v[D // 2:]) * torch.exp(1j * t * 10000.0 ** (-torch.arange(0, D, 2) / D).double())
        return torch.cat((z.real, z.imag))

    x = w['transformer.wte.weight'][idx[0]]
    h = rms(x, w['transformer.h.0.ln_1.weight'])
    q, k, v = (h @ w['transformer.h.0.attn.c_attn.weight'].T).split(16, dim=-1)
    y = torch.zeros(9, 16, dtype=torch.float64)
    for head in range(H):
        s = slice(head * D, head * D + D)
        for t in range(9):
            scores = torch.stack([turn(layer_norm(q[t, s]), t) @ turn(layer_norm(k[u, s]), u) / math.sqrt(D) for u in range(t + 1)])
            y[t, s] = scores.softmax(0) @ v[:t + 1, s]
    x = x + y @ w['transformer.h.0.attn.c_proj.weight'].T
    gate, up = (rms(x, w['transformer.h.0.ln_2.weight']) @ w['transformer.h.0.mlp.c_fc.weight'].T).chunk(2, -1)
    x = x + (gate * torch.sigmoid(gate) * up) @ w['transformer.h.0.mlp.c_proj.weight'].T
    want = 7 * torch.tanh(rms(x, w['transformer.ln_f.weight']) @ w['lm_head.weight'].T / 7)
    torch.testing.assert_close(gpt(idx)[0][0], want, atol=1e-6, rtol=1e-6)  # the angles are float32


def test_attend_equals_pytorchs_kernel():
    torch.manual_seed(0)
    for B, H, T, S, D in ((2, 3, 7, 7, 8), (1, 2, 4, 9, 16), (2, 1, 1, 5, 8), (1, 2, 257, 257, 4), (1, 1, 600, 600, 4)):  # … in blocks
        q, k, v = torch.randn(B, H, T, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
        mask = torch.rand(B, 1, T, S) > 0.4
        mask[..., 0] = True
        for kwargs in (dict(), dict(mask=mask), dict(causal=True) if T == S else dict()):
            want = F.scaled_dot_product_attention(q, k, v, attn_mask=kwargs.get('mask'), is_causal=kwargs.get('causal', False))
            torch.testing.assert_close(m.attend(q, k, v, **kwargs), want, atol=1e-5, rtol=1e-5)
    q, k, v = (t.requires_grad_() for t in (q, k, v))  # of the longest: gradients through the blocks
    grads = [torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (
        lambda *qkv: m.attend(*qkv, causal=True), lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True))]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kwargs', SWITCHES)
def test_no_token_sees_the_future(kwargs):
    gpt, idx = small(**kwargs), torch.randint(23, (2, 16))
    before = gpt(idx)[0]
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 23
        after = gpt(changed)[0]
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize('kwargs', SWITCHES[:3])  # of all the others: test_properties.py
def test_generation_with_cache_ragged_and_past_the_context(kwargs):
    """Greedy text is the same with and without the cache, in a batch and alone, from short prompts to ones longer than the context."""
    gpt = small(**kwargs)
    prompts = [torch.randint(23, (n,)).tolist() for n in (1, 3, 16, 40)]
    got = gpt.generate(prompts, 45, temperature=0)
    assert got == gpt.generate(prompts, 45, temperature=0, use_cache=False)
    assert got == [gpt.generate([p], 45, temperature=0)[0] for p in prompts]
    assert [len(row) for row in got] == [46, 48, 61, 85]
    row = got[1]  # and it is what the model, asked anew for each token, says of the window that window() documents
    for n in range(3, len(row)):
        window = row[n - gpt.window(n):n]
        assert row[n] == gpt(torch.tensor([window]))[0][0, -1].argmax()
    assert all(12 < gpt.window(n) <= 16 for n in range(17, 100)) and [gpt.window(n) for n in (1, 16, 17, 20, 21)] == [1, 16, 13, 16, 13]


def test_generate_tensor_like_nanogpt_and_stops_at_eot():
    gpt = small()
    idx = torch.randint(23, (2, 5))
    out = gpt.generate(idx, 7, temperature=0)
    assert out.shape == (2, 12) and torch.equal(out[:, :5], idx)
    eot = out[0, 7].item()
    rows = gpt.generate(idx.tolist(), 7, temperature=0, eot=eot)
    first = out[0, 5:].tolist().index(eot)
    assert rows[0] == out[0, :6 + first].tolist()
    assert gpt.generate([[1, 2]], 0) == [[1, 2]]


@pytest.mark.parametrize('prompts, said', [([[]], 'at least one token'), ([], 'at least one token'), ([[1, 23]], '23'), ([[-1]], '-1')])
def test_bad_prompts(prompts, said):
    with pytest.raises(ValueError, match=said):
        small().generate(prompts, 3)


def test_too_long_for_the_model():
    with pytest.raises(ValueError, match="17 tokens are more than the model's block_size of 16"):
        small()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize('kwargs, said', [
    (dict(n_embd=384, n_head=5), 'n_embd must be divisible by n_head, got 384 and 5'), (dict(pos='rope', act='tanh'), 'act must be one of'),
    (dict(dropout=1.0), 'dropout'), (dict(n_layer=0), 'n_layer'), (dict(n_embd=6, n_head=2, pos='rotary'), 'even'), (dict(n_inner=0), 'n_inner')])
def test_bad_shapes(kwargs, said):
    with pytest.raises(ValueError, match=said):
        GPTConfig(**kwargs)


@pytest.mark.parametrize('smoothing, cap, V', list(itertools.product((0.0, 0.1), (0.0, 3.0), (50, 9001))))
def test_chunked_loss_equals_plain(smoothing, cap, V, monkeypatch):
    torch.manual_seed(0)
    x, w = torch.randn(4, 13, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    bias, targets = torch.randn(V, requires_grad=True), torch.randint(V, (4, 13))
    targets[0, :5] = -1
    logits = x @ w.T + bias
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logp = logits.log_softmax(-1)
    nll = -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    want = (((1 - smoothing) * nll - smoothing * logp.mean(-1)) * (targets != -1)).sum()  # Szegedy et al. 2016, written out
    want_grads = torch.autograd.grad(want * 0.5, (x, w, bias))
    head = m.Head(GPTConfig(n_embd=8, n_head=1, vocab_size=V, softcap=cap, head_bias=True))
    head.weight, head.bias = (torch.nn.Parameter(t.detach().clone()) for t in (w, bias))
    for limit, cached in ((2**24, 2**20), (10 * V, 3 * V)):  # whole, and in slices of ten rows, turned three at a time
        monkeypatch.setattr(head_module, 'MAX_LOGITS', limit)
        monkeypatch.setattr(head_module, 'CACHED', cached)
        got = head.loss(x[targets != -1], targets[targets != -1], smoothing)
        torch.testing.assert_close(got, want)
        for g, wg in zip(torch.autograd.grad(got * 0.5, (x, head.weight, head.bias)), want_grads):
            torch.testing.assert_close(g, wg, atol=1e-5, rtol=1e-4)


def test_large_vocabulary_never_holds_all_logits(monkeypatch):
    """Every result of every operation is looked at: none but the weight and its gradient is as large as all logits."""
    from torch.utils._python_dispatch import TorchDispatchMode
    monkeypatch.setattr(head_module, 'MAX_LOGITS', 1000)
    gpt, seen = small(vocab_size=300).train(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.shape for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t) and 300 in t.shape)
            return out
    idx, targets = torch.randint(300, (2, 16)), torch.randint(300, (2, 16))
    with Watch():
        _, loss = gpt(idx, targets)
        loss.backward()
    C = gpt.config.n_embd
    weights = {(300, C), (C, 300)}
    assert any(s == (3, 300) for s in seen) and all(s.numel() <= 1000 or tuple(s) in weights for s in seen), set(seen)
    assert loss.isfinite()


def test_loss_reductions_and_ignored_targets():
    gpt, idx = small(), torch.randint(23, (2, 16))
    targets = torch.randint(23, (2, 16))
    targets[1, 3:] = -1
    want = F.cross_entropy(gpt(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
    torch.testing.assert_close(gpt(idx, targets, reduction='sum')[1], want)
    torch.testing.assert_close(gpt(idx, targets)[1], want / 19)


@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(dropout):
    grads = []
    for on in (False, True):
        gpt = small(gradient_checkpointing=on, dropout=dropout, attn_dropout=dropout, pos='rotary').train()
        torch.manual_seed(5)
        gpt(torch.arange(16)[None], torch.arange(1, 17)[None])[1].backward()
        grads.append([p.grad for p in gpt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize('p', [0.1, 0.2, 0.5])
def test_dropout_keeps_the_expectation_and_its_rate(p):
    torch.manual_seed(0)
    drop, x = m.Dropout(p).train(), torch.ones(1001, 997)
    y = drop(x)
    n, rate = y.numel(), round(p * 256) / 256
    assert abs((y == 0).float().mean().item() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
    assert abs(y.mean().item() - 1) < 5 * math.sqrt(rate / (1 - rate) / n)
    kept = y[y != 0]
    assert torch.allclose(kept, torch.tensor(1 / (1 - rate)))
    pairs = ((y[:, :-1] == 0) & (y[:, 1:] == 0)).float().mean().item()  # neighbours are independent
    assert abs(pairs - rate * rate) < 5 * math.sqrt(rate * rate / n)
    assert torch.equal(drop.eval()(x), x)
    x = torch.ones(64, 64, requires_grad=True)
    y = drop.train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_rotary_depends_on_distance_only():
    torch.manual_seed(0)
    q, k, angles = torch.randn(8), torch.randn(8), m.position_angles(40, 8)

    def score(i, j):
        a, b = (m.rotate(v.view(1, 1, 1, 8), angles[t].cos().view(1, 1, 4), angles[t].sin().view(1, 1, 4)).flatten() for v, t in ((q, i), (k, j)))
        return a @ b
    assert torch.allclose(score(5, 2), score(38, 35), atol=1e-5) and not torch.allclose(score(5, 2), score(5, 3), atol=1e-3)


def test_zero_init_starts_as_the_unigram_of_nothing():
    gpt = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, zero_init=True, tie_weights=False))
    logits = gpt(torch.randint(11, (1, 8)))[0]
    assert torch.equal(logits, torch.zeros_like(logits)) and gpt.transformer.h[0].attn.c_proj.weight.abs().sum() == 0


def test_bfloat16_autocast_is_close():
    gpt, idx = small(pos='rotary', qk_norm=True, n_embd=32), torch.randint(23, (2, 16))
    with torch.autocast('cpu', torch.bfloat16):
        low = gpt(idx)[0]
    want = gpt(idx)[0]
    assert (low.float() - want).abs().max() < 0.05 * want.abs().max()
