"""The optimisers of all models: Muon for the matrices of the blocks, AdamW for the rest; and their schedule."""
import torch
from torch import nn


def orthogonal(G, rounds=5):
    """Matrices (N, rows, columns) -> the same ones with singular values between 0.7 and 1.2 (those near 0 stay small),
    by Newton-Schulz: each round is one polynomial of the matrix, which moves every value towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315                # Jordan et al.: steep at 0, so that few rounds are enough
    X = G.bfloat16() if G.is_cuda else G             # most CPUs are slow in bfloat16
    X = X.mT if G.shape[1] > G.shape[2] else X       # the smaller product
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[1] > G.shape[2] else X


class Muon(torch.optim.Muon):
    """Muon (Jordan et al., 2024): a matrix moves by its momentum with all singular values made equal, so that rare
    directions are learned as fast as frequent ones.

    torch's own step takes the matrices one by one and always in bfloat16. Many CPUs have no instructions for that, and
    spend more time in it than in the rest of a small training step. This one takes all matrices of a shape together,
    on a CPU in float32."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, by_shape = group["lr"], group["momentum"], {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in by_shape.items():
                ahead = []                           # Nesterov: the gradient joins the momentum that it has changed
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    m = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                    ahead.append(p.grad.lerp(m, momentum))
                for p, move in zip(matrices, orthogonal(torch.stack(ahead))):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(move, alpha=-lr * max(1, rows / columns) ** 0.5)


def optimizers_of(model, muon=0.04, lr=4e-3, decay=0.1):
    """[(optimizer, its peak learning rate)]. Muon gets the matrices of all linear layers but the head, each by itself;
    AdamW gets embedding, head, vectors, gains and memories. With muon=0, AdamW gets all. Only matrices decay."""
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    by_muon = [p for p in matrices if muon and p is not model.head.weight]
    taken, ids = {id(p) for p in by_muon}, {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    adamw = torch.optim.AdamW([dict(params=[p for p in rest if id(p) in ids], weight_decay=decay),
                               dict(params=[p for p in rest if id(p) not in ids], weight_decay=0.0)],
                              lr=lr, betas=(0.9, 0.95), fused=True)
    if not by_muon:
        return [(adamw, lr)]
    return [(Muon(by_muon, lr=muon, weight_decay=decay), muon), (adamw, lr)]


def schedule(step, steps, warmup=0.02, cooldown=0.65):
    """The part of the peak learning rate at a step: a short rise, a plateau, a straight line down to zero. warmup and
    cooldown are parts of all steps."""
    return min(1, (step + 1) / max(1, warmup * steps), (steps - step) / max(1, cooldown * steps))
