"""
Decoding steps of a GPT, with most of what lies between the linear layers in C.

A generated token takes hundreds of PyTorch operations. In a small model each does next to nothing,
but calling it takes a few microseconds, because the weights that stream through the CPU's cache
have evicted Python and PyTorch. That was half the time per token of SmolLM2-135M. Here three
functions of pocket/native.c do this work instead.

It serves GPT-2, Llama and similar models in bfloat16 or int8. Prompts go through the blocks of
model.py. So does everything if there is no C compiler, or if the model has token shift, post-norm,
or QK-norm without weights, which includes what train.py trains by default.
"""
import ctypes

import torch
from torch import nn

from model import GPT
from pocket import native
from pocket.native import LARGEST_ARRAY, load_library, pointer


def can_be_stacked(model):
    """Whether DecodingStack computes the blocks of a model."""
    if not isinstance(model, GPT):
        return False
    config = model.config
    if config.norm_position != 'pre' or config.token_shift or config.qk_norm is True:
        return False
    attention_width = (config.n_head + 2 * config.num_kv_heads) * config.head_size
    mlp_width = 2 * (config.n_inner or 4 * config.n_embd)
    largest = max(attention_width, mlp_width, config.n_embd, config.block_size)
    return largest <= LARGEST_ARRAY and load_library() is not None


class DecodingStack(nn.Module):
    """All blocks of a GPT as one. Prompts go through them as before, single tokens quicker.

    blocks: the ModuleList, on a CPU, whose linear layers are DecodingLinear, see
    pocket/quantize.py. It takes their place: model.transformer.h then has this as its only block.
    """

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.steps = [BlockStep(block) for block in blocks]

    def forward(self, x, context, cache=None, memory=None):
        """x: (B, T, C); returns the same shape, as Block.forward() in model.py does."""
        if self.can_step(x, cache):
            return self.step(x, context.rope, cache)
        for block in self.blocks:
            x = block(x, context, cache, memory)
        return x

    def can_step(self, x, cache):
        """Whether step() can handle this: one new token per text, a contiguous float32 cache."""
        if cache is None or x.size(1) > 1 or not cache.k.is_contiguous():
            return False
        return x.dtype in (torch.float32, torch.bfloat16) and cache.k.dtype == torch.float32

    def step(self, x, rope, cache):
        """All blocks for tokens x (B, 1, C) that follow those in the cache."""
        # C checks no bounds: a column or row too many would overwrite other memory
        assert cache.length < cache.size, 'the cache is full'
        assert len(x) == cache.k.size(1), 'the cache has another batch size'
        tokens = Tokens(x, rope, cache, self.steps[0])
        for step in self.steps:
            step(tokens)
        return (tokens.x + tokens.added).to(x.dtype).view(x.shape)


class Tokens:
    """What blocks pass on within one step, and the addresses that the C functions take.

    x: (B, C) float32, the residual stream. added: what a block's MLP adds to it, or None. h: (B, C)
    for a norm of x, y: (B, H * D) for attention, inner: (B, n_inner); these are what linear layers
    read, and are overwritten by each block. keys_pointer, values_pointer: of the next layer.
    """

    def __init__(self, x, rope, cache, block_step):
        x = x[:, 0]
        B = len(x)
        # The residual stream is float32: there is so little of it that this costs nothing
        self.x = x.to(torch.float32, copy=True).contiguous()
        self.added = None
        self.h = x.new_empty(x.shape)
        self.y = x.new_empty(B, block_step.attn_proj.in_features)
        self.inner = x.new_empty(B, block_step.mlp_proj.in_features)
        self.x_pointer = pointer(self.x)
        self.h_pointer = pointer(self.h)
        self.y_pointer = pointer(self.y)
        self.inner_pointer = pointer(self.inner)

        self.keys_pointer = pointer(cache.k)
        self.values_pointer = pointer(cache.v)
        self.layer_bytes = cache.k.stride(0) * cache.k.itemsize

        self.pad = None if cache.pad is None else cache.pad.contiguous()
        self.tables = None, None  # of rotary positions
        if rope is not None:  # each (1 or B, 1, 1, D / 2), or without the first dimension
            self.tables = [table.float().expand(B, 1, 1, -1).contiguous() for table in rope]
        self.struct = native.StepContext(
            B, x.dtype == torch.bfloat16, cache.size, cache.length, pointer(self.pad),
            pointer(self.tables[0]), pointer(self.tables[1]))
        self.struct_pointer = ctypes.addressof(self.struct)


class BlockStep:
    """Block.forward() of model.py for Tokens."""

    def __init__(self, block):
        attn = block.attn
        library = load_library()
        self.attend_in_c = library.attend
        self.swiglu_in_c = library.swiglu

        self.attn_norm = AddAndNorm(block.ln_1)
        self.c_attn = attn.c_attn
        self.qk_weights = None, None
        eps = 0.0
        if attn.qk_norm:
            self.qk_weights = attn.q_norm.weight.float(), attn.k_norm.weight.float()
            eps = attn.q_norm.eps
        self.heads = native.Heads(
            attn.q_width // attn.head_dim, attn.kv_width // attn.head_dim, attn.head_dim, eps,
            pointer(self.qk_weights[0]), pointer(self.qk_weights[1]))
        self.heads_pointer = ctypes.addressof(self.heads)
        self.attn_proj = attn.c_proj

        self.mlp_norm = AddAndNorm(block.ln_2)
        self.c_fc = block.mlp.c_fc
        self.is_swiglu = block.mlp.act == 'swiglu'
        self.activate = block.mlp.activate
        self.mlp_proj = block.mlp.c_proj

    def __call__(self, tokens):
        """Add the previous block's MLP output (tokens.added) to tokens.x, then this attention's.
        This block's MLP output is left in tokens.added: the next norm adds it."""
        # Attention
        self.attn_norm(tokens, tokens.added)
        qkv = self.c_attn.multiply(tokens.h)  # (B, (H + 2 n_kv_head) * D)
        self.attend_in_c(tokens.struct_pointer, self.heads_pointer, qkv.data_ptr(),
                         tokens.y_pointer, tokens.keys_pointer, tokens.values_pointer)
        tokens.keys_pointer += tokens.layer_bytes
        tokens.values_pointer += tokens.layer_bytes

        # MLP
        self.mlp_norm(tokens, self.attn_proj.multiply(tokens.y))
        h = self.c_fc.multiply(tokens.h)  # (B, n_inner), or twice that with swiglu
        if self.is_swiglu:
            self.swiglu_in_c(tokens.struct_pointer, h.data_ptr(), tokens.inner_pointer,
                          self.mlp_proj.in_features)
            h = tokens.inner
        else:
            h = self.activate(h)
        tokens.added = self.mlp_proj.multiply(h)


class AddAndNorm:
    """A LayerNorm or RMSNorm, after an addition."""

    def __init__(self, norm):
        self.add_and_norm = load_library().add_and_norm
        self.weight = norm.weight.detach().float()
        self.bias = None
        if getattr(norm, 'bias', None) is not None:
            self.bias = norm.bias.detach().float()
        self.struct = native.Norm(
            len(self.weight), isinstance(norm, nn.LayerNorm), norm.eps, pointer(self.weight),
            pointer(self.bias))
        self.struct_pointer = ctypes.addressof(self.struct)

    def __call__(self, tokens, added):
        """tokens.x += added, unless it is None; tokens.h becomes the norm of x."""
        self.add_and_norm(tokens.struct_pointer, self.struct_pointer, tokens.x_pointer,
                          pointer(added), tokens.h_pointer)
