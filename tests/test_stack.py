"""
pocket/stack.py: tokens through the blocks of a GPT in C, against the blocks of model.py.

    pytest -n 0 tests/test_stack.py
"""
import shutil
import subprocess
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from model import GPT, GPTConfig, Seq2Seq, Seq2SeqConfig
from pocket import native, quantize, stack
from pocket.generate import new_cache
from pocket.quantize import DecodingLinear, prepare_for_decoding
from pocket.stack import DecodingStack

needs_compiler = pytest.mark.skipif(shutil.which('cc') is None, reason='no C compiler')
cpu_has_bfloat16 = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', bool)()
load_library = native.load_library  # tests replace it
SHAPE = dict(vocab_size=60, block_size=16, n_layer=2, n_head=4, n_embd=32)


class PlainLinear(DecodingLinear):
    """The weights as they are: a step with these differs from the blocks only by its order."""

    def store(self, weight):
        self.weight = weight

    def multiply(self, rows):
        return nn.functional.linear(rows, self.weight, self.bias)


LLAMA = dict(n_kv_head=2, pos='rotary', norm='rmsnorm', act='swiglu', bias=False)
STACKED = {
    'gpt2': dict(),
    'llama': LLAMA,
    'qwen2': dict(LLAMA, qkv_bias=True),
    'qwen3': dict(LLAMA, qk_norm='rmsnorm', head_dim=16, norm_eps=1e-3),
    'relu2': dict(pos='sinusoidal', norm='rmsnorm', act='relu2', bias=False),
}


@needs_compiler
@pytest.mark.parametrize('B, pad', [(1, None), (3, None), (3, torch.tensor([0, 6, 1]))])
@pytest.mark.parametrize('name', STACKED)
def test_tokens_through_the_stack_equal_the_blocks(name, B, pad):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, **STACKED[name])).eval()
    for parameter in model.parameters():  # norms and biases, too, are not at their initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    idx = torch.randint(60, (B, 9))
    with torch.inference_mode():
        want = model(idx, cache=new_cache(model, B, 12, pad))[0]
        for block in model.transformer.h:
            for part in (block.attn, block.mlp):
                for child, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, child, PlainLinear(linear))
        stack = DecodingStack(model.transformer.h)
        model.transformer.h = nn.ModuleList([stack])
        stack.step = Mock(side_effect=stack.step)
        cache = new_cache(model, B, 12, pad)  # longer than the text
        pieces = idx.split((4, 1, 1, 2, 1), dim=1)
        got = torch.cat([model(piece, cache=cache)[0] for piece in pieces], dim=1)
        assert stack.step.call_count == 3

        # Padding, too, may come one by one; and the cache ends
        cache = new_cache(model, B, 9, pad)
        one_by_one = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(1, dim=1)], 1)
        with pytest.raises(AssertionError, match='full'):
            model(idx[:, :1], cache=cache)
    is_real = torch.ones(B, 9, dtype=torch.bool) if pad is None else torch.arange(9) >= pad[:, None]
    torch.testing.assert_close(got[is_real], want[is_real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one_by_one[is_real], want[is_real], atol=1e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize('prompts', [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8]]])
@pytest.mark.parametrize('bits', [8, None])
def test_greedy_text_is_that_of_the_blocks(bits, prompts, monkeypatch):
    """With 8 bits, and in bfloat16, where the processor has it."""
    if bits is None and not cpu_has_bfloat16:
        pytest.skip('this CPU has no bfloat16')
    texts = []
    for is_stacked in (True, False):
        monkeypatch.setattr(stack, 'load_library', load_library if is_stacked else lambda: None)
        torch.manual_seed(1)
        model = GPT(GPTConfig(**SHAPE, **LLAMA)).eval()
        for parameter in model.parameters():  # far from ties
            parameter.data *= 10
        if bits is None:
            model.bfloat16()
        prepare_for_decoding(model, bits)
        assert isinstance(model.transformer.h[0], DecodingStack) == is_stacked
        texts.append(model.generate(prompts, 20, temperature=0))  # beyond block_size
    assert texts[0] == texts[1]


@needs_compiler
def test_what_is_stacked():
    """On a CPU a GPT; no Seq2Seq, and nothing with parts that native.c lacks."""
    shape = SHAPE | {'n_layer': 1}
    model = prepare_for_decoding(GPT(GPTConfig(**shape)), bits=8)
    assert isinstance(model.transformer.h[0], DecodingStack)
    for model in (
        GPT(GPTConfig(**shape, token_shift=True)),
        GPT(GPTConfig(**shape, qk_norm=True)),
        GPT(GPTConfig(**shape, norm_position='post')),
        GPT(GPTConfig(**shape, n_inner=140_000)),  # too wide for the arrays in native.c
        Seq2Seq(Seq2SeqConfig(**shape)),
    ):
        prepare_for_decoding(model.eval(), bits=8)
        assert not any(isinstance(module, DecodingStack) for module in model.modules())
        start = [1] if model.is_encoder_decoder else None
        model.generate([[1, 2, 3]], 4, decoder_start=start)


@pytest.mark.parametrize('compiler', ['none', 'false'])
def test_without_a_working_compiler_the_blocks_remain(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv('CC', compiler)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for module in (stack, quantize):
        monkeypatch.setattr(module, 'load_library', load_library.__wrapped__)
    model = prepare_for_decoding(GPT(GPTConfig(**SHAPE)), bits=8)
    assert len(model.transformer.h) == 2
    assert not list(tmp_path.rglob('*.so'))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """Compile into an empty folder, with few optimizations, which is quicker."""
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    flags = tuple('-O1' if flag == '-O3' else flag for flag in native.FLAGS)
    monkeypatch.setattr(native, 'FLAGS', flags)
    return tmp_path / 'pocketgpt'


@needs_compiler
def test_what_is_compiled_is_cached(empty_cache):
    compiler = shutil.which('cc')
    path = native.compiled((compiler,), native.FLAGS)
    [only] = empty_cache.iterdir()
    assert path == only
    assert native.compiled((compiler,), native.FLAGS) == path

    # Damaged files: without them, then
    for flags in (native.FLAGS, native.FLAGS + ('-fopenmp',)):
        native.compiled((compiler,), flags).write_bytes(b'not a library')
    assert load_library.__wrapped__() is None


@needs_compiler
def test_a_compiler_without_openmp(empty_cache, monkeypatch):
    """Leads to C on a single core."""
    run = native.run

    def run_without_openmp(*command):
        if '-fopenmp' in command:
            raise subprocess.CalledProcessError(1, command)
        run(*command)

    monkeypatch.setattr(native, 'run', run_without_openmp)
    assert load_library.__wrapped__() is not None
