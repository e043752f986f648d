"""
The operations between a Transformer's matrix products, on a CPU, with gradients: one C function
each (pocket/native_training.c) in place of up to ten PyTorch operations.

model.py and pocket/kernels.py use them if can_fuse() allows it, and plain PyTorch otherwise.
Tensors are bfloat16 or float32; C computes in float32. tests/test_fused.py checks every function
and its gradient against plain PyTorch in float64.
"""
import ctypes
import math
from typing import NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pocket.native import (
    ACTIVATIONS,
    LARGEST_ARRAY,
    HeadShape,
    Norm,
    ScoreShape,
    load_library,
    pointer,
)

PARTS = 16  # groups of rows: gradients of a norm's weights are summed within each, then over all
QUERY_BLOCK = 256  # queries per block of causal attention; keys after the block are skipped


def can_fuse(x):
    """Whether the functions below support this tensor."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return False
    if x.dtype not in (torch.bfloat16, torch.float32):
        return False
    return 0 < x.dim() and x.size(-1) <= LARGEST_ARRAY and is_available()


def is_available():
    """Whether the C library could be compiled, and uses as many cores as PyTorch."""
    library = load_library()
    return library is not None and (library.uses_all_cores or torch.get_num_threads() == 1)


def call(name, *arguments):
    """Call a function of native_training.c. Tensors and structs are passed by address."""
    converted = []
    for argument in arguments:
        if torch.is_tensor(argument):
            if not argument.is_contiguous() or not argument.is_cpu:
                raise ValueError(f'{name}: a tensor is not contiguous, or not on the CPU')
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
    for parameter in (weight, bias):
        if parameter is not None and (parameter.shape != x.shape[-1:] or not parameter.is_cpu):
            raise ValueError(f'a norm of width {len(parameter)} on {parameter.device} does not fit '
                             f'{tuple(x.shape)} on the CPU')
    return NormFunction.apply(x, weight, bias, eps, is_layer_norm)


class NormFunction(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, eps, is_layer_norm):
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.options = eps, is_layer_norm
        y = torch.empty_like(x)
        layer, buffers = norm_layer(x, weight, bias, eps, is_layer_norm)
        call('norm', layer, x, y, x.numel() // x.size(-1), is_bfloat16(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        dx = torch.empty_like(x)
        sums = x.new_empty(PARTS, 2, x.size(-1), dtype=torch.float32)
        layer, buffers = norm_layer(x, weight, bias, *ctx.options)
        call('norm_gradient', layer, x, dy.contiguous(), dx, sums, x.numel() // x.size(-1), PARTS,
             is_bfloat16(x))
        dweight, dbias = sums.sum(0)
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dweight, dbias, None, None


def norm_layer(x, weight, bias, eps, is_layer_norm):
    """The C struct, and the tensors that it points to: keep both until the call returns."""
    buffers = [None if parameter is None else parameter.float().contiguous()
               for parameter in (weight, bias)]
    return Norm(x.size(-1), is_layer_norm, eps, *map(pointer, buffers)), buffers


# --------------------------------------------------------------------------------------------------
# Queries, keys and values


def can_split_heads(qkv, attn, rope):
    """Whether split_heads() covers this case: no QK-norm with weights, no padded rows."""
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
        ctx.options = qkv.shape, n_head, n_kv_head, is_normed
        ctx.save_for_backward(qkv if is_normed else None, cos, sin)
        q = qkv.new_empty(B, n_head, T, D)
        k = qkv.new_empty(B, n_kv_head, T, D)
        v = qkv.new_empty(B, n_kv_head, T, D)
        shape, buffers = head_shape(qkv.dtype, *ctx.options, cos, sin)
        call('split_heads', shape, qkv, q, k, v)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        qkv, cos, sin = ctx.saved_tensors
        dqkv = dq.new_empty(ctx.options[0])
        shape, buffers = head_shape(dq.dtype, *ctx.options, cos, sin)
        call('split_heads_gradient', shape, qkv, dq.contiguous(), dk.contiguous(), dv.contiguous(),
             dqkv)
        return dqkv, None, None, None, None, None


def head_shape(dtype, qkv_shape, n_head, n_kv_head, is_normed, cos, sin):
    """The C struct, and the tensors that it points to: keep both until the call returns."""
    B, T, width = qkv_shape
    D = width // (n_head + 2 * n_kv_head)
    buffers = [None if table is None else table.float().reshape(T, D // 2).contiguous()
               for table in (cos, sin)]
    shape = HeadShape(B, T, n_head, n_kv_head, D, is_normed, dtype == torch.bfloat16,
                      *map(pointer, buffers))
    return shape, buffers


# --------------------------------------------------------------------------------------------------
# Attention


def can_attend(q, k, mask):
    """Whether attention() covers this case: no mask, or a padding mask (B, 1, 1, S)."""
    if not 0 < k.size(2) <= LARGEST_ARRAY or not can_fuse(q):
        return False
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.shape == (q.size(0), 1, 1, k.size(2))


def attention(q, k, v, mask, is_causal, dropout=None):
    """softmax(q kᵀ / √D) v. q: (B, H, T, D); k, v: (B, H, S, D).

    mask: (B, 1, 1, S) bool, True = may be attended to, or None. is_causal: T == S, and no query
    sees later keys. dropout: a Dropout for the weights, or None.
    """
    assert not is_causal or (q.size(2) == k.size(2) and mask is None)
    if dropout is not None and (dropout.p == 0 or not dropout.training):
        dropout = None
    if torch.is_autocast_enabled('cpu'):  # some products below would be cast, others not
        dtype = torch.get_autocast_dtype('cpu')
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return AttentionFunction.apply(q, k, v, mask, is_causal, dropout, torch.is_grad_enabled())


class AttentionFunction(Function):
    """Causal attention takes a block of queries at a time, with the keys up to its end."""

    @staticmethod
    def forward(ctx, q, k, v, mask, is_causal, dropout, needs_gradient):
        B, H, T, D = q.shape
        S = k.size(2)
        q, k, v = q.reshape(B * H, T, D), k.reshape(B * H, S, D), v.reshape(B * H, S, D)
        if mask is not None:
            mask = mask.reshape(B, S).contiguous()
        y = torch.empty_like(q)
        all_weights = []
        all_bytes = []  # random ones, which decide what dropout keeps
        for queries, keys in query_blocks(T, S, is_causal):
            weights = q[:, queries] @ k[:, keys].mT  # (B * H, queries, keys)
            call('softmax', score_shape(weights, D, queries, is_causal, H, mask), weights)
            keep = None if dropout is None else dropout.draw(weights)
            torch.bmm(after_dropout(weights, keep), v[:, keys], out=y[:, queries])
            if needs_gradient:
                all_weights.append(weights)
                all_bytes.append(None if keep is None else keep.bytes)
        ctx.is_causal = is_causal
        ctx.dropout_options = None if keep is None else (keep.threshold, keep.scale)
        ctx.save_for_backward(q, k, v, *all_weights, *all_bytes)
        return y.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, *weights_and_bytes = ctx.saved_tensors
        B, H, T, D = dy.shape
        S = k.size(1)
        dy = dy.reshape(B * H, T, D)
        dq = torch.empty_like(q)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)

        # The last block sees all keys, so it comes first, and sets dk and dv (beta=0). The others
        # add to them
        blocks = query_blocks(T, S, ctx.is_causal)
        for i in reversed(range(len(blocks))):
            queries, keys = blocks[i]
            weights = weights_and_bytes[i]
            keep = None
            if ctx.dropout_options is not None:
                keep = Keep(weights_and_bytes[len(blocks) + i], *ctx.dropout_options)
            beta = 0 if i == len(blocks) - 1 else 1
            dv[:, keys].baddbmm_(after_dropout(weights, keep).mT, dy[:, queries], beta=beta)
            dscores = after_dropout(dy[:, queries] @ v[:, keys].mT, keep)
            shape = score_shape(weights, D, queries, ctx.is_causal)
            call('softmax_gradient', shape, weights, dscores)
            torch.bmm(dscores, k[:, keys], out=dq[:, queries])
            dk[:, keys].baddbmm_(dscores.mT, q[:, queries], beta=beta)
        dq, dk, dv = dq.view(B, H, T, D), dk.view(B, H, S, D), dv.view(B, H, S, D)
        return dq, dk, dv, None, None, None, None


def query_blocks(T, S, is_causal):
    """Slices (queries, keys) that cover all T queries and the S keys that they may see."""
    if not is_causal:
        return [(slice(0, T), slice(0, S))]
    blocks = []
    for first in range(0, T, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, T)
        blocks.append((slice(first, last), slice(0, last)))
    return blocks


def after_dropout(weights, keep):
    """Weights, or their gradient, after dropout. keep: what Dropout.draw() returned, or None."""
    return weights if keep is None else drop(weights, keep)


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
# Dropout


class Keep(NamedTuple):
    """What dropout keeps: elements whose random byte is above the threshold, times scale."""
    bytes: torch.Tensor  # int8, one per element
    threshold: int
    scale: float


def dropout(x, keep):
    """x, a tensor of keep's shape, after dropout."""
    return DropoutFunction.apply(x, *keep)


class DropoutFunction(Function):

    @staticmethod
    def forward(ctx, x, random_bytes, threshold, scale):
        ctx.save_for_backward(random_bytes)
        ctx.options = threshold, scale
        return drop(x, Keep(random_bytes, *ctx.options))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return drop(dy, Keep(*ctx.saved_tensors, *ctx.options)), None, None, None


def drop(x, keep):
    """What dropout() makes of x or, in a backward pass, of a gradient."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call('drop', x, keep.bytes, y, x.numel(), keep.threshold, keep.scale, is_bfloat16(x))
    return y


# --------------------------------------------------------------------------------------------------
# Token shift


def shift_tokens(x):
    """(B, T, C): the first half of each token's channels comes from the previous token."""
    return ShiftFunction.apply(x)


class ShiftFunction(Function):

    @staticmethod
    def forward(ctx, x):
        return shift(x, by=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return shift(dy, by=-1)


def shift(x, by):
    """The first half of each token's channels from the token before (by=1), or after it (-1)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call('shift_tokens', x, y, *x.shape, by, x.itemsize)
    return y
