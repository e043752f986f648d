"""
From the last layer of a model to logits, or to a loss without ever holding all logits.

References:
  loss and gradient in one pass over slices  Hsu et al. 2024,   https://arxiv.org/abs/2410.10989 (Liger)
  adaptive softmax                           Grave et al. 2017, https://arxiv.org/abs/1609.04309
"""
import torch
from torch import nn
from torch.nn import functional as F

MAX_LOGITS = 2**26  # held at a time: 128 MB in bfloat16
CACHED = 2**20      # … a CPU turns so many of them at a time into a gradient, in float32: what its cache holds


def parts(x, targets, n):
    """Pairs of parts of x and targets, (N, …) and (N,), of n rows or, at the end, fewer."""
    return zip(x.split(max(1, n)), targets.split(max(1, n)))


class FusedLoss(torch.autograd.Function):
    """Summed cross-entropy of x (N, C) through a linear layer (V, C), float32.

    The gradient with respect to logits is softmax minus target, known as soon as the logits are: it is computed with them, slice
    by slice, and what backward() has to do is scale. So logits are computed once, and no (N, V) tensor is ever held.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, label_smoothing, softcap):
        V, dtype = weight.size(0), x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        pad = -V % 8  # rows of logits that all begin at a multiple of 16 bytes: a faster product; what is added stays zero
        w, b = weight.new_zeros(V + pad, weight.size(1), dtype=dtype), None if bias is None else F.pad(bias.to(dtype), (0, pad))
        w[:V] = weight
        gx, gw, gb = [], torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        loss = torch.zeros((), device=x.device)
        at_once = CACHED if x.device.type == 'cpu' else MAX_LOGITS // 4
        at_once = MAX_LOGITS if torch.compiler.is_compiling() else at_once  # it would write a kernel for each part
        for xi, ti in parts(x.to(dtype), targets, MAX_LOGITS // V):
            logits = F.linear(xi, w, b)                                             # (n, V + pad)
            for some, t in parts(logits[:, :V], ti, at_once // V):
                capped = softcap * torch.tanh(some.float() / softcap) if softcap else some
                g = capped.log_softmax(dim=-1, dtype=torch.float32)
                loss -= (1 - label_smoothing) * g.gather(1, t[:, None]).sum()
                if label_smoothing:
                    loss -= label_smoothing / V * g.sum()
                g.exp_().sub_(label_smoothing / V)                                  # d loss / d logits
                g.scatter_add_(1, t[:, None], g.new_full((len(t), 1), label_smoothing - 1))
                some.copy_(g.mul_(1 - (capped / softcap).square()) if softcap else g)  # in the place of the logits themselves
                if bias is not None:
                    gb += g.sum(dim=0)
            gx.append(logits @ w)
            for some, g in zip(logits[:, :V].split(8192, dim=1), gw.split(8192)):  # all of it at once would be held twice
                g += some.t() @ xi
            del logits, some, capped                                                # before the next slice is made
        ctx.save_for_backward(torch.cat(gx).to(x.dtype), gw, gb)
        return loss

    @staticmethod
    def backward(ctx, grad):
        gx, gw, gb = ctx.saved_tensors
        return gx * grad, gw.mul_(grad), None if gb is None else gb * grad, None, None, None


class Head(nn.Linear):
    """A linear layer to logits, bounded by softcap where that is not 0."""

    def __init__(self, c):
        super().__init__(c.n_embd, c.vocab_size, bias=c.head_bias)
        self.softcap = c.softcap

    def forward(self, x):
        """x: (..., C); returns logits (..., V) in the precision of the product."""
        logits = super().forward(x)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def loss(self, x, targets, label_smoothing=0.0):
        """Summed cross-entropy of x (N, C) and targets (N,), none negative: float32."""
        return FusedLoss.apply(x, self.weight, self.bias, targets, label_smoothing, self.softcap)


class AdaptiveHead(nn.Module):
    """Adaptive softmax: frequent ids at full width, rare ones in clusters that are narrower and seldom computed.

    rank: (V,) int64 buffer, the place of each id when ids are ordered by frequency; train.py counts.
    """

    def __init__(self, c):
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(c.n_embd, c.vocab_size, list(c.cutoffs), c.div_value)
        self.register_buffer('rank', torch.arange(c.vocab_size))

    def forward(self, x):
        """x: (..., C); returns log-probabilities (..., V): logits as good as any."""
        with torch.autocast(x.device.type, enabled=False):  # PyTorch's module can't mix precisions
            return self.softmax.log_prob(x.flatten(0, -2).float())[:, self.rank].view(*x.shape[:-1], -1)

    def loss(self, x, targets, label_smoothing=0.0):
        """The same as Head.loss. Raises ValueError for label smoothing, which this head can't do."""
        if label_smoothing:
            raise ValueError('adaptive softmax (cutoffs) can\'t do label_smoothing: switch one of the two off')
        with torch.autocast(x.device.type, enabled=False):
            return -self.softmax(x.float(), self.rank[targets]).output.sum()


def score(head, x, targets):
    """(2,) float32: the summed cross-entropy of x (N, C) and targets (N,), and how many targets were the likeliest."""
    V, total = len(head.rank) if isinstance(head, AdaptiveHead) else head.weight.size(0), torch.zeros(2, device=x.device)
    for xi, ti in parts(x, targets, MAX_LOGITS // 2 // V):
        logits = head(xi).float()
        total += torch.stack((F.cross_entropy(logits, ti, reduction='sum'), (logits.argmax(dim=-1) == ti).sum()))
    return total
