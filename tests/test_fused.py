"""
pocket/fused.py: every function in C, and its gradient, against plain PyTorch in float64.

Run it alone: pytest -n 0 tests/test_fused.py
"""
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, LayerNorm, normalize, plain_attention, rotate
from pocket import fused, native
from pocket.kernels import Dropout

pytestmark = pytest.mark.skipif(not fused.is_available(), reason='no C compiler with OpenMP')

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of a whole tensor, relative
DTYPES = pytest.mark.parametrize('dtype', list(TOLERANCE))


def check(ours, reference, inputs, dtype):
    """Both functions of the inputs, and the gradients of a random sum of their outputs, agree."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    outputs = as_list(ours(*inputs))
    exact_outputs = as_list(reference(*exact_inputs))
    weights = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights)
    exact_weights = [weight.double() for weight in weights]
    exact_gradients = torch.autograd.grad(exact_outputs, exact_inputs, exact_weights)
    for y, exact in zip([*outputs, *gradients], [*exact_outputs, *exact_gradients]):
        assert y.dtype == dtype
        assert y.shape == exact.shape
        assert (y.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def as_list(outputs):
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@DTYPES
@pytest.mark.parametrize('width', [5, 7, 64, 100, 384])
@pytest.mark.parametrize('has_bias', [True, False])
def test_layer_norm(width, has_bias, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, width) + 1, torch.randn(width), torch.randn(width)]
    if not has_bias:
        inputs.pop()

    def ours(x, weight, bias=None):
        return fused.norm(x, weight, bias, 1e-5, is_layer_norm=True)

    def reference(x, weight, bias=None):
        return F.layer_norm(x, (width,), weight, bias, 1e-5)

    check(ours, reference, inputs, dtype)


@DTYPES
def test_rms_norm(dtype):
    torch.manual_seed(0)
    check(lambda x, weight: fused.norm(x, weight, None, 1e-6, is_layer_norm=False),
          lambda x, weight: F.rms_norm(x, (40,), weight, 1e-6),
          [torch.randn(200, 40), torch.randn(40)], dtype)


def test_gradients_of_a_norm_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x = torch.randn(1001, 24, requires_grad=True)
    weight = torch.randn(24, requires_grad=True)
    threads = torch.get_num_threads()
    gradients = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = fused.norm(x, weight, None, 1e-5, is_layer_norm=True)
            gradients.append(torch.autograd.grad(y.square().sum(), [x, weight]))
    finally:
        torch.set_num_threads(threads)
    for dx, dweight in gradients[1:]:
        assert torch.equal(dx, gradients[0][0])
        assert torch.equal(dweight, gradients[0][1])


@DTYPES
@pytest.mark.parametrize('H, G, D', [(3, 3, 20), (4, 2, 16), (4, 1, 64), (2, 2, 6)])
@pytest.mark.parametrize('qk_norm', [True, False])
@pytest.mark.parametrize('is_rotary', [True, False])
def test_heads(H, G, D, qk_norm, is_rotary, dtype):
    torch.manual_seed(0)
    B, T = 3, 11
    attn = SimpleNamespace(head_dim=D, q_width=H * D, kv_width=G * D, qk_norm=qk_norm, q_norm=None)
    rope = None
    if is_rotary:
        angles = torch.randn(T, 1, D // 2)
        rope = angles.cos(), angles.sin()
    qkv = torch.randn(B, T, (H + 2 * G) * D)
    assert fused.can_split_heads(qkv, attn, rope)

    def reference(qkv):
        q, k, v = qkv.view(B, T, H + 2 * G, D).split((H, G, G), dim=2)
        if qk_norm:
            q = normalize(q)
            k = normalize(k)
        if is_rotary:
            q = rotate(q, *(table.double() for table in rope))
            k = rotate(k, *(table.double() for table in rope))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    check(lambda qkv: fused.split_heads(qkv, attn, rope), reference, [qkv], dtype)


@DTYPES
@pytest.mark.parametrize('B, H, T, S, who', [
    (2, 3, 7, 7, 'causal'),
    (1, 1, 1, 1, 'causal'),
    (2, 2, fused.QUERY_BLOCK + 1, fused.QUERY_BLOCK + 1, 'causal'),
    (1, 2, 600, 600, 'causal'),
    (3, 2, 20, 31, 'all'),
    (3, 2, 20, 31, 'padded'),
    (40, 12, 64, 64, 'padded'),
])
def test_attention(B, H, T, S, who, dtype):
    torch.manual_seed(0)
    D = 8
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    mask = None
    if who == 'padded':
        mask = torch.rand(B, 1, 1, S) > 0.4
        mask[..., -1] = True  # no row may be empty
    assert fused.can_attend(q, k, mask)
    check(lambda q, k, v: fused.attention(q, k, v, mask, who == 'causal'),
          lambda q, k, v: plain_attention(q, k, v, mask, who == 'causal'), [q, k, v], dtype)


@pytest.mark.parametrize('largest', [50.0, 1e4])
def test_attention_to_one_key_alone(largest):
    """Scores so far apart that all weights but one are next to nothing."""
    q = torch.full((1, 1, 3, 4), largest)
    k = torch.randn(1, 1, 3, 4)
    v = torch.randn(1, 1, 3, 4)
    got = fused.attention(q, k, v, None, False)
    torch.testing.assert_close(got, plain_attention(q, k, v))


@DTYPES
@pytest.mark.parametrize('kind, formula', [
    ('squared_relu', lambda x: F.relu(x).square()),
    ('gelu', lambda x: F.gelu(x, approximate='tanh')),
])
def test_nonlinearities(kind, formula, dtype):
    torch.manual_seed(0)
    x = torch.cat((3 * torch.randn(5000), torch.tensor([0.0, -0.0, 30.0, -30.0, 1e-30])))
    check(lambda x: fused.activate(x, kind), formula, [x], dtype)


@DTYPES
@pytest.mark.parametrize('p', [0.001, 0.3, 0.9])
def test_dropout(p, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 700)
    keep = Dropout(p).draw(x)
    kept = (keep.bytes > keep.threshold).double()
    check(lambda x: fused.dropout(x, keep), lambda x: x * kept * keep.scale, [x], dtype)


@DTYPES
@pytest.mark.parametrize('width', [1, 2, 7, 64])
def test_token_shift(width, dtype):
    torch.manual_seed(0)
    half = (width + 1) // 2

    def reference(x):
        earlier = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return torch.cat((earlier[..., :half], x[..., half:]), dim=-1)

    check(fused.shift_tokens, reference, [torch.randn(3, 5, width)], dtype)


def test_norm_of_bfloat16_has_gradients_in_the_precision_of_its_weights():
    """As in training: activations are bfloat16, weights float32."""
    torch.manual_seed(0)
    x = torch.randn(700, 30).bfloat16().requires_grad_()
    weight = torch.randn(30, requires_grad=True)
    bias = torch.randn(30, requires_grad=True)
    dy = torch.randn(700, 30).bfloat16()
    y = fused.norm(x, weight, bias, 1e-5, is_layer_norm=True)
    gradients = torch.autograd.grad(y, [x, weight, bias], dy)
    exact = [x.detach().double(), weight.detach().double(), bias.detach().double()]
    exact = [tensor.requires_grad_() for tensor in exact]
    want = torch.autograd.grad(F.layer_norm(exact[0], (30,), *exact[1:]), exact, dy.double())
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, theirs, tolerance in zip(gradients, want, (8e-3, 1e-5, 1e-5)):
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm()


def test_dropout_of_attention_weights_in_several_blocks():
    """With the same random numbers as in the plain formula, applied to each block."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 300, 8, requires_grad=True) for _ in range(3)]
    dropout = Dropout(0.25)

    torch.manual_seed(1)
    y = fused.attention(*inputs, None, True, dropout)
    gradients = torch.autograd.grad(y.square().sum(), inputs)

    torch.manual_seed(1)
    q, k, v = inputs
    blocks = []
    for queries, keys in fused.query_blocks(300, 300, is_causal=True):
        scores = q[:, :, queries] @ k[:, :, keys].mT / 8**0.5
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(queries.start + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        blocks.append(dropout(weights.flatten(0, 1)).view(weights.shape) @ v[:, :, keys])
    want = torch.cat(blocks, dim=2)
    torch.testing.assert_close(y, want)
    want_gradients = torch.autograd.grad(want.square().sum(), inputs)
    torch.testing.assert_close(gradients, want_gradients, atol=1e-4, rtol=1e-4)


def test_keys_that_are_not_seen_have_no_weight_at_all():
    """Not even a denormal one, with which products would take many times as long."""
    mask = torch.tensor([True, False, True, False]).view(1, 1, 1, 4)
    q = torch.randn(1, 1, 2, 4)
    v = torch.tensor([0.0, torch.inf, 0.0, torch.inf]).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    finite = torch.where(v.isinf(), torch.finfo(torch.float32).max, v)
    assert (fused.attention(q, torch.randn(1, 1, 4, 4), finite, mask, False) == 0).all()


@DTYPES
def test_what_is_not_a_number_stays_so(dtype):
    """Otherwise training would not notice that it has diverged."""
    x = torch.randn(3, 5, 8).to(dtype)
    x[1, 2, 3] = torch.nan
    weight = torch.ones(8)
    assert fused.norm(x, weight, None, 1e-5, True)[1, 2].isnan().all()
    huge = torch.full((1, 8), 1e30, dtype=dtype)
    assert fused.norm(huge, weight, None, 1e-5, False).isnan().all()
    for kind in native.ACTIVATIONS:
        assert fused.activate(x, kind)[1, 2, 3].isnan()
    q = x.view(1, 3, 5, 8)
    assert fused.attention(q, q, torch.ones_like(q), None, True)[0, 1, 2:].isnan().all()
    nothing_seen = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert fused.attention(q, q, q, nothing_seen, False).isnan().all()


def test_attention_of_float32_under_autocast():
    q = torch.randn(1, 2, 3, 8)
    with torch.autocast('cpu', torch.bfloat16):
        y = fused.attention(q, q, q, None, True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain_attention(q, q, q, is_causal=True), atol=0.05, rtol=0)


def test_inputs_of_any_layout_and_frozen_weights():
    torch.manual_seed(0)
    x = torch.randn(8, 6, 5).transpose(0, 2).requires_grad_()  # (5, 6, 8), not contiguous
    weight = torch.randn(8)  # without a gradient
    y = fused.norm(x, weight, None, 1e-5, True)
    y.sum().backward()  # whose gradient is one number, expanded
    want = x.detach().clone().requires_grad_()
    F.layer_norm(want, (8,), weight).sum().backward()
    torch.testing.assert_close(x.grad, want.grad, atol=1e-5, rtol=1e-5)
    assert fused.norm(torch.ones(0, 3, 8), weight, None, 1e-5, True).shape == (0, 3, 8)
    q = torch.randn(0, 2, 3, 8)
    assert fused.attention(q, q, q, None, True).shape == q.shape


def test_a_norm_of_another_width_is_an_error_not_a_crash():
    with pytest.raises(ValueError, match='width 4'):
        LayerNorm(4)(torch.ones(2, 8))


MODERN = dict(pos='rotary', act='relu2', qk_norm=True, token_shift=True)


@pytest.mark.parametrize('config', [{}, MODERN, {**MODERN, 'n_kv_head': 1, 'norm': 'rmsnorm'}])
def test_a_model_learns_the_same_with_and_without_c(config, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=300, vocab_size=23, n_layer=2, n_head=2, n_embd=32, **config))
    idx = torch.randint(23, (2, 300))

    def gradients():
        model.zero_grad()
        model(idx, idx)[1].backward()
        return [p.grad for p in model.parameters()]

    with_c = gradients()
    monkeypatch.setattr(fused, 'can_fuse', lambda x: False)
    for ours, plain in zip(with_c, gradients()):
        assert (ours - plain).norm() <= 1e-4 * plain.norm() + 1e-7


def test_what_c_can_not_do_is_left_to_pytorch(monkeypatch):
    x = torch.randn(2, 3, 4)
    assert fused.can_fuse(x)
    assert not fused.can_fuse(x.double())
    assert not fused.can_fuse(x.to('meta'))
    assert not fused.can_fuse(torch.empty(1, native.LARGEST_ARRAY + 1))
    assert not fused.can_attend(x[None], x[None], torch.ones(1, 1, 2, 3, dtype=torch.bool))
    one_mask_for_all = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    assert not fused.can_attend(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), one_mask_for_all)
    too_long = torch.empty(1, 1, native.LARGEST_ARRAY + 1, 4)
    assert not fused.can_attend(x[None], too_long, None)
    monkeypatch.setattr(fused, 'load_library', lambda: None)
    assert not fused.can_fuse(x)


@pytest.mark.parametrize('threads, expected', [(1, True), (2, False)])
def test_c_on_one_core_does_not_replace_pytorch_on_several(threads, expected, monkeypatch):
    """As clang without its OpenMP library, or a Mac's compiler, makes it."""
    monkeypatch.setattr(fused, 'load_library', lambda: SimpleNamespace(uses_all_cores=False))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    assert fused.can_fuse(torch.randn(2, 3)) is expected
