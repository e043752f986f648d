"""
Optimizers: which parameter goes to which, Muon, and the learning-rate schedule.

train.py calls make_optimizers() once, then lr_factor() and set_learning_rates() every step.
"""
import math

import torch


def split_parameters(model, optimizer):
    """(matrices, others): the parameters that Muon trains, and those that AdamW trains.

    Muon is for the weight matrices inside the blocks. Embeddings and the head are matrices, too,
    but rows of a table: each is an entry of its own, with nothing to orthogonalize. AdamW has
    those, norms and biases; with optimizer='adamw' it has everything.
    """
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        if optimizer == 'muon' and parameter.ndim == 2 and '.h.' in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return matrices, others


def make_optimizers(matrices, others, learning_rate, betas, muon_lr, muon_momentum, weight_decay,
                    muon_dtype):
    """A list of AdamW and, if there are matrices, Muon. Weight decay is for matrices alone."""
    decayed = [p for p in others if p.ndim >= 2]
    not_decayed = [p for p in others if p.ndim < 2]  # norms and biases
    groups = [
        {'params': decayed, 'weight_decay': weight_decay},
        {'params': not_decayed, 'weight_decay': 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if matrices:
        muon = Muon(matrices, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay,
                    dtype=muon_dtype)
        optimizers.append(muon)
    return optimizers


def pick_muon_dtype(device, amp_dtype):
    """The dtype of Muon's products: bfloat16 is exact enough, but slow on a CPU without it."""
    if device.type == 'cpu' and amp_dtype == torch.float32:
        return torch.float32
    return torch.bfloat16


# --------------------------------------------------------------------------------------------------
# The learning-rate schedule


def lr_factor(step, schedule, warmup_iters, decay_iters, floor, share_left=None):
    """The multiplier of every learning rate at a step, counted from 0.

    It rises during the warm-up, then falls to `floor` at decay_iters: 'linear', 'cosine', or not at
    all ('constant'). share_left: how much of the time is left, from 1 to 0, for a schedule by the
    clock instead of by steps.

        >>> [lr_factor(step, 'linear', 2, 6, 0.0) for step in (0, 1, 2, 4, 6)]
        [0.3333333333333333, 0.6666666666666666, 1.0, 0.5, 0.0]
    """
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if schedule == 'constant':
        return 1.0
    if share_left is None:
        share_left = 0.0
        if step < decay_iters:
            share_left = (decay_iters - step) / (decay_iters - warmup_iters)
    if schedule == 'cosine':
        share_left = 0.5 - 0.5 * math.cos(math.pi * share_left)
    return floor + share_left * (1 - floor)


def base_learning_rates(optimizers):
    """The learning rate of every parameter group, before any schedule: lists of floats."""
    return [[group['lr'] for group in optimizer.param_groups] for optimizer in optimizers]


def set_learning_rates(optimizers, base_lrs, factor):
    """Set the learning rate of every parameter group to `factor` times its base rate."""
    for optimizer, rates in zip(optimizers, base_lrs):
        for group, base_lr in zip(optimizer.param_groups, rates):
            group['lr'] = base_lr * factor


# --------------------------------------------------------------------------------------------------
# Muon


def orthogonalize(G, steps=5, dtype=torch.bfloat16):
    """The nearest semi-orthogonal matrices, roughly: all singular values are pushed to about 1.

    G: (N, rows, cols); returned in dtype. A quintic Newton-Schulz iteration, which needs only
    matmuls. Its coefficients maximize the slope at zero while keeping results in [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype)
    is_tall = G.size(1) > G.size(2)
    if is_tall:  # transpose, so that X Xᵀ is the smaller product
        X = X.mT

    # The iteration needs a spectral norm of at most 1; the Frobenius norm is never smaller
    norm = X.flatten(1).norm(dim=1).clamp(min=1e-7)
    X = X / norm[:, None, None]
    for _ in range(steps):  # X = a X + (b A + c A²) X, with A = X Xᵀ
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)

    if is_tall:
        X = X.mT
    return X


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for weight matrices.

    Why: the gradient of a matrix is dominated by few directions, those with large singular values.
    An orthogonal update moves all directions equally far, so that rare ones are learned as well.
    Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon

    params: 2-D weights (out, in). lr: of an update with singular values near 1, times sqrt(out /
    in) if out > in. Nesterov momentum, decoupled weight decay. dtype: of the iteration; bfloat16 is
    exact enough. Raises ValueError for a parameter that is not a matrix.

    The same mathematics as torch.optim.Muon (tests compare them), but matrices of the same shape go
    through the iteration as one batch: about twice as fast for small models.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        defaults = {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay}
        super().__init__(params, defaults)
        self.dtype = dtype
        for group in self.param_groups:
            for p in group['params']:
                if p.ndim != 2:
                    raise ValueError(f'Muon trains matrices, got a parameter of {tuple(p.shape)}')

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update_matrices(params, group)

    def update_matrices(self, params, group):
        """One step for N matrices of the same shape (rows, cols)."""
        grad = torch.stack([p.grad for p in params])  # (N, rows, cols)
        state = self.state[params[0]]  # the momentum of all is stored under the first
        if 'momentum' not in state:
            state['momentum'] = torch.zeros_like(grad)
        momentum = state['momentum']
        momentum.lerp_(grad, 1 - group['momentum'])

        # Nesterov: look ahead by one more step of momentum
        update = orthogonalize(grad.lerp_(momentum, group['momentum']), dtype=self.dtype)
        rows, cols = params[0].shape
        scale = max(1, rows / cols) ** 0.5
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, list(update.to(grad.dtype)), alpha=-group['lr'] * scale)
