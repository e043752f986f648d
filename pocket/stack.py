"""
The blocks of a GPT for one token at a time: what is not a linear layer runs in C.

A generated token goes through hundreds of PyTorch's operations. In a small model each of them does
next to nothing, but calling it takes a few microseconds, for Python and PyTorch have grown out of
the cache while weights came through it. That was half the time of a token of SmolLM2-135M. Here
three functions of pocket/stack.c do the same between the linear layers of a block.

The C compiler of the machine compiles them when they are first needed, which takes a second, and
the result is cached. Without a compiler the blocks of model.py do it all, as they do for several
tokens at once. CC=none switches this off.
"""
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from model import GPT

# --------------------------------------------------------------------------------------------------
# Compiling

SOURCE = Path(__file__).with_name('stack.c')
FLAGS = (
    '-O3', '-march=native', '-shared', '-fPIC',
    # Sums may be computed in any order, and nobody looks at errno: that allows vector instructions
    '-fno-math-errno', '-fno-trapping-math', '-fassociative-math', '-fno-signed-zeros',
)
POINTER = ctypes.c_void_p
INT = ctypes.c_int
FLOAT = ctypes.c_float
# How many numbers may be in an array of stack.c. They lie on the thread's stack, whose size is 8 MB
# on Linux, and an untrusted file decides how wide a model is
LARGEST_ARRAY = 2**18
ARGUMENTS = {  # of the functions in stack.c
    'add_and_norm': [POINTER] * 7 + [INT, FLOAT, INT, INT],
    'swiglu': [POINTER] * 4 + [INT] * 2,
    'attend': [POINTER] * 10 + [FLOAT] + [INT] * 6,
}


@lru_cache(maxsize=1)
def load_library():
    """The functions of stack.c as a ctypes library, or None if they can't be compiled here."""
    compiler = shutil.which(os.environ.get('CC') or 'cc')
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(compiled(compiler)))
        for name, arguments in ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = None
        return library
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None


def compiled(compiler):
    """The path of the compiled stack.c, from the cache or new. Raises OSError or
    SubprocessError."""
    # What was compiled for one processor need not run on another that shares the home folder
    key = repr((SOURCE.read_bytes(), compiler, FLAGS, describe_processor()))
    name = f'stack-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'pocketgpt').expanduser()
    path = cache / name
    if path.is_file():
        return path

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder, name)
        subprocess.run([compiler, *FLAGS, str(SOURCE), '-o', str(made), '-lm'], check=True,
                       timeout=60, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        os.replace(made, path)  # atomically: others may be doing the same
    return path


def describe_processor():
    """A text that differs between processors with different instructions."""
    text = platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():  # Linux
        for line in info.read_text(encoding='utf-8', errors='replace').splitlines():
            if line.startswith(('flags', 'Features', 'isa')):
                return text + line
    return text + platform.processor()


# --------------------------------------------------------------------------------------------------
# Decoding


def split(rows, levels):
    """Numbers as two rows of whole numbers each, all coarse ones, then all fine ones.

    rows: (N, C) float32. Returns (2 N, C), from -levels to levels, and the scale (N, 1) in
    rows = (coarse + fine / (2 levels)) * scale. The fine ones are not rounded yet.
    """
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / levels
    exact = rows / scale
    coarse = exact.round()
    fine = (exact - coarse) * (2 * levels)
    return torch.cat((coarse, fine)), scale


def join(products, scale, levels):
    """What a linear layer, without bias, makes of rows: products is what it made of split(rows)."""
    coarse, fine = products.chunk(2)
    return (coarse + fine / (2 * levels)) * scale


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

    blocks: the ModuleList, on a CPU, whose linear layers are all of one kind of DecodingLinear, see
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
        return (token.x + token.read_added()).to(x.dtype).view(x.shape)


class Numbers:
    """What linear layers read: memory to be written again and again.

    rows: (1, width) or, if there are `levels`, (2, width) and a scale, see split().
    """

    def __init__(self, width, levels, dtype):
        self.scale = None
        if levels:
            memory = torch.empty(2 * width + 1)
            self.rows = memory[:-1].view(2, width)
            self.scale = memory[-1:]
        else:
            self.rows = torch.empty(1, width, dtype=dtype)
        self.pointer = pointer(self.rows)
        self.scale_pointer = pointer(self.scale)


class Token:
    """What the blocks hand on for a token, and the addresses that C functions want.

    x: (1, C) float32, the residual stream. added: what a block's MLP adds to it, or None. h: (1, C)
    for a norm of x, y: (1, H * D) for attention, inner: (1, n_inner); these are what linear layers
    read, Numbers, and are overwritten by each block. keys, values: of the next layer.
    """

    def __init__(self, x, rope, cache, step):
        self.levels = step.levels
        self.kind = step.levels or int(x.dtype == torch.bfloat16)

        # The residual stream is float32: there is so little of it that this costs nothing
        self.x = x[0].to(torch.float32, copy=True).contiguous()
        self.added = None
        self.added_bias = None
        self.h = Numbers(self.x.size(1), self.levels, x.dtype)
        self.y = Numbers(step.n_head * step.head_dim, self.levels, x.dtype)
        self.inner = Numbers(step.n_inner, self.levels, x.dtype)

        self.tables = None, None  # of rotary positions
        if rope is not None:
            self.tables = tuple(table.float().contiguous() for table in rope)  # (1, 1, D/2)
        self.cos_pointer = pointer(self.tables[0])
        self.sin_pointer = pointer(self.tables[1])
        self.x_pointer = pointer(self.x)

        self.keys = pointer(cache.k)
        self.values = pointer(cache.v)
        self.layer_bytes = cache.k.stride(0) * cache.k.itemsize
        self.position = cache.length
        self.size = cache.size

    def read_added(self):
        """What the last MLP adds to x, (1, C)."""
        if not self.levels:
            return self.added
        added = join(self.added, self.inner.scale, self.levels)
        return added if self.added_bias is None else added + self.added_bias


class BlockStep:
    """Block.forward() of model.py for a Token."""

    def __init__(self, block):
        attn = block.attn
        library = load_library()
        self.c_attend = library.attend
        self.c_swiglu = library.swiglu
        self.levels = attn.c_attn.levels
        multiply = 'multiply_split' if self.levels else 'multiply'  # the second adds the bias
        self.attn_norm = Norm(block.ln_1)
        self.c_attn = getattr(attn.c_attn, multiply)
        self.c_attn_bias = self.bias_of(attn.c_attn)
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
        self.attn_proj = getattr(attn.c_proj, multiply)
        self.attn_proj_bias = self.bias_of(attn.c_proj)

        self.mlp_norm = Norm(block.ln_2)
        self.c_fc = getattr(block.mlp.c_fc, multiply)
        self.c_fc_bias = self.bias_of(block.mlp.c_fc)
        self.is_swiglu = block.mlp.act == 'swiglu'
        self.activate = block.mlp.activate
        self.n_inner = block.mlp.c_proj.in_features
        self.mlp_proj = getattr(block.mlp.c_proj, multiply)
        self.mlp_proj_bias = self.bias_of(block.mlp.c_proj)

    def bias_of(self, linear):
        """The bias of a layer in float32, if it is still to be added to its products; else None."""
        return linear.bias.float() if self.levels and linear.bias is not None else None

    def __call__(self, token):
        """Add to token.x what the block before has left in token.added, then attention; leave
        there what the MLP adds."""
        # Attention
        self.attn_norm(token, token.added, token.inner, token.added_bias)
        qkv = self.c_attn(token.h.rows)  # (1, (H + 2 n_kv_head) * D)
        self.c_attend(
            qkv.data_ptr(), token.h.scale_pointer, pointer(self.c_attn_bias), token.y.pointer,
            token.keys, token.values, token.cos_pointer, token.sin_pointer, self.q_weight_pointer,
            self.k_weight_pointer, self.norm_eps, token.position, token.size, self.n_head,
            self.n_kv_head, self.head_dim, token.kind)
        token.keys += token.layer_bytes
        token.values += token.layer_bytes

        # MLP
        self.mlp_norm(token, self.attn_proj(token.y.rows), token.y, self.attn_proj_bias)
        h = self.c_fc(token.h.rows)  # (1, n_inner), or twice that with swiglu
        if self.is_swiglu:
            self.c_swiglu(h.data_ptr(), token.h.scale_pointer, pointer(self.c_fc_bias),
                          token.inner.pointer, self.n_inner, token.kind)
            rows = token.inner.rows
        else:
            rows = self.activate_in_python(h, token)
        token.added = self.mlp_proj(rows)
        token.added_bias = self.mlp_proj_bias

    def activate_in_python(self, h, token):
        """What the MLP's second layer reads, for the activations that stack.c lacks."""
        if not self.levels:
            return self.activate(h)
        h = join(h, token.h.scale, self.levels)
        if self.c_fc_bias is not None:
            h = h + self.c_fc_bias
        rows, token.inner.scale[:] = split(self.activate(h), self.levels)
        return rows


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

    def __call__(self, token, added, numbers, added_bias):
        """token.x += added, unless it is None; token.h becomes the norm of x.

        added: what a linear layer made of numbers, without its added_bias unless that is None.
        """
        self.add_and_norm(
            token.x_pointer, pointer(added), numbers.scale_pointer, pointer(added_bias),
            self.weight_pointer, self.bias_pointer, token.h.pointer, self.width, self.eps,
            self.is_layer_norm, token.kind)


def pointer(tensor):
    """The address of a tensor's numbers; None, a null pointer, for None."""
    return None if tensor is None else tensor.data_ptr()
