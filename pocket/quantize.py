"""
Linear layers for decoding.

To generate a token, the processor reads every weight of the model once, and with few texts at a
time it does little with each. So a token costs about (bytes of all weights) / (bytes of memory read
per second): GPT-2 124M in bfloat16, 0.25 GB at 25 GB/s, takes 10 ms. Two things make that less:

    PackedLinear   the same bfloat16 weights, in the order in which the CPU's kernels read them
    Int8Linear     weights rounded to 8 bits: half as many bytes

And each of a model's hundreds of operations takes a microsecond or more to call, however little it
computes. In a small model that is most of the time, so DecodingStack does with fewer of them.

docs/LOG.md has what each gains. Training keeps the plain layers: these have no gradients.
"""
import copy
import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT


def prepare_for_decoding(model, bits=None):
    """Replace the linear layers of a GPT or Seq2Seq, in place, by the fastest ones for its device.

    bits=8: by Int8Linear. None: by PackedLinear for bfloat16 on a CPU that computes in it; any
    other model stays as it is. Embeddings stay in any case, and adaptive softmax becomes float32,
    in which it computes. On a CPU the blocks of a GPT also become a DecodingStack, if it can
    compute them. Returns the model, which can no longer be trained.
    """
    in_adaptive_softmax = set()
    for module in model.modules():
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            in_adaptive_softmax.update(module.float().modules())

    if bits == 8:
        replacement = Int8Linear
    elif runs_in_bfloat16_on_cpu(model):
        replacement = PackedLinear
    else:
        return model

    # Note where the layers are, not the layers: the memory of each is free once it is replaced
    places = []
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and module not in in_adaptive_softmax:
                places.append((module, name))
    child = None
    for module, name in places:
        setattr(module, name, replacement(getattr(module, name)))

    if next(model.parameters()).is_cpu and can_be_stacked(model):
        model.transformer.h = nn.ModuleList([DecodingStack(model.transformer.h)])
    return model


def runs_in_bfloat16_on_cpu(model):
    """True if the weights are bfloat16 on a CPU for which oneDNN has bfloat16 kernels."""
    weight = next(model.parameters())
    if not weight.is_cpu or weight.dtype != torch.bfloat16:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class DecodingLinear(nn.Module):
    """A linear layer without gradients. Subclasses say how weights are stored and multiplied.

    linear: the nn.Linear, or head of a model, that it replaces; softcap and bias are taken over.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.softcap = getattr(linear, 'softcap', 0.0)
        self.store(linear.weight.detach())

    def forward(self, x):
        """x: (..., in); returns (..., out) in the precision of x."""
        y = self.multiply(x.flatten(0, -2))
        y = y.view(*x.shape[:-1], -1)
        if self.softcap:
            y = self.softcap * torch.tanh(y / self.softcap)
        return y

    def store(self, weight):
        """Keep weight, (out, in), in a form of one's own."""
        raise NotImplementedError

    def multiply(self, rows):
        """rows: (N, in); returns rows @ weight.T + bias, (N, out)."""
        raise NotImplementedError


class PackedLinear(DecodingLinear):
    """bfloat16 weights in blocks, the way oneDNN's kernels on a CPU read them."""

    def store(self, weight):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def multiply(self, rows):
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, 'none', [], '')


class Int8Linear(DecodingLinear):
    """int8 weights, with a scale for each output channel: weight ~ scale * int8.

    On x86 CPUs PyTorch's FBGEMM kernels multiply integers by integers. For that the inputs are
    rounded to 8 bits too. Everywhere else only the weights are int8, and the arithmetic is in the
    precision of the input.
    """

    def store(self, weight):
        # The largest weight of a channel becomes 127. A channel of zeros must not divide by zero.
        largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1))  # without a copy
        scale = (largest.float() / 127).clamp(min=1e-12)  # (out,)

        self.fbgemm = weight.is_cpu and has_fbgemm()
        if self.fbgemm:
            self.weight = pack_for_fbgemm(weight, scale)
            # Processors without VNNI add products in 16 bits: inputs of 7 bits avoid overflow
            self.reduce_range = not torch.cpu._is_vnni_supported()
        else:
            rounded = (weight.float() / scale[:, None]).round().to(torch.int8)
            self.register_buffer('weight', rounded)
            self.register_buffer('scale', scale.to(weight.dtype))

    def multiply(self, rows):
        if self.fbgemm:
            y = self.multiply_fbgemm(rows)
        else:
            y = self.multiply_weight_only(rows)
        if self.bias is not None:
            y = y + self.bias
        return y.to(rows.dtype)

    def multiply_fbgemm(self, rows):
        """rows @ weight.T, (N, out) float32, in integers."""
        if len(rows) == 1:
            return torch.ops.quantized.linear_dynamic(rows.float(), self.weight, self.reduce_range)

        # The kernel rounds all rows with one scale, which suits only the largest of them. Bring
        # them to the same size first: then a row's result hardly depends on its neighbors.
        size = rows.float().abs().amax(dim=1, keepdim=True).clamp_(min=1e-12)  # (N, 1)
        y = torch.ops.quantized.linear_dynamic(rows / size, self.weight, self.reduce_range)
        return y.mul_(size)

    def multiply_weight_only(self, rows):
        """rows @ weight.T, (N, out), in the precision of rows."""
        # For a few rows PyTorch has a kernel that reads the weights as bytes
        has_kernel = rows.device.type in ('cpu', 'mps') and rows.dtype != torch.float64
        if has_kernel and len(rows) <= 4:
            return torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return rows @ self.weight.to(rows.dtype).t() * self.scale


def has_fbgemm():
    """True if this PyTorch multiplies int8 matrices with FBGEMM (x86 CPUs).

    quantize_per_channel is to leave PyTorch some day. Int8Linear then does without FBGEMM.
    """
    engines = torch.backends.quantized.supported_engines
    return 'fbgemm' in engines and hasattr(torch, 'quantize_per_channel')


def pack_for_fbgemm(weight, scale):
    """weight (out, in) rounded to int8 with scale (out,), in the layout that FBGEMM reads."""
    zero_point = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch says that quantize_per_channel is deprecated
        quantized = torch.quantize_per_channel(weight.float(), scale, zero_point, axis=0,
                                               dtype=torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)


# --------------------------------------------------------------------------------------------------
# Fewer operations per token


def can_be_stacked(model):
    """Whether DecodingStack computes the blocks of a model."""
    if not isinstance(model, GPT):
        return False
    return model.config.norm_position == 'pre' and not model.config.token_shift


class DecodingStack(nn.Module):
    """All blocks of a GPT as one. Several tokens go through them as before, a single one quicker.

    blocks: the ModuleList, whose linear layers are DecodingLinear. It takes their place:
    model.transformer.h then has this as its only block.
    """

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.steps = [BlockStep(block) for block in blocks]

    def forward(self, x, context, cache=None, memory=None):
        """x: (B, T, C); returns the same shape, as Block.forward() in model.py does."""
        is_one_token = cache is not None and x.size(0) == x.size(1) == 1 and context.mask is None
        if is_one_token and cache.k.dtype == torch.float32:
            return self.step(x, context.rope, cache)
        for block in self.blocks:
            x = block(x, context, cache, memory)
        return x

    def step(self, x, rope, cache):
        """All blocks for a token x (1, 1, C) that follows those in the cache."""
        # What all layers need is taken apart once: (n_kv_head, D) for the keys of this token in a
        # layer's cache, (1, n_kv_head, S, D) for those of all tokens, the same for values
        position = cache.length
        key_slots = cache.k[:, 0, :, position].unbind()
        value_slots = cache.v[:, 0, :, position].unbind()
        keys = cache.k[:, :, :, :position + 1].unbind()
        values = cache.v[:, :, :, :position + 1].unbind()

        # rotate() in model.py, for both halves of a head at once: see BlockStep.rotate()
        if rope is not None:
            cos, sin = rope  # (1, 1, D/2)
            cos = cos[0].float()
            sin = sin[0].float()
            rope = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (1, D)

        # The residual stream is float32 here: there is so little of it that it costs nothing
        dtype = x.dtype
        shape = x.shape
        x = x[0].float()  # (1, C)
        for step, *of_layer in zip(self.steps, key_slots, value_slots, keys, values):
            x = step(x, dtype, rope, *of_layer)
        return x.to(dtype).view(shape)


class BlockStep:
    """Block.forward() of model.py for a single token: the same numbers, to rounding.

    It takes a third of the calls into PyTorch that the block takes, and keeps what it needs
    at hand: a look-up in an nn.Module costs as much as a small operation.
    """

    def __init__(self, block):
        attn = block.attn
        self.ln_1 = copy.deepcopy(block.ln_1).float()
        self.ln_2 = copy.deepcopy(block.ln_2).float()
        self.c_attn = attn.c_attn.multiply
        self.attn_proj = attn.c_proj.multiply
        self.c_fc = block.mlp.c_fc.multiply
        self.activate = block.mlp.activate
        self.mlp_proj = block.mlp.c_proj.multiply
        self.attn = attn
        self.qk_norm = attn.qk_norm
        self.head_dim = attn.head_dim
        self.n_head = attn.q_width // attn.head_dim
        self.n_kv_head = attn.kv_width // attn.head_dim

    def __call__(self, x, dtype, rope, key_slot, value_slot, keys, values):
        """x: (1, C) float32; returns the same shape. dtype: of the linear layers. The rest is from
        DecodingStack.step()."""
        # Attention
        h = normalize(self.ln_1, x).to(dtype)
        heads = self.c_attn(h).float().view(-1, self.head_dim)  # (n_head + 2 n_kv_head, D)
        qk = heads[:-self.n_kv_head]
        if self.qk_norm:
            qk = self.attn.normalize(qk[None, None], self.n_head)[0, 0]
        if rope is not None:
            qk = self.rotate(qk, *rope)
        key_slot.copy_(qk[self.n_head:])
        value_slot.copy_(heads[-self.n_kv_head:])
        q = qk[:self.n_head].view(1, self.n_kv_head, -1, self.head_dim)  # a group for each key
        y = F.scaled_dot_product_attention(q, keys, values)
        x = x + self.attn_proj(y.reshape(1, -1).to(dtype))

        # MLP
        h = normalize(self.ln_2, x).to(dtype)
        h = self.activate(self.c_fc(h))
        return x + self.mlp_proj(h)

    def rotate(self, x, cos, sin):
        """rotate() in model.py. x: (n, D); cos, sin: (1, D), with minus sin in the first half."""
        a, b = x.chunk(2, dim=-1)
        swapped = torch.cat((b, a), dim=-1)
        return torch.addcmul(x * cos, swapped, sin)


def normalize(norm, x):
    """norm(x), in float32, for a single token's x (1, C)."""
    if isinstance(norm, nn.LayerNorm):
        return norm(x)

    # F.rms_norm consists of seven operations on a CPU. The mean square of one token is a number
    # that Python can compute with
    channels = x[0]
    mean_square = torch.dot(channels, channels).item() / len(channels)
    scale = 1 / math.sqrt(mean_square + norm.eps)
    return (x * norm.weight).mul_(scale)
