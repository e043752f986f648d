"""
Muon: momentum whose update is made orthogonal, for the weight matrices inside the blocks.
Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
The same mathematics as torch.optim.Muon (tests/test_muon.py holds them against each other), but all matrices of one shape go
through the iteration as one batch: on small models in about half the time.
"""
import torch


def orthogonalize(G, steps=5, dtype=torch.bfloat16):
    """Nearest semi-orthogonal matrices, roughly: all singular values go to about 1. G: (N, rows, cols), returned in dtype.

    A quintic Newton-Schulz iteration; its coefficients have the steepest slope at zero that still converges to [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype)
    if tall := G.size(1) > G.size(2):
        X = X.mT
    X = X / X.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # the iteration needs a spectral norm of at most 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """params: 2-D weights (out, in). lr: of an update with singular values near 1, times sqrt(out / in) where out > in.

    Nesterov momentum, decoupled weight decay. dtype: of the iteration; bfloat16 is exact enough, and fast where the hardware
    has it. Raises ValueError on a parameter that is not a matrix.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        for p in (p for group in self.param_groups for p in group['params']):
            if p.ndim != 2:
                raise ValueError(f'Muon takes matrices, got a parameter of shape {tuple(p.shape)}')

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                grad = torch.stack([p.grad for p in params])  # (N, rows, cols)
                state = self.state[params[0]]                 # one buffer for the whole batch
                if 'momentum' not in state:
                    state['momentum'] = torch.zeros_like(grad)
                state['momentum'].lerp_(grad, 1 - group['momentum'])
                update = orthogonalize(grad.lerp_(state['momentum'], group['momentum']), dtype=self.dtype)
                scale = max(1, rows / cols) ** 0.5
                torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(params, list(update.to(grad.dtype)), alpha=-group['lr'] * scale)
