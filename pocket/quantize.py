"""
Linear layers for decoding.

To generate a token, the processor reads every weight of the model once, and with few texts at a
time it does little with each. So a token costs about (bytes of all weights) / (bytes of memory read
per second): GPT-2 124M in bfloat16, 0.25 GB at 25 GB/s, takes 10 ms. Two things make that less:

    Bfloat16Linear   the same bfloat16 weights, in the order that is fastest to read
    Int8Linear       weights rounded to 8 bits: half as many bytes

And calling the hundreds of operations in between takes time, however little they compute:
pocket/stack.py deals with that.

docs/LOG.md has what each gains. Training keeps the plain layers: these have no gradients.
"""
import ctypes

import torch
from torch import nn

from model import MLP
from pocket import native
from pocket.kernels import cpu_has
from pocket.native import LARGEST_ARRAY, load_library, pointer
from pocket.stack import DecodingStack, can_be_stacked


def prepare_for_decoding(model, bits=None):
    """Replace the linear layers of a GPT or Seq2Seq, in place, by the fastest ones for its device.

    bits=8: by Int8Linear. None: by Bfloat16Linear for bfloat16 on a CPU that computes in it; any
    other model stays as it is. Embeddings stay in any case, and adaptive softmax becomes float32,
    in which it computes. On a CPU the blocks of a GPT also become a DecodingStack, if it can
    compute them. Returns the model, which can no longer be trained, moved or cast.
    """
    model.eval()  # rotary positions in training have another shape than pocket/stack.py expects
    in_adaptive_softmax = set()
    for module in model.modules():
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            in_adaptive_softmax.update(module.float().modules())

    if bits == 8:
        replacement = Int8Linear
    elif runs_in_bfloat16_on_cpu(model):
        replacement = Bfloat16Linear
    else:
        return model

    # Note where the layers are, not the layers: the memory of each is free once it is replaced
    places = []
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and module not in in_adaptive_softmax:
                places.append((module, name))
    child = None  # otherwise the loop's variable would keep the last layer alive
    for module, name in places:
        setattr(module, name, replacement(getattr(module, name)))
    if replacement is Bfloat16Linear:
        for module in model.modules():
            if is_gelu_separate(module):
                fuse_gelu(module)

    if next(model.parameters()).is_cpu and can_be_stacked(model):
        model.transformer.h = nn.ModuleList([DecodingStack(model.transformer.h)])
    return model


def is_gelu_separate(module):
    """Whether a module is an MLP for which fuse_gelu() can do something."""
    if not isinstance(module, MLP) or module.act != 'gelu':
        return False
    return isinstance(module.c_fc, Bfloat16Linear)


def fuse_gelu(mlp):
    """Make an MLP's first linear layer, a Bfloat16Linear, apply the GELU too.

    As a separate operation, PyTorch's tanh GELU took an eighth of GPT-2 124M's prefill.
    """
    mlp.c_fc.activation = 'gelu'
    mlp.activate = lambda x: x


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

    linear: the nn.Linear, or head of a model, that it replaces; its bias and softcap are kept.
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

    def _apply(self, *args, **kwargs):
        # .to(), .cuda() and .bfloat16() all come here. They would move the weights, but native.c
        # keeps the old addresses
        raise RuntimeError('move or cast a model before prepare_for_decoding(), not after it')

    def store(self, weight):
        """Keep weight, (out, in), in the subclass's own format."""
        raise NotImplementedError

    def multiply(self, rows):
        """rows: (N, in); returns rows @ weight.T + bias, (N, out)."""
        raise NotImplementedError


class Bfloat16Linear(DecodingLinear):
    """bfloat16 weights on a CPU, in the order that suits how many rows they are multiplied with.

    For one row, the next token of one text, they are plain, (out, in), and pocket/native.c reads
    them as fast as memory can. For several texts they are packed in blocks, as oneDNN's kernels
    read them. Rearranging takes as long as three or four tokens. A prompt comes once, and is not
    worth that; texts come back, as many rows each time. So weights are packed when two calls in a
    row have the same number of rows. (Not thread-safe: a call may replace what another reads.)

    activation: 'gelu' applies the tanh form of it to the results, see fuse_gelu().
    """
    MOST_TEXTS = 256  # with more rows, packed weights are no faster
    activation = 'none'

    def store(self, weight):
        self.weight = weight.contiguous()
        self.library = load_library() if cpu_has('avx512_bf16') else None
        self.float_bias = None if self.bias is None else self.bias.detach().float()
        self.latest_rows = 0  # how many the latest call had
        self.point_to_weights()

    def point_to_weights(self):
        """Tell C where the plain weights are."""
        self.is_packed = False
        self.struct = native.Bfloat16Weights(self.in_features, self.out_features,
                                             pointer(self.weight), pointer(self.float_bias))
        self.struct_pointer = ctypes.addressof(self.struct)

    def multiply(self, rows):
        is_repeated = len(rows) == self.latest_rows
        self.latest_rows = len(rows)
        if len(rows) == 1 and self.library is not None:
            if self.is_packed:
                self.weight = self.weight.to_dense()
                self.point_to_weights()
            # C would read anything
            assert rows.dtype == torch.bfloat16 and rows.size(1) == self.in_features
            x = rows.contiguous()
            y = x.new_empty(1, self.out_features)
            self.library.multiply_bfloat16(self.struct_pointer, x.data_ptr(), y.data_ptr(),
                                           self.activation == 'gelu')
            return y

        is_worth_packing = is_repeated and len(rows) <= self.MOST_TEXTS
        if self.library is None:  # then they are never needed as they were
            is_worth_packing = True
        if is_worth_packing and not self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.is_packed = True
        # 'tanh' is the form of a GELU, and ignored without one
        return torch.ops.mkldnn._linear_pointwise(
            rows, self.weight, self.bias, self.activation, [], 'tanh')


class Int8Linear(DecodingLinear):
    """int8 weights, with a scale for each output channel: weight ~ scale * int8.

    Only the weights have 8 bits. For a few rows on a CPU, pocket/native.c computes in integers and
    gives the inputs 14 bits. 8 would be too few: some inputs of an MLP are 40 times as large as
    most, so that most would become one of a handful of values. Many rows are multiplied in bfloat16
    if the CPU has instructions for it, otherwise in the precision of the input.
    """

    def store(self, weight):
        # The largest weight of a channel becomes 127. A channel of zeros must not divide by zero.
        largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1))  # abs() would copy all
        scale = (largest.float() / 127).clamp(min=1e-12)  # (out,)
        rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        # Part by part, so that little of it exists in float32
        for part, part_rounded, part_scale in zip(
                weight.split(4096), rounded.split(4096), scale.split(4096)):
            part_rounded.copy_((part.float() / part_scale[:, None]).round())
        self.register_buffer('weight', rounded)
        self.register_buffer('scale', scale)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.float(), requires_grad=False)

        self.library = load_library() if weight.is_cpu else None
        self.struct = native.Int8Weights(self.in_features, self.out_features, pointer(rounded),
                                         pointer(scale), pointer(self.bias))
        self.struct_pointer = ctypes.addressof(self.struct)
        self.max_rows_in_c = min(16, LARGEST_ARRAY // self.in_features)

    def multiply(self, rows):
        # The more rows, the less it matters how many bytes a weight has, and PyTorch has quicker
        # products of large matrices
        if self.library is not None and len(rows) <= self.max_rows_in_c:
            x = rows.float().contiguous()
            y = x.new_empty(len(x), self.out_features)
            self.library.multiply_int8(self.struct_pointer, x.data_ptr(), y.data_ptr(), len(x))
            return y.to(rows.dtype)

        # For a few rows PyTorch has a kernel that reads the weights as bytes, in blocks of 32. On
        # CPUs it is quick for bfloat16 alone
        has_kernel = rows.device.type in ('cpu', 'mps') and self.in_features % 32 == 0
        if has_kernel and len(rows) <= 4:
            x = rows.bfloat16() if rows.is_cpu else rows
            # It wants a scale per channel: ones, because ours is applied below, in float32
            ones = torch.ones(self.out_features, device=x.device, dtype=x.dtype)
            y = torch._weight_int8pack_mm(x, self.weight, ones)
        else:
            x = rows.bfloat16() if rows.is_cpu and cpu_has('avx512_bf16') else rows
            y = x @ self.weight.to(x.dtype).t()
        y = y.float() * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(rows.dtype)
