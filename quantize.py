"""Weights in 8 bits, for writing: half the memory traffic of bfloat16, and that is what a token costs where few are written."""
import torch
from torch import nn


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, a scale for each output channel, and arithmetic in the precision of its input."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)                     # (out,)
        self.register_buffer('weight', (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer('scale', scale.to(linear.weight.dtype))
        self.bias, self.softcap = linear.bias, getattr(linear, 'softcap', 0.0)

    def forward(self, x):
        """x: (..., in); returns (..., out)."""
        rows = x.flatten(0, -2)
        if rows.size(0) <= 4 and x.device.type in ('cpu', 'mps') and x.dtype != torch.float64:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)              # PyTorch's kernel: it reads the bytes once
        else:
            y = rows @ self.weight.to(x.dtype).t() * self.scale
        y = y if self.bias is None else y + self.bias
        y = y.view(*x.shape[:-1], -1)
        return self.softcap * torch.tanh(y / self.softcap) if self.softcap else y


def quantize(model):
    """Replace the linear layers of a GPT or Seq2Seq by Int8Linear, in place; embeddings stay as they are. Returns the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model
