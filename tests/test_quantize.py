"""
pocket/quantize.py: linear layers for decoding against the plain ones that they replace.

Run it alone: pytest -n 0 tests/test_quantize.py
"""
import copy
import math

import pytest
import torch
from conftest import toy_text
from torch import nn
from torch.nn import functional as F

from model import GPT, GPTConfig, Head, Seq2Seq, Seq2SeqConfig
from pocket.generate import beam_search, new_cache
from pocket.kernels import cpu_has
from pocket.native import load_library
from pocket.quantize import Bfloat16Linear, Int8Linear, prepare_for_decoding
from pocket.tokenizer import make_tokenizer

cpu_has_bfloat16 = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', bool)()
needs_bfloat16 = pytest.mark.skipif(not cpu_has_bfloat16, reason='this CPU has no bfloat16')


@pytest.fixture(scope='module')
def token_ids():
    """Ids of made-up sentences for training and, of others, for testing: (N,) int64 each."""
    text = toy_text(20_000)
    tok = make_tokenizer('bpe', [text], vocab_size=300)
    return torch.tensor(tok.encode(text)), torch.tensor(tok.encode(toy_text(3000, seed=1)))


@pytest.fixture(scope='module')
def trained_gpt(token_ids):
    """A small GPT-2, trained for a few seconds: its predictions are far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=16, n_layer=1, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, _ = token_ids
    for _ in range(200):
        starts = torch.randint(len(ids) - 17, (16, 1))
        windows = ids[starts + torch.arange(17)]  # (16, 17)
        loss = model(windows[:, :-1], windows[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 3  # chance is ln(300) = 5.7
    return model.eval()


@pytest.fixture
def gpt(trained_gpt):
    """A copy of it that a test may change."""
    return copy.deepcopy(trained_gpt)


@pytest.fixture(params=['in C', 'in PyTorch'])
def where(request, monkeypatch):
    """Where products of a few rows are computed."""
    if request.param == 'in PyTorch':
        monkeypatch.setattr('pocket.quantize.load_library', lambda: None)
    elif load_library() is None:
        pytest.skip('no C compiler')
    return request.param


@needs_bfloat16
@pytest.mark.parametrize('linear', [
    nn.Linear(64, 48),
    nn.Linear(90, 48, bias=False),
    Head(GPTConfig(vocab_size=48, n_head=2, n_embd=64, softcap=0.5)),
])
def test_packed_equals_plain(linear, where):
    """For any number of rows, which decides how the weights are arranged."""
    linear = linear.to(torch.bfloat16)
    packed = Bfloat16Linear(linear)
    assert (packed.library is not None) == (where == 'in C' and cpu_has('avx512_bf16'))
    with torch.no_grad():
        for rows in ((1,), (2, 40), (1, 1), (3, 1), (3, 1), (2, 40), (1,), (17,), (17,), (1,)):
            x = torch.randn(*rows, linear.in_features).bfloat16()
            torch.testing.assert_close(packed(x), linear(x), atol=0.02, rtol=0.02)


@needs_bfloat16
def test_packed_applies_a_gelu_to_its_results(where):
    linear = nn.Linear(200, 300).to(torch.bfloat16)
    packed = Bfloat16Linear(linear)
    packed.activation = 'gelu'
    assert (packed.library is not None) == (where == 'in C' and cpu_has('avx512_bf16'))
    with torch.no_grad():
        for rows in (1, 3, 40):
            x = 3 * torch.randn(rows, 200).bfloat16()  # results from -6 to 6
            want = F.gelu(F.linear(x.float(), linear.weight.float(), linear.bias.float()),
                          approximate='tanh')
            torch.testing.assert_close(packed(x).float(), want, atol=0.01, rtol=0.01)


@needs_bfloat16
@pytest.mark.parametrize('texts', [1, 2])
@pytest.mark.parametrize('bits, limit', [(None, 0.02), (8, 0.05)])
def test_model_in_bfloat16_with_its_float32_cache(gpt, token_ids, bits, limit, texts):
    """Logits, read in pieces, are those of the plain model, to what bfloat16 and 8 bits hold."""
    idx = token_ids[1][:12 * texts].view(texts, 12)
    with torch.inference_mode():
        want = gpt(idx)[0]
        prepare_for_decoding(gpt.to(torch.bfloat16), bits)
        cache = new_cache(gpt, texts, 12)
        assert cache.k.dtype == torch.float32
        pieces = idx.split((5, 1, 1, 5), dim=1)
        got = torch.cat([gpt(piece, cache=cache)[0] for piece in pieces], dim=1)
    assert (got - want).norm() < limit * want.norm()


def test_only_bfloat16_on_a_cpu_is_replaced():
    linear = nn.Sequential(nn.Linear(8, 8))
    assert type(prepare_for_decoding(linear)[0]) is nn.Linear
    linear.to(torch.bfloat16)
    expected = Bfloat16Linear if cpu_has_bfloat16 else nn.Linear
    assert type(prepare_for_decoding(linear)[0]) is expected


@pytest.mark.parametrize('width', [64, 5000])
def test_int8_is_within_its_rounding(width, where):
    """Outputs are off by no more than what rounding weights explains, also if one of the inputs is
    much larger than all others, as in an MLP of a Llama."""
    torch.manual_seed(0)
    linear = nn.Linear(width, 50).requires_grad_(False)
    int8 = Int8Linear(linear)
    assert (int8.library is None) == (where == 'in PyTorch')

    step = linear.weight.abs().amax(dim=1) / 127  # (50,): between two values of int8
    for rows in (1, 3, 40):
        x = torch.randn(rows, width) * torch.logspace(-2, 2, rows)[:, None]  # very different sizes
        x[:, 5] *= 100
        want = linear(x)
        error = int8(x) - want

        # Half a step for each weight. In C for each input one in 2 * 8191 of the largest; PyTorch,
        # which also computes many rows, has bfloat16 for inputs and outputs
        limit = 0.5 * x.abs().sum(1, keepdim=True) * step
        largest = linear.weight.abs() + step[:, None] / 2
        if where == 'in C' and rows <= int8.max_rows_in_c:
            limit += x.abs().amax(1, keepdim=True) * largest.sum(1) / (2 * 8191)
        else:
            limit += x.abs() @ largest.T / 2**7
        assert (error.abs() <= limit + 1e-5).all()
        assert error.norm() < 0.02 * want.norm()


@pytest.mark.parametrize('width, channels', [(9000, 3), (12800, 32)])
def test_int8_with_the_largest_numbers_does_not_overflow(width, channels, where):
    """All products are as large as they can be, and of one sign."""
    linear = nn.Linear(width, channels, bias=False).requires_grad_(False)
    linear.weight.fill_(0.5)
    y = Int8Linear(linear)(torch.ones(2, width))
    bfloat16 = 2**-8
    torch.testing.assert_close(y, torch.full((2, channels), width / 2), rtol=bfloat16, atol=0)


@pytest.mark.parametrize('width', [64, 1000, 3072])
@pytest.mark.parametrize('channels', [5, 32, 77])
def test_int8_rows_together_or_one_by_one(width, channels):
    """C has other code for several rows and, on processors with AMX, for round numbers of inputs."""
    if load_library() is None:
        pytest.skip('no C compiler')
    torch.manual_seed(0)
    int8 = Int8Linear(nn.Linear(width, channels).requires_grad_(False))
    x = torch.randn(16, width)
    one_by_one = torch.cat([int8(row[None]) for row in x])
    for rows in (2, 3, 7, 16):
        torch.testing.assert_close(int8(x[:rows]), one_by_one[:rows], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('rows', [1, 4, 40])
def test_int8_in_other_precisions_and_of_zeros(rows, where):
    torch.manual_seed(0)
    linear = nn.Linear(64, 50).requires_grad_(False)
    linear.weight[7] = 0
    linear.to(torch.bfloat16)
    x = torch.randn(rows, 64).bfloat16()
    x[0] = 0
    y = Int8Linear(linear)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, linear(x), atol=0.03, rtol=0.03)


def test_int8_keeps_the_perplexity(gpt, token_ids, where):
    """To a percent."""
    ids = token_ids[1][:640].view(40, 16)
    inputs = ids[:, :-1]
    targets = ids[:, 1:]
    with torch.no_grad():
        before = gpt(inputs, targets)[1]
        prepare_for_decoding(gpt, bits=8)
        assert sum(isinstance(module, Int8Linear) for module in gpt.modules()) == 5
        logits = torch.cat([gpt(row[None])[0] for row in inputs])  # 15 rows at a time
        after = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(math.exp(after - before) - 1) < 0.01


def test_layers_in_c_stay_where_they_are(gpt):
    """C has the addresses of their weights."""
    prepare_for_decoding(gpt, bits=8)
    with pytest.raises(RuntimeError, match='before prepare_for_decoding'):
        gpt.bfloat16()


def test_sample_with_int8(trained):
    out, _ = trained.run('sample.py', '--out_dir=out/toy', '--quantize=int8', '--start=ba',
                         '--max_new_tokens=5')
    assert out.startswith('ba')


@pytest.mark.parametrize('bits', [None, 8])
@pytest.mark.parametrize('kind', [GPT, Seq2Seq])
def test_adaptive_softmax_in_bfloat16(kind, bits):
    """It computes in float32, whatever the rest of the model does; sampled and by beam search."""
    Config = {GPT: GPTConfig, Seq2Seq: Seq2SeqConfig}[kind]
    torch.manual_seed(0)
    model = kind(Config(block_size=16, vocab_size=60, n_layer=1, n_head=2, n_embd=32,
                        cutoffs=(20, 40), div_value=2.0, tie_weights=False)).eval()
    prepare_for_decoding(model.to(torch.bfloat16), bits)
    decoder_start = [1] if kind is Seq2Seq else None
    [row] = model.generate([[1, 2, 3]], 5, decoder_start=decoder_start)
    assert len(row) >= 5
    [best] = beam_search(model, [[1, 2, 3]], 5, 3, decoder_start=decoder_start)
    assert len(best) >= 1
