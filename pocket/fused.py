"""
What a Transformer does between its matrix products, on a CPU, with gradients: each a function in C
(pocket/native_training.c) instead of up to ten operations of PyTorch.

model.py and pocket/kernels.py use these where can_fuse() says so, and plain PyTorch elsewhere.
Inputs may be bfloat16 or float32; within a function all is float32. tests/test_fused.py checks
every function and its gradient against plain PyTorch in float64.
"""
import ctypes
import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pocket.native import (
    ACTIVATIONS,
    LARGEST_ARRAY,
    HeadShape,
    NormLayer,
    ScoreShape,
    load_library,
    pointer,
)

PARTS = 64  # of the rows: gradients of a norm's weights are sums over each of them
QUERY_BLOCK = 256  # queries at once in causal attention: later keys are never multiplied


def can_fuse(x):
    """Whether the functions below can take a tensor."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return False
    if x.dtype not in (torch.bfloat16, torch.float32) or x.size(-1) > LARGEST_ARRAY:
        return False
    return is_available()


def is_available():
    """Whether there is a C compiler, and what it compiles uses as many cores as PyTorch does."""
    library = load_library()
    return library is not None and (library.uses_all_cores or torch.get_num_threads() == 1)


def call(name, *arguments):
    """A function of native_training.c. Tensors and structs are given by their addresses."""
    converted = []
    for argument in arguments:
        if torch.is_tensor(argument):
            assert argument.is_contiguous()
            argument = argument.data_ptr()
        elif isinstance(argument, ctypes.Structure):
            argument = ctypes.addressof(argument)
        converted.append(argument)
    getattr(load_library(), name)(*converted)


def is_bfloat16(x):
    return x.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------
# Norms


def norm(x, weight, bias, eps, is_layer_norm):
    """LayerNorm, or RMSNorm, of x (..., C). weight, bias: (C,) or None."""
    return NormFunction.apply(x, weight, bias, eps, is_layer_norm)


class NormFunction(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, eps, is_layer_norm):
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.options = eps, is_layer_norm
        y = torch.empty_like(x)
        layer, kept = norm_layer(x, weight, bias, eps, is_layer_norm)
        call('norm', layer, x, y, x.numel() // x.size(-1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        dx = torch.empty_like(x)
        sums = torch.empty(PARTS, 2, x.size(-1))
        layer, kept = norm_layer(x, weight, bias, *ctx.options)
        call('norm_gradient', layer, x, dy.contiguous(), dx, sums, x.numel() // x.size(-1), PARTS)
        dweight, dbias = sums.sum(0)
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dweight, dbias, None, None


def norm_layer(x, weight, bias, eps, is_layer_norm):
    """The C struct, and the tensors that it points to, which have to be kept."""
    kept = [None if parameter is None else parameter.float().contiguous()
            for parameter in (weight, bias)]
    layer = NormLayer(x.size(-1), is_layer_norm, is_bfloat16(x), eps, *map(pointer, kept))
    return layer, kept


# --------------------------------------------------------------------------------------------------
# Queries, keys and values


def can_split_heads(qkv, attn, rope):
    """Whether split_heads() has what an Attention does: not QK-norm with weights, nor padding."""
    if attn.q_norm is not None or not can_fuse(qkv):
        return False
    return rope is None or rope[0].dim() == 3


def split_heads(qkv, attn, rope):
    """q (B, H, T, D), k and v (B, n_kv_head, T, D) from qkv (B, T, (H + 2 n_kv_head) * D).

    attn: the Attention whose heads these are. rope: (cos, sin), each (T, 1, D / 2), or None.
    """
    cos, sin = (None, None) if rope is None else rope
    n_head = attn.q_width // attn.head_dim
    n_kv_head = attn.kv_width // attn.head_dim
    return HeadsFunction.apply(qkv, n_head, n_kv_head, bool(attn.qk_norm), cos, sin)


class HeadsFunction(Function):

    @staticmethod
    def forward(ctx, qkv, n_head, n_kv_head, is_normed, cos, sin):
        qkv = qkv.contiguous()
        B, T, width = qkv.shape
        D = width // (n_head + 2 * n_kv_head)
        ctx.options = n_head, n_kv_head, is_normed
        ctx.save_for_backward(qkv, cos, sin)
        q = qkv.new_empty(B, n_head, T, D)
        k = qkv.new_empty(B, n_kv_head, T, D)
        v = qkv.new_empty(B, n_kv_head, T, D)
        shape, kept = head_shape(qkv, n_head, n_kv_head, is_normed, cos, sin)
        call('split_heads', shape, qkv, q, k, v)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        qkv, cos, sin = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        shape, kept = head_shape(qkv, *ctx.options, cos, sin)
        call('split_heads_gradient', shape, qkv, dq.contiguous(), dk.contiguous(), dv.contiguous(),
             dqkv)
        return dqkv, None, None, None, None, None


def head_shape(qkv, n_head, n_kv_head, is_normed, cos, sin):
    """The C struct, and the tensors that it points to, which have to be kept."""
    B, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    kept = [None if table is None else table.float().reshape(T, D // 2).contiguous()
            for table in (cos, sin)]
    shape = HeadShape(B, T, n_head, n_kv_head, D, is_normed, is_bfloat16(qkv),
                      *map(pointer, kept))
    return shape, kept


# --------------------------------------------------------------------------------------------------
# Attention


def can_attend(q, k, mask):
    """Whether attention() has what is wanted: no mask, or one of padding."""
    if k.size(2) > LARGEST_ARRAY or not can_fuse(q):
        return False
    return mask is None or mask.shape[1:3] == (1, 1)


def attention(q, k, v, mask, is_causal, dropout=None):
    """softmax(q kᵀ / √D) v. q: (B, H, T, D); k, v: (B, H, S, D).

    mask: (B, 1, 1, S) bool, True = may be attended to, or None. is_causal: T == S, and no query
    sees later keys. dropout: a Dropout for the weights, or None.
    """
    if dropout is not None and (dropout.p == 0 or not dropout.training):
        dropout = None
    return AttentionFunction.apply(q, k, v, mask, is_causal, dropout)


class AttentionFunction(Function):
    """Causal attention takes a block of queries at a time, with the keys up to its end."""

    @staticmethod
    def forward(ctx, q, k, v, mask, is_causal, dropout):
        B, H, T, D = q.shape
        S = k.size(2)
        q, k, v = q.reshape(-1, T, D), k.reshape(-1, S, D), v.reshape(-1, S, D)
        if mask is not None:
            mask = mask.reshape(B, S).contiguous()
        y = torch.empty_like(q)
        saved = []
        for queries, keys in query_blocks(T, S, is_causal):
            weights = q[:, queries] @ k[:, keys].mT  # (B * H, queries, keys)
            call('softmax', score_shape(weights, D, queries, is_causal, H, mask), weights)
            keep = None if dropout is None else dropout.draw(weights)
            torch.bmm(dropped(weights, keep), v[:, keys], out=y[:, queries])
            saved += weights, keep
        ctx.is_causal = is_causal
        ctx.save_for_backward(q, k, v, *saved)
        return y.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, *saved = ctx.saved_tensors
        B, H, T, D = dy.shape
        S = k.size(1)
        dy = dy.reshape(-1, T, D)
        dq = torch.empty_like(q)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)

        # From the last block, which sees all keys, to the first. beta=0: no sum yet to add to
        blocks = query_blocks(T, S, ctx.is_causal)
        for i in reversed(range(len(blocks))):
            queries, keys = blocks[i]
            weights, keep = saved[2 * i], saved[2 * i + 1]
            beta = 0 if i == len(blocks) - 1 else 1
            dv[:, keys].baddbmm_(dropped(weights, keep).mT, dy[:, queries], beta=beta)
            dscores = dropped(dy[:, queries] @ v[:, keys].mT, keep)
            shape = score_shape(weights, D, queries, ctx.is_causal)
            call('softmax_gradient', shape, weights, dscores)
            torch.bmm(dscores, k[:, keys], out=dq[:, queries])
            dk[:, keys].baddbmm_(dscores.mT, q[:, queries], beta=beta)
        return dq.view(B, H, T, D), dk.view(B, H, S, D), dv.view(B, H, S, D), None, None, None


def query_blocks(T, S, is_causal):
    """Slices (queries, keys) that cover all T queries and the S keys that they may see."""
    if not is_causal:
        return [(slice(0, T), slice(0, S))]
    blocks = []
    for first in range(0, T, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, T)
        blocks.append((slice(first, last), slice(0, last)))
    return blocks


def dropped(weights, keep):
    """Weights after dropout. keep: what Dropout.draw() returned, or None."""
    return weights if keep is None else weights * keep


def score_shape(scores, D, queries, is_causal, n_head=1, mask=None):
    """The C struct for scores (B * H, queries, keys)."""
    first = queries.start if is_causal else -1
    return ScoreShape(*scores.shape, first, is_bfloat16(scores), 1 / math.sqrt(D), pointer(mask),
                      n_head)


# --------------------------------------------------------------------------------------------------
# Nonlinearities


def activate(x, kind):
    """'squared_relu': relu(x)², or 'gelu': its tanh form."""
    return ActivationFunction.apply(x, ACTIVATIONS[kind])


class ActivationFunction(Function):

    @staticmethod
    def forward(ctx, x, kind):
        x = x.contiguous()
        ctx.kind = kind
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        call('activate', kind, x, y, x.numel(), is_bfloat16(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        call('activate_gradient', ctx.kind, x, dy.contiguous(), dx, x.numel(), is_bfloat16(x))
        return dx, None


# --------------------------------------------------------------------------------------------------
# Token shift


def shift_tokens(x):
    """(B, T, C): the first half of each token's channels comes from the previous token."""
    return ShiftFunction.apply(x)


class ShiftFunction(Function):

    @staticmethod
    def forward(ctx, x):
        return moved(x, by=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return moved(dy, by=-1)


def moved(x, by):
    """The first half of each token's channels from the token before (by=1), or after it (-1)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call('shift_tokens', x, y, *x.shape, by, x.itemsize)
    return y
