"""
Linear layers for writing. A token costs one pass over all weights: how they lie in memory, and how large they are, is its price.

On a CPU bfloat16 weights are laid out in the blocks that oneDNN's kernels read; rounded to 8 bits they are half as large. LOG.md
has what either gains. Training keeps the plain layers of model.py.
"""
import warnings

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer of a CPU whose bfloat16 weights lie the way oneDNN reads them."""

    def __init__(self, linear):
        super().__init__()
        self.bias, self.softcap = linear.bias, getattr(linear, 'softcap', 0.0)
        self.pack(linear.weight.detach())

    def prepare_for_decoding(self, weight):
        """Store weight (out, in) in a layout of one's own."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(self, rows):
        """rows: (N, in); returns rows @ weight.T + bias, (N, out)."""
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, 'none', [], '')

    def forward(self, x):
        """x: (..., in); returns (..., out)."""
        y = self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return self.softcap * torch.tanh(y / self.softcap) if self.softcap else y


class Int8Linear(PackedLinear):
    """A linear layer with int8 weights and a scale for each output channel.

    On x86 CPUs PyTorch's FBGEMM kernels multiply integers: inputs are rounded to 8 bits too, each row by its own largest value.
    Elsewhere only the weights are int8, and the arithmetic is in the precision of the input.
    """

    def prepare_for_decoding(self, weight):
        scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12)             # (out,)
        self.fbgemm = weight.is_cpu and 'fbgemm' in torch.backends.quantized.supported_engines
        self.fbgemm &= hasattr(torch, 'quantize_per_channel')  # it is to leave PyTorch some day: then the other branch serves
        if self.fbgemm:
            zero = torch.zeros(len(scale), dtype=torch.int64)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                weight = torch.quantize_per_channel(weight.float(), scale, zero, axis=0, dtype=torch.qint8)
            self.weight = torch.ops.quantized.linear_prepack(weight, None)
            self.reduce_range = not torch.cpu._is_vnni_supported()  # older processors add products up in 16 bits: leave one free
        else:
            self.register_buffer('scale', scale.to(weight.dtype))
            self.register_buffer('weight', (weight.float() / scale[:, None]).round().to(torch.int8))

    def product(self, rows):
        if not self.fbgemm and len(rows) <= 4 and rows.device.type in ('cpu', 'mps') and rows.dtype != torch.float64:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)              # PyTorch's kernel: it reads the bytes once
        elif not self.fbgemm:
            y = rows @ self.weight.to(rows.dtype).t() * self.scale
        elif len(rows) == 1:
            y = torch.ops.quantized.linear_dynamic(rows.float(), self.weight, self.reduce_range)
        else:  # the kernel has one scale for all rows: let them be alike
            size = rows.float().abs().amax(dim=1, keepdim=True).clamp_(min=1e-12)     # (N, 1)
            y = torch.ops.quantized.linear_dynamic(rows / size, self.weight, self.reduce_range).mul_(size)
        return y.to(rows.dtype) if self.bias is None else (y + self.bias).to(rows.dtype)


def prepare_for_decoding(model, bits=None):
    """Replace the linear layers of a GPT or Seq2Seq, in place, by what writes fastest where they are; bits=8: by Int8Linear.

    Embeddings stay as they are. Returns the model; it can't be trained any more.
    """
    p = next(model.parameters())
    blocks = p.is_cpu and p.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() \
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if bits == 8 or blocks:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child) if bits == 8 else PackedLinear(child))
    return model
