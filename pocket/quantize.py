"""
Linear layers for decoding.

To generate a token, the processor reads every weight of the model once, and with few texts at a
time it does little with each. So a token costs about (bytes of all weights) / (bytes of memory read
per second): GPT-2 124M in bfloat16, 0.25 GB at 25 GB/s, takes 10 ms. Two things make that less:

    PackedLinear   the same bfloat16 weights, in the order in which the CPU's kernels read them
    Int8Linear     weights rounded to 8 bits: half as many bytes

And calling the hundreds of operations in between takes time, however little they compute: that is
the matter of pocket/stack.py.

docs/LOG.md has what each gains. Training keeps the plain layers: these have no gradients.
"""
import warnings

import torch
from torch import nn

from pocket.stack import DecodingStack, can_be_stacked, join, split


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
    levels = None  # if it multiplies what split() makes of its inputs, with multiply_split()

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

    On x86 CPUs PyTorch's FBGEMM kernels multiply integers by integers. 8 bits are too few for the
    inputs: in an MLP some are 40 times as large as most, which then become a handful of values.
    So there are two rows of 8 bits for each, a coarse one and what it lacks: see split(). That
    takes no longer, as the time goes into reading the weights. Everywhere else only the weights are
    int8, and the arithmetic is in the precision of the input.
    """

    def store(self, weight):
        # The largest weight of a channel becomes 127. A channel of zeros must not divide by zero.
        largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1))  # without a copy
        scale = (largest.float() / 127).clamp(min=1e-12)  # (out,)

        self.fbgemm = weight.is_cpu and has_fbgemm()
        if self.fbgemm:
            self.weight = pack_for_fbgemm(weight, scale)
            # Processors without VNNI add products in 16 bits: inputs of 7 bits avoid overflow
            self.levels = 127 if torch.cpu._is_vnni_supported() else 63
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
        pairs, scale = split(rows.float(), self.levels)
        return join(self.multiply_split(pairs), scale, self.levels)

    def multiply_split(self, pairs):
        """pairs @ weight.T, (2 N, out) float32. pairs: what split() returns."""
        zero_point = self.levels + 1  # inputs are integers from 1 on
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            pairs, 1.0, zero_point, self.weight)

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
    return ('fbgemm' in engines and hasattr(torch, 'quantize_per_channel')
            and hasattr(torch.ops.quantized, 'linear_with_input_q_dq_qweight_dq_output_fp32'))


def pack_for_fbgemm(weight, scale):
    """weight (out, in) rounded to int8 with scale (out,), in the layout that FBGEMM reads."""
    zero_point = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch says that quantize_per_channel is deprecated
        quantized = torch.quantize_per_channel(weight.float(), scale, zero_point, axis=0,
                                               dtype=torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)
