"""
The blocks of a GPT for one token at a time: what is not a linear layer runs in C.

A generated token goes through hundreds of PyTorch's operations. In a small model each of them does
next to nothing, but calling it takes a few microseconds, for Python and PyTorch have grown out of
the cache while weights came through it. That was half the time of a token of SmolLM2-135M. Here
three functions of pocket/native.c do the same between the linear layers of a block. Without a C
compiler the blocks of model.py do it all, as they do for several tokens at once.
"""
import torch
from torch import nn

from model import GPT
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
    """All blocks of a GPT as one. Several tokens go through them as before, a single one quicker.

    blocks: the ModuleList, on a CPU, whose linear layers are DecodingLinear, see
    pocket/quantize.py. It takes their place: model.transformer.h then has this as its only block.
    """

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.steps = [BlockStep(block) for block in blocks]

    def forward(self, x, context, cache=None, memory=None):
        """x: (B, T, C); returns the same shape, as Block.forward() in model.py does."""
        is_one_token = cache is not None and x.size(0) == x.size(1) == 1 and context.mask is None
        has_dtypes = x.dtype in (torch.float32, torch.bfloat16)
        if is_one_token and has_dtypes and cache.k.dtype == torch.float32:
            return self.step(x, context.rope, cache)
        for block in self.blocks:
            x = block(x, context, cache, memory)
        return x

    def step(self, x, rope, cache):
        """All blocks for a token x (1, 1, C) that follows those in the cache."""
        token = Token(x, rope, cache, self.steps[0])
        for step in self.steps:
            step(token)
        return (token.x + token.added).to(x.dtype).view(x.shape)


class Token:
    """What the blocks hand on for a token, and the addresses that C functions want.

    x: (1, C) float32, the residual stream. added: what a block's MLP adds to it, or None. h: (1, C)
    for a norm of x, y: (1, H * D) for attention, inner: (1, n_inner); these are what linear layers
    read, and are overwritten by each block. keys, values: of the next layer.
    """

    def __init__(self, x, rope, cache, step):
        # The residual stream is float32: there is so little of it that this costs nothing
        self.x = x[0].to(torch.float32, copy=True).contiguous()
        self.added = None
        self.is_bfloat16 = x.dtype == torch.bfloat16
        self.h = torch.empty_like(x[0])
        self.y = x.new_empty(1, step.n_head * step.head_dim)
        self.inner = x.new_empty(1, step.n_inner)

        self.tables = None, None  # of rotary positions
        if rope is not None:
            self.tables = tuple(table.float().contiguous() for table in rope)  # (1, 1, D/2)
        self.cos_pointer = pointer(self.tables[0])
        self.sin_pointer = pointer(self.tables[1])
        self.x_pointer = pointer(self.x)
        self.h_pointer = pointer(self.h)
        self.y_pointer = pointer(self.y)
        self.inner_pointer = pointer(self.inner)

        self.keys = pointer(cache.k)
        self.values = pointer(cache.v)
        self.layer_bytes = cache.k.stride(0) * cache.k.itemsize
        self.position = cache.length
        self.size = cache.size


class BlockStep:
    """Block.forward() of model.py for a Token."""

    def __init__(self, block):
        attn = block.attn
        library = load_library()
        self.c_attend = library.attend
        self.c_swiglu = library.swiglu
        self.attn_norm = Norm(block.ln_1)
        self.c_attn = attn.c_attn.multiply
        self.head_dim = attn.head_dim
        self.n_head = attn.q_width // attn.head_dim
        self.n_kv_head = attn.kv_width // attn.head_dim
        self.norm_eps = 0.0
        self.qk_weights = None, None
        if attn.qk_norm:
            self.norm_eps = attn.q_norm.eps
            self.qk_weights = attn.q_norm.weight.float(), attn.k_norm.weight.float()
        self.q_weight_pointer = pointer(self.qk_weights[0])
        self.k_weight_pointer = pointer(self.qk_weights[1])
        self.attn_proj = attn.c_proj.multiply

        self.mlp_norm = Norm(block.ln_2)
        self.c_fc = block.mlp.c_fc.multiply
        self.is_swiglu = block.mlp.act == 'swiglu'
        self.activate = block.mlp.activate
        self.n_inner = block.mlp.c_proj.in_features
        self.mlp_proj = block.mlp.c_proj.multiply

    def __call__(self, token):
        """Add to token.x what the block before has left in token.added, then attention; leave
        there what the MLP adds."""
        # Attention
        self.attn_norm(token, token.added)
        qkv = self.c_attn(token.h)  # (1, (H + 2 n_kv_head) * D)
        self.c_attend(
            qkv.data_ptr(), token.y_pointer, token.keys, token.values, token.cos_pointer,
            token.sin_pointer, self.q_weight_pointer, self.k_weight_pointer, self.norm_eps,
            token.position, token.size, self.n_head, self.n_kv_head, self.head_dim,
            token.is_bfloat16)
        token.keys += token.layer_bytes
        token.values += token.layer_bytes

        # MLP
        self.mlp_norm(token, self.attn_proj(token.y))
        h = self.c_fc(token.h)  # (1, n_inner), or twice that with swiglu
        if self.is_swiglu:
            self.c_swiglu(h.data_ptr(), token.inner_pointer, self.n_inner, token.is_bfloat16)
            h = token.inner
        else:
            h = self.activate(h)
        token.added = self.mlp_proj(h)


class Norm:
    """A LayerNorm or RMSNorm, after an addition."""

    def __init__(self, norm):
        self.add_and_norm = load_library().add_and_norm
        self.weight = norm.weight.detach().float()
        self.bias = None
        if getattr(norm, 'bias', None) is not None:
            self.bias = norm.bias.detach().float()
        self.weight_pointer = pointer(self.weight)
        self.bias_pointer = pointer(self.bias)
        self.width = len(self.weight)
        self.eps = norm.eps
        self.is_layer_norm = isinstance(norm, nn.LayerNorm)

    def __call__(self, token, added):
        """token.x += added, unless it is None; token.h becomes the norm of x."""
        self.add_and_norm(
            token.x_pointer, pointer(added), self.weight_pointer, self.bias_pointer,
            token.h_pointer, self.width, self.eps, self.is_layer_norm, token.is_bfloat16)
