"""The optimisers of all models: Muon for the matrices of the blocks, AdamW for the rest; and their schedule."""
import torch
from torch import nn


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
    return [(torch.optim.Muon(by_muon, lr=muon, weight_decay=decay), muon), (adamw, lr)]


def schedule(step, steps, warmup=0.02, cooldown=0.65):
    """The part of the peak learning rate at a step: a short rise, a plateau, a straight line down to zero. warmup and
    cooldown are parts of all steps."""
    return min(1, (step + 1) / max(1, warmup * steps), (steps - step) / max(1, cooldown * steps))
