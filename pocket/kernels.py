"""
Faster versions of formulas in model.py, mainly for CPUs. tests/test_kernels.py checks each of them
against its formula.

    Dropout           nn.Dropout, from random bytes instead of a Bernoulli number per element
    squared_relu      F.relu(x).square()
    gelu              F.gelu(x, approximate='tanh')
    attention         softmax(q kᵀ / √D) v: plain_attention() in model.py
    cross_entropy     loss and gradient in slices of rows: plain_cross_entropy() in model.py
    loss_and_correct  such slices for validation, which also count correct predictions

Measured speedups are in docs/LOG.md.
"""
import math
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from pocket import fused

# --------------------------------------------------------------------------------------------------
# Dropout


class Dropout(nn.Module):
    """nn.Dropout, about seven times faster on a CPU.

    PyTorch draws a Bernoulli number per element; we draw random bytes, eight in each 64-bit number.
    So on a CPU p is rounded to a multiple of 1/256 (0.2 becomes 51/256). What is kept is scaled by
    1 / (1 - p) with the rounded p, so the expectation is right.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != 'cpu':
            return F.dropout(x, self.p)
        keep = self.draw(x)
        if fused.can_fuse(x):
            return fused.dropout(x, keep)
        is_kept = torch.empty_like(x, requires_grad=False)  # 1 or 0 in x's dtype, which is fastest
        torch.gt(keep.bytes, keep.threshold, out=is_kept)
        return x * is_kept.mul_(keep.scale)

    def draw(self, x):
        """Which elements of x to keep."""
        dropped_values = round(self.p * 256)  # how many of the 256 values of a byte mean "drop"
        if not 0 < dropped_values < 256:
            is_kept = torch.empty(x.shape, dtype=torch.int8).bernoulli_(1 - self.p)
            return fused.Keep(is_kept, threshold=0, scale=1 / (1 - self.p))

        # One random byte per element, drawn eight at a time as 64-bit integers
        num_words = math.ceil(x.numel() / 8)
        random_words = torch.empty(num_words, dtype=torch.int64)
        random_words.random_(-2**63, None)  # None: up to the largest int64, so all bits are random
        random_bytes = random_words.view(torch.int8)[:x.numel()].view(x.shape)  # -128 to 127
        return fused.Keep(
            random_bytes,
            threshold=dropped_values - 129,  # the largest byte that is dropped
            scale=256 / (256 - dropped_values),  # 1 / (1 - p)
        )


# --------------------------------------------------------------------------------------------------
# Nonlinearities


def squared_relu(x):
    """F.relu(x).square()"""
    if fused.can_fuse(x):
        return fused.activate(x, 'squared_relu')
    return F.relu(x).square()


def gelu(x):
    """GELU in the tanh form, GPT-2's."""
    if fused.can_fuse(x):
        return fused.activate(x, 'gelu')
    return F.gelu(x, approximate='tanh')


# --------------------------------------------------------------------------------------------------
# Attention

MAX_SCORES = 1024 * 1024  # the largest T × S for which plain matmuls beat the fused kernel on a CPU


@lru_cache(maxsize=8)
def causal_bias(length, dtype, device):
    """(length, length) to add to attention scores: 0 on and below the diagonal, -inf above."""
    with torch.inference_mode(False):  # it is cached, and training must be able to use it
        bias = torch.full((length, length), -math.inf, dtype=dtype, device=device)
        return bias.triu(1)


def attention(q, k, v, mask=None, is_causal=False, dropout=None):
    """softmax(q kᵀ / √D) v; arguments and result are those of plain_attention() in model.py.

    On GPUs PyTorch's fused kernel is fastest, and never holds the scores. On CPUs it wins for a
    single query in float32, for very long texts and, if the CPU has AMX, when no gradients are
    needed. Otherwise two matmuls and a softmax are faster, up to ten times.
    """
    T, S = q.size(2), k.size(2)
    group = q.size(1) // k.size(1)
    p = dropout.p if dropout is not None and dropout.training else 0.0
    if group > 1 and T == 1:
        # Grouped-query attention, decoding: a group of queries attends to the same keys. So it
        # takes the place of the T queries, and each key is read once
        B, H, _, D = q.shape
        q = q.view(B, H // group, group, D)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        return y.reshape(B, H, 1, D)
    if group > 1:
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    if is_pytorchs_faster(q, S):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=is_causal)
    if fused.can_attend(q, k, mask):
        return fused.attention(q, k, v, mask, is_causal, dropout)
    if not is_causal:
        return attend_block(q, k, v, mask, dropout=dropout)

    # Causal: in blocks of queries, each with the keys up to its end. Nearly half of all scores lie
    # above the diagonal, and are never computed
    if T > fused.QUERY_BLOCK:
        k = k.contiguous()  # once, instead of in each product
        v = v.contiguous()
    blocks = []
    for queries, keys in fused.query_blocks(T, S, is_causal=True):
        q_block, k_block, v_block = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        blocks.append(attend_block(q_block, k_block, v_block, None, queries.start, dropout))
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat(blocks, dim=2)


def is_pytorchs_faster(q, S):
    """Whether PyTorch's fused kernel is the fastest one for queries (B, H, T, D) and S keys."""
    T = q.size(2)
    if q.device.type != 'cpu' or T * S > MAX_SCORES:
        return True
    if T == 1:
        return q.dtype == torch.float32
    # In this order: training is compiled, and torch.compile can't trace cpu_has()
    return not torch.is_grad_enabled() and cpu_has('amx_bf16')


@lru_cache(maxsize=8)
def cpu_has(feature):
    """Whether the CPU has an instruction set: amx_bf16 (Intel's matrix unit), avx512_bf16, …"""
    return torch.cpu.get_capabilities().get(feature, False)


def attend_block(q, k, v, mask=None, causal_start=None, dropout=None):
    """plain_attention(), with its operations reordered for speed.

    causal_start: the position of the first query, if no query may see later keys.
    """
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # scaling q is less work than scores
    if causal_start is not None:
        scores += causal_bias(k.size(2), scores.dtype, scores.device)[causal_start:]
    elif mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v


# --------------------------------------------------------------------------------------------------
# Cross-entropy of a large vocabulary

MAX_LOGITS = 2**26  # logits held at once: 128 MB in bfloat16
CACHE_LOGITS = 2**20  # logits processed at once on a CPU: in float32 they fit its cache
WEIGHT_ROWS = 8192  # rows of the weight gradient per matmul, so that it is not held twice


def cross_entropy(x, weight, bias, targets, label_smoothing=0.0, softcap=0.0):
    """Summed cross-entropy of x (N, C), through a linear layer (V, C), to targets (N,): float32.

    The same as plain_cross_entropy() in model.py, which needs about three (N, V) tensors.
    """
    return SlicedCrossEntropy.apply(x, weight, bias, targets, label_smoothing, softcap)


class SlicedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over slices of rows, so that no (N, V) tensor is ever held.

    The gradient with respect to the logits is softmax minus target, known as soon as the logits
    are. So forward() computes it right away, overwriting the logits, and backward() only scales
    it. Hsu et al. 2024 (Liger Kernel), https://arxiv.org/abs/2410.10989
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, label_smoothing, softcap):
        V = weight.size(0)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)

        # Pad the vocabulary to a multiple of 8: then all rows of logits begin at a multiple of 16
        # bytes, which makes the products faster. What is added stays zero
        extra = -V % 8  # how much V lacks to a multiple of 8
        padded_weight = weight.new_zeros(V + extra, weight.size(1), dtype=dtype)
        padded_weight[:V] = weight
        padded_bias = None
        if bias is not None:
            padded_bias = F.pad(bias.to(dtype), (0, extra))

        # Matmuls prefer many rows; the elementwise work between them prefers few, which stay in the
        # cache. (torch.compile would emit a kernel per part, so it gets one part.)
        logits_per_part = CACHE_LOGITS if x.device.type == 'cpu' else MAX_LOGITS // 4
        if torch.compiler.is_compiling():
            logits_per_part = MAX_LOGITS
        rows_per_slice = max(1, MAX_LOGITS // V)
        rows_per_part = max(1, logits_per_part // V)

        loss = torch.zeros((), device=x.device)
        grad_x = []
        grad_weight = torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        slices = zip(x.to(dtype).split(rows_per_slice), targets.split(rows_per_slice))
        for x_slice, target_slice in slices:
            logits = F.linear(x_slice, padded_weight, padded_bias)  # (n, V + extra)

            # The loss, part by part; the gradient takes the place of the logits
            grad_logits = logits[:, :V]
            parts = zip(grad_logits.split(rows_per_part), target_slice.split(rows_per_part))
            for part, target in parts:
                part_loss, grad = loss_and_gradient(part, target, label_smoothing, softcap)
                loss += part_loss
                part.copy_(grad)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)

            # Gradient of x, (n, C). From here on, `logits` holds the gradient of the logits
            grad_x.append(logits @ padded_weight)

            # Gradient of the weight, (V, C), some ids at a time
            columns = grad_logits.split(WEIGHT_ROWS, dim=1)
            for grad_columns, grad_rows in zip(columns, grad_weight.split(WEIGHT_ROWS)):
                grad_rows += grad_columns.t() @ x_slice

            # Free this slice before computing the next
            del logits, grad_logits, parts, part, grad, columns, grad_columns
        ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        if grad_bias is not None:
            grad_bias = grad_bias * grad_loss
        return grad_x * grad_loss, grad_weight.mul_(grad_loss), grad_bias, None, None, None


def loss_and_gradient(logits, targets, label_smoothing, softcap):
    """Summed loss of logits (n, V) before softcap, float32, and its gradient with respect to them.

    With smoothing e, the target distribution is 1 - e on the target plus e / V on every id.
    """
    V = logits.size(1)
    capped = logits
    if softcap:
        capped = softcap * torch.tanh(logits.float() / softcap)
    logp = capped.log_softmax(dim=-1, dtype=torch.float32)  # (n, V)

    loss = -(1 - label_smoothing) * logp.gather(1, targets[:, None]).sum()
    if label_smoothing:
        loss = loss - label_smoothing / V * logp.sum()

    # softmax minus target distribution, in the memory of logp
    grad = logp.exp_().sub_(label_smoothing / V)
    minus_target = grad.new_full((len(targets), 1), label_smoothing - 1)
    grad.scatter_add_(1, targets[:, None], minus_target)
    if softcap:
        grad.mul_(1 - (capped / softcap).square())  # the slope of tanh
    return loss, grad


def loss_and_correct(head, x, targets, vocab_size):
    """(2,) float32: summed cross-entropy of x (N, C) and targets (N,), and how many are the argmax.

    For validation: no gradient, no smoothing, and any head that gives logits.
    """
    rows = max(1, MAX_LOGITS // 2 // vocab_size)
    total = torch.zeros(2, device=x.device)
    for x_slice, target_slice in zip(x.split(rows), targets.split(rows)):
        logits = head(x_slice).float()  # (n, V)
        loss = F.cross_entropy(logits, target_slice, reduction='sum')
        correct = (logits.argmax(dim=-1) == target_slice).sum()
        total += torch.stack((loss, correct))
    return total
