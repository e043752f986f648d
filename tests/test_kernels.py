"""
pocket/kernels.py: each fast version against the plain formula in model.py that it stands for, and
the plain formulas against PyTorch's own and textbooks'.

Run it alone: pytest -n 0 tests/test_kernels.py
"""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from model import (
    GPT,
    AdaptiveHead,
    GPTConfig,
    Head,
    Seq2Seq,
    Seq2SeqConfig,
    plain_attention,
    plain_cross_entropy,
)
from pocket import fused, kernels
from pocket.kernels import Dropout

# --------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize('p', [0.1, 0.2, 0.5])
def test_dropout_keeps_the_expectation_and_its_rate(p):
    torch.manual_seed(0)
    y = Dropout(p).train()(torch.ones(1001, 997))
    n = y.numel()
    rate = round(p * 256) / 256
    dropped = y == 0
    assert abs(dropped.float().mean().item() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
    assert abs(y.mean().item() - 1) < 5 * math.sqrt(rate / (1 - rate) / n)
    assert torch.allclose(y[~dropped], torch.tensor(1 / (1 - rate)))

    both = (dropped[:, :-1] & dropped[:, 1:]).float().mean().item()  # neighbors are independent
    assert abs(both - rate * rate) < 5 * math.sqrt(rate * rate / n)


@pytest.mark.parametrize('p, rounding', [(0.001, 0), (0.1, 1 / 512), (0.5, 0), (0.999, 0)])
def test_dropout_drops_as_much_as_nn_dropout(p, rounding):
    """Also when p is so close to 0 or 1 that a byte can't tell it from them."""
    torch.manual_seed(0)
    x = torch.ones(1000, 1000)
    ours = Dropout(p).train()(x)
    theirs = nn.Dropout(p).train()(x)
    chance = 5 * math.sqrt(2 * p * (1 - p) / x.numel())
    our_rate = (ours == 0).float().mean()
    their_rate = (theirs == 0).float().mean()
    assert abs(our_rate - their_rate) < rounding + chance
    assert abs(ours.mean() - 1) < 5 * math.sqrt(p / (1 - p) / x.numel())


def test_dropout_passes_gradients_where_it_passes_values():
    x = torch.ones(64, 64, requires_grad=True)
    y = Dropout(0.2).train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_in_eval_mode_or_at_zero_does_nothing():
    x = torch.randn(64, 64)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


@pytest.mark.parametrize('shape', [(1,), (3, 5, 7), (2, 0, 4)])
def test_dropout_takes_any_shape_and_bfloat16(shape):
    """Eight elements share a random number: their number need not be a multiple of it."""
    torch.manual_seed(0)
    y = Dropout(0.5).train()(torch.ones(shape, dtype=torch.bfloat16))
    assert y.shape == shape
    assert y.dtype == torch.bfloat16
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_dropout_draws_anew_each_time_but_repeats_with_the_seed():
    x = torch.ones(999)
    dropout = Dropout(0.5).train()
    torch.manual_seed(3)
    first = dropout(x)
    second = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


# --------------------------------------------------------------------------------------------------
# Attention

SHAPES = {  # (B, H, T, S, D)
    'a short text': (2, 3, 7, 7, 8),
    'a text that continues a cache': (1, 2, 4, 9, 16),
    'T == 1': (2, 1, 1, 5, 8),
    'a whole block of queries': (1, 2, fused.QUERY_BLOCK, fused.QUERY_BLOCK, 4),
    'one query more than a block': (1, 2, fused.QUERY_BLOCK + 1, fused.QUERY_BLOCK + 1, 4),
    'three blocks, the last one short': (1, 1, 600, 600, 4),
}
CASES = []
for shape_name, (_, _, num_queries, num_keys, _) in SHAPES.items():
    CASES.append((shape_name, 'all'))
    CASES.append((shape_name, 'mask'))
    if num_queries == num_keys:
        CASES.append((shape_name, 'causal'))


def random_attention(shape_name, who, dtype=torch.float32):
    """Random ([q, k, v], options) for attention.

    who: the keys that a query sees: 'all' of them, those in a 'mask', or 'causal'.
    """
    torch.manual_seed(0)
    B, H, T, S, D = SHAPES[shape_name]
    q = torch.randn(B, H, T, D, dtype=dtype)
    k = torch.randn(B, H, S, D, dtype=dtype)
    v = torch.randn(B, H, S, D, dtype=dtype)
    options = {}
    if who == 'mask':
        mask = torch.rand(B, 1, T, S) > 0.4
        mask[..., 0] = True  # no row may be empty
        options['mask'] = mask
    if who == 'causal':
        options['is_causal'] = True
    return [q, k, v], options


@pytest.fixture(params=['C', 'PyTorch'])
def language(request, monkeypatch):
    """Attention in C, where there is a compiler, and without it."""
    if request.param == 'PyTorch':
        monkeypatch.setattr(fused, 'can_fuse', lambda x: False)


def output_and_gradients(function, inputs, constants=(), **options):
    """The output of a function of tensors and, of the sum of its squares, each one's gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs, *constants, **options)
    gradients = torch.autograd.grad(y.float().square().sum(), inputs)
    return [y.detach(), *gradients]


@pytest.mark.parametrize('shape_name, who', CASES)
def test_plain_attention_equals_pytorchs(shape_name, who):
    inputs, options = random_attention(shape_name, who)
    got = output_and_gradients(plain_attention, inputs, **options)
    theirs = {'attn_mask': options.get('mask'), 'is_causal': options.get('is_causal', False)}
    want = output_and_gradients(F.scaled_dot_product_attention, inputs, **theirs)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('shape_name, who', CASES)
@pytest.mark.parametrize('by', ['C', 'products', "PyTorch's kernel"])
def test_attention_equals_plain_attention(shape_name, who, by, monkeypatch):
    """Forward and gradients."""
    inputs, options = random_attention(shape_name, who)
    if by == 'products':
        monkeypatch.setattr(fused, 'can_fuse', lambda x: False)
    if by == "PyTorch's kernel":
        monkeypatch.setattr(kernels, 'MAX_SCORES', 0)
    got = output_and_gradients(kernels.attention, inputs, **options)
    want = output_and_gradients(plain_attention, inputs, **options)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures('language')
@pytest.mark.parametrize('shape_name, who', CASES)
def test_attention_in_bfloat16_is_close_to_float32(shape_name, who):
    inputs, options = random_attention(shape_name, who, torch.bfloat16)
    got = output_and_gradients(kernels.attention, inputs, **options)
    exact = [x.float() for x in inputs]
    want = output_and_gradients(plain_attention, exact, **options)
    for ours, theirs in zip(got, want):
        assert ours.dtype == torch.bfloat16
        error = (ours.float() - theirs).abs().max()
        assert error < 0.025 * theirs.abs().max(), (error, theirs.abs().max())


@pytest.mark.usefixtures('language')
def test_attention_weights_of_blocks_see_no_later_key():
    """A key and a value at the end of the text change the last token's output only."""
    (q, k, v), _ = random_attention('three blocks, the last one short', 'causal')
    before = kernels.attention(q, k, v, is_causal=True)
    k[:, :, -1] += 5
    v[:, :, -1] += 5
    after = kernels.attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert not torch.allclose(before[:, :, -1], after[:, :, -1])


def test_generation_before_training_does_not_break_gradients(monkeypatch):
    """The causal bias is cached: one made in inference mode must do for autograd, too."""
    monkeypatch.setattr(fused, 'can_fuse', lambda x: False)
    monkeypatch.setattr(kernels, 'is_pytorchs_faster', lambda q, S: False)
    inputs, options = random_attention('a short text', 'causal')
    kernels.causal_bias.cache_clear()
    with torch.inference_mode():
        kernels.attention(*inputs, **options)
    assert kernels.causal_bias.cache_info().currsize == 1
    assert not kernels.causal_bias(7, torch.float32, torch.device('cpu')).is_inference()
    got = output_and_gradients(kernels.attention, inputs, **options)
    want = output_and_gradients(plain_attention, inputs, **options)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures('language')
@pytest.mark.parametrize('who', ['all', 'mask', 'causal'])
def test_attention_drops_the_weights_that_plain_attention_drops(who):
    """From the same seed, as long as all queries fit into one block."""
    inputs, options = random_attention('a short text', who)
    options['dropout'] = Dropout(0.3).train()
    torch.manual_seed(5)
    got = output_and_gradients(kernels.attention, inputs, **options)
    torch.manual_seed(5)
    want = output_and_gradients(plain_attention, inputs, **options)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    without = plain_attention(*inputs, mask=options.get('mask'), is_causal=who == 'causal')
    assert not torch.allclose(got[0], without)


def test_a_single_query_of_a_group_has_dropout():
    q = torch.randn(50, 4, 1, 8)
    k = torch.randn(50, 2, 6, 8)
    dropout = Dropout(0.5).train()
    first, second = (kernels.attention(q, k, k, dropout=dropout) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.usefixtures('language')
@pytest.mark.parametrize('max_scores', [0, kernels.MAX_SCORES])
def test_attention_with_dropout_keeps_the_expectation(max_scores, monkeypatch):
    """In blocks and in PyTorch's kernel. In eval mode nothing is dropped."""
    monkeypatch.setattr(fused, 'QUERY_BLOCK', 3)
    monkeypatch.setattr(kernels, 'MAX_SCORES', max_scores)
    (q, k, v), _ = random_attention('a short text', 'causal')
    want = plain_attention(q, k, v, is_causal=True)
    dropout = Dropout(0.25)
    in_eval_mode = kernels.attention(q, k, v, is_causal=True, dropout=dropout.eval())
    torch.testing.assert_close(in_eval_mode, want, atol=1e-5, rtol=1e-5)

    dropout.train()
    outputs = []
    for _ in range(2000):
        outputs.append(kernels.attention(q, k, v, is_causal=True, dropout=dropout))
    outputs = torch.stack(outputs)
    standard_error = outputs.std(dim=0) / math.sqrt(len(outputs))
    assert ((outputs.mean(dim=0) - want).abs() < 5 * standard_error + 1e-5).all()
    assert (standard_error > 0).all()


# --------------------------------------------------------------------------------------------------
# Cross-entropy

N = 47  # targets
C = 8


def random_loss(V, with_bias=True):
    """Random [x (N, C), weight (V, C), bias (V,)] and targets (N,) for cross-entropy."""
    torch.manual_seed(0)
    inputs = [torch.randn(N, C), torch.randn(V, C)]
    if with_bias:
        inputs.append(torch.randn(V))
    return inputs, torch.randint(V, (N,))


def loss_and_gradients(cross_entropy, inputs, targets, label_smoothing=0.0, softcap=0.0):
    """[loss, gradients of x, weight and bias], of half the loss: backward has to scale them."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    x, weight, *bias = inputs
    bias = bias[0] if bias else None
    loss = cross_entropy(x, weight, bias, targets, label_smoothing, softcap)
    return [loss.detach(), *torch.autograd.grad(loss * 0.5, inputs)]


def written_out_cross_entropy(x, weight, bias, targets, label_smoothing, softcap):
    """Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7."""
    logits = x @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)
    of_target = -logp.gather(-1, targets[:, None])[:, 0]
    of_all = -logp.mean(-1)
    return ((1 - label_smoothing) * of_target + label_smoothing * of_all).sum()


# Whole, and in slices of ten rows, which are turned into gradients three rows at a time
SLICES = {'whole': None, 'sliced': (10, 3)}
VOCAB_SIZES = (50, 64, 9001)  # 64 needs no padding; 9001 is more than WEIGHT_ROWS


@pytest.mark.parametrize('V', VOCAB_SIZES)
@pytest.mark.parametrize('with_bias', [False, True])
@pytest.mark.parametrize('softcap', [0.0, 3.0])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_cross_entropy_equals_plain_and_written_out(label_smoothing, softcap, with_bias, V,
                                                    monkeypatch):
    inputs, targets = random_loss(V, with_bias)
    options = (inputs, targets, label_smoothing, softcap)
    want = loss_and_gradients(written_out_cross_entropy, *options)
    plain = loss_and_gradients(plain_cross_entropy, *options)
    torch.testing.assert_close(plain, want, atol=1e-5, rtol=1e-4)
    for slices in SLICES.values():
        if slices is not None:
            rows_per_slice, rows_per_part = slices
            monkeypatch.setattr(kernels, 'MAX_LOGITS', rows_per_slice * V)
            monkeypatch.setattr(kernels, 'CACHE_LOGITS', rows_per_part * V)
        got = loss_and_gradients(kernels.cross_entropy, *options)
        assert got[0].dtype == torch.float32
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('softcap', [0.0, 3.0])
def test_cross_entropy_under_autocast_is_close_and_keeps_dtypes(softcap):
    """Products in bfloat16, the sum and the gradients of float32 weights in float32."""
    inputs, targets = random_loss(50)
    want = loss_and_gradients(plain_cross_entropy, inputs, targets, 0.1, softcap)
    with torch.autocast('cpu', torch.bfloat16):
        got = loss_and_gradients(kernels.cross_entropy, inputs, targets, 0.1, softcap)
    for ours, theirs in zip(got, want):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_cross_entropy_of_a_bfloat16_model_is_close():
    inputs, targets = random_loss(50)
    inputs = [x.bfloat16() for x in inputs]
    exact = [x.float() for x in inputs]
    got = loss_and_gradients(kernels.cross_entropy, inputs, targets)
    want = loss_and_gradients(plain_cross_entropy, exact, targets)
    assert [x.dtype for x in got] == [torch.float32] + 3 * [torch.bfloat16]
    for ours, theirs in zip(got, want):
        assert (ours.float() - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_cross_entropy_without_targets_is_zero():
    """A process may get a batch of padding alone; its gradients must exist all the same."""
    inputs, targets = random_loss(50)
    inputs[0] = inputs[0][:0]
    got = loss_and_gradients(kernels.cross_entropy, inputs, targets[:0])
    for tensor in got:
        assert torch.equal(tensor, torch.zeros_like(tensor))


class Watch(TorchDispatchMode):
    """Notes the shape of every result of every operation that has the vocabulary as a dimension."""

    def __init__(self, vocab_size):
        super().__init__()
        padded = vocab_size + -vocab_size % 8
        self.sizes = {vocab_size, padded}
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else [results]:
            if torch.is_tensor(tensor) and self.sizes & set(tensor.shape):
                self.shapes.add(tuple(tensor.shape))
        return results


def test_training_with_a_large_vocabulary_never_holds_all_logits(monkeypatch):
    """Only the weight, its transpose and its gradient may be as large as all logits."""
    V = 300
    monkeypatch.setattr(kernels, 'MAX_LOGITS', 1000)
    model = GPT(GPTConfig(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=16)).train()
    idx = torch.randint(V, (2, 16))
    targets = torch.randint(V, (2, 16))
    with Watch(V) as watch:
        _, loss = model(idx, targets)
        loss.backward()
    assert loss.isfinite()
    assert (3, V) in watch.shapes  # three rows of logits at a time
    weights = {(V, 16), (16, V), (V + 4, 16), (16, V + 4)}
    for shape in watch.shapes - weights:
        assert math.prod(shape) <= 1000, shape


def test_validation_with_a_large_vocabulary_never_holds_all_logits(monkeypatch):
    V = 300
    monkeypatch.setattr(kernels, 'MAX_LOGITS', 2000)
    head = Head(GPTConfig(n_embd=16, n_head=1, vocab_size=V))
    x = torch.randn(32, 16)
    targets = torch.randint(V, (32,))
    with torch.no_grad(), Watch(V) as watch:
        kernels.loss_and_correct(head, x, targets, V)
    assert (3, V) in watch.shapes
    for shape in watch.shapes - {(V, 16), (16, V)}:
        assert math.prod(shape) <= 1000, shape


@pytest.mark.parametrize('slices', [False, True])
@pytest.mark.parametrize('switches', [
    {'softcap': 3.0, 'head_bias': True}, {'cutoffs': (10, 30), 'div_value': 2.0}])
def test_loss_and_correct_equals_loss_and_argmax_of_all_logits(switches, slices, monkeypatch):
    if slices:
        monkeypatch.setattr(kernels, 'MAX_LOGITS', 2 * 10 * 60)  # ten rows at a time
    torch.manual_seed(0)
    config = GPTConfig(n_embd=16, n_head=1, vocab_size=60, tie_weights=False, **switches)
    head = AdaptiveHead(config) if config.cutoffs else Head(config)
    x = torch.randn(N, 16)
    targets = torch.randint(60, (N,))
    with torch.no_grad():
        logits = head(x)
        targets[:20] = logits[:20].argmax(-1)  # otherwise nearly none would be correct
        got = kernels.loss_and_correct(head, x, targets, 60)
    assert got.shape == (2,)
    assert got.dtype == torch.float32
    loss, correct = got.tolist()
    want = F.cross_entropy(logits, targets, reduction='sum').item()
    assert loss == pytest.approx(want, rel=1e-5)
    assert correct == (logits.argmax(-1) == targets).sum()
    assert correct >= 20


# --------------------------------------------------------------------------------------------------
# The models with the plain formulas in the place of the kernels


def make_model(kind):
    """A small random model with most switches on, and a batch with padding."""
    torch.manual_seed(0)
    shape = {'vocab_size': 23, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 16,
             'softcap': 5.0, 'head_bias': True}
    if kind == 'gpt':
        model = GPT(GPTConfig(pos='rotary', qk_norm=True, token_shift=True, **shape))
    else:
        model = Seq2Seq(Seq2SeqConfig(**shape))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)

    targets = torch.randint(23, (3, 16))
    targets[1, 9:] = -1
    batch = {'idx': torch.randint(23, (3, 16)), 'targets': targets}
    if kind == 'seq2seq':
        batch['src'] = torch.randint(23, (3, 11))
        batch['src_pad'] = torch.tensor([0, 4, 10])
    return model, batch


def loss_and_gradients_of_model(model, batch):
    model.zero_grad()
    _, loss = model(**batch, label_smoothing=0.1)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients


@pytest.mark.parametrize('kind', ['gpt', 'seq2seq'])
def test_model_with_the_plain_formulas_has_the_same_loss_and_gradients(kind, monkeypatch):
    monkeypatch.setattr(fused, 'QUERY_BLOCK', 5)
    model, batch = make_model(kind)
    got = loss_and_gradients_of_model(model, batch)

    calls = []

    def attention(*args):
        calls.append('attention')
        return plain_attention(*args)

    def cross_entropy(*args):
        calls.append('cross_entropy')
        return plain_cross_entropy(*args)

    monkeypatch.setattr(model_module, 'attention', attention)
    monkeypatch.setattr(model_module, 'cross_entropy', cross_entropy)
    want = loss_and_gradients_of_model(model, batch)
    num_attentions = 2 if kind == 'gpt' else 6  # two layers of one; encoder one, decoder two
    assert calls == num_attentions * ['attention'] + ['cross_entropy']
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
