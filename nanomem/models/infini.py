"""Infini-attention: every head adds its keys and values to a matrix and asks it, beside attention to its segment."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, attend, full_precision, merge_heads, rope, rotate, with_previous


@dataclass
class Config(gpt.Config):
    update: str = "delta"   # what is added to the memory: delta (the new part of a value), linear (all of it) or none

    def __post_init__(self):
        super().__post_init__()
        assert self.update in ("delta", "linear", "none"), f"update is delta, linear or none, got {self.update}"


def positive(x):
    """sigma(x) = elu(x) + 1, which makes queries and keys positive, so that a sum of weights is never 0."""
    return F.elu(x) + 1


def recall(q, M, z):
    """A mean of all that was stored, weighted by sigma(q) sigma(k)^T (eq. 7): q (B, H, T, D), M (B, H, D, D) and
    z (B, H, D) -> (B, H, T, D). An empty memory gives 0."""
    weighted, total = positive(q) @ M, positive(q) @ z[..., None]              # (B, H, T, D), (B, H, T, 1)
    return weighted / total.where(total > 0, 1)


def store(k, v, M, z, delta):
    """The memory after a segment with keys and values (B, H, S, D). Delta: store only how the values differ from what
    the memory returns already. All tokens compare with the memory from before the segment. A pair that is all that was
    stored, stored again, leaves M as it is, but z counts it twice: it is then answered with half of its value."""
    if delta:
        v = v - recall(k, M, z)                                                # eq. 9
    return M + positive(k).mT @ v, z + positive(k).sum(2)                      # eq. 8


class InfiniAttention(gpt.Attention):
    """Attention to the segment, and the memory's answer to the same queries without RoPE. beta mixes the two."""

    def __init__(self, c):
        super().__init__(c)
        self.beta = nn.Parameter(torch.zeros(c.heads, 1, 1))                   # one number a head: a gate of 1/2

    def forward(self, x, angles, past=None, mask=None):
        """`past`: rotated keys, values and keys without position of this segment, (B, H, P, D) each, then M and z."""
        if self.c.update == "none":                                            # no memory
            return super().forward(x, angles, past, mask)
        rotated, v, plain, M, z = past
        unrotated = rope(torch.zeros(1, device=x.device), self.c.head_dim)     # the angles of position 0
        q, (k, new_v) = self.queries(x, unrotated), self.keys_values(x, unrotated)       # eq. 5
        join = lambda old, new: torch.cat([old, new.type_as(old)], 2)          # (B, H, P+T, D)
        rotated, v, plain = join(rotated, rotate(k, angles)), join(v, new_v), join(plain, k)
        keys = with_previous(rotated) if self.c.shift else rotated
        local = attend(rotate(q, angles), keys.type_as(q), v.type_as(q))       # eq. 6
        with full_precision(x):
            memory = recall(q.type_as(M), M, z)                                # (B, H, T, D)
        gate = self.beta.sigmoid()
        y = gate * memory + (1 - gate) * local                                 # eq. 10
        return self.out(merge_heads(y.type_as(local))), (rotated, v, plain, M, z)       # eq. 11


class Infini(GPT):
    """Beside its attention to the segment, every head has a matrix M. With update=linear it is the sum of the products
    of all earlier keys and values: linear attention. A learned gate says how much of the head's output comes from M.

    state    M (B, L, H, D, D) sum of sigma(k)^T v (delta: v minus M's answer to k)   z (B, L, H, D) sum of sigma(k)
    read     a token asks M with its query; A = gate A_mem + (1 - gate) A_dot, gate = sigmoid(beta). It reads what the
             segments before wrote, nothing of its own
    write    the keys and values of a full segment, in one sum; with update=delta what M answers already is taken off
    paper    Infini-attention 2404.07143v2, section 3.1: eq. 7 (read), 8 and 9 (write), 10 (gate)
    departs  queries and keys are those of our attention before RoPE: with its norm, the queries with its gain, the keys
             with half of their channels from the token before, 0 at a segment's first; an empty memory reads as 0 (in
             the paper 0/0); the whole model sees one segment at a time (in the paper each layer cuts the whole text
             into segments)
    """
    Config, Attention = Config, InfiniAttention

    @property
    def gates(self):
        """The gate of each head, (L, H). It starts at 0.5. Near 0 the head looks at its segment only, near 1 at the
        memory only. If all are still near 0.5 after training, beta has not moved: replications with too low a learning
        rate saw this. `(model.gates - 0.5).abs()` shows how far each head has come."""
        return torch.stack([block.attention.beta.detach().sigmoid().flatten() for block in self.blocks])

    def init_state(self, B):
        c = self.c
        if c.update == "none":
            return {}
        zeros = lambda *shape: torch.zeros(B, c.layers, c.heads, *shape, device=self.head.weight.device)
        return dict(M=zeros(c.head_dim, c.head_dim), z=zeros(c.head_dim))

    def read(self, state):
        """For every layer three empty tensors (B, H, 0, D), for keys and values of the segment, and its M and z."""
        if not state:
            return None
        return [(M[:, :, :0],) * 3 + (M, z) for M, z in zip(state["M"].unbind(1), state["z"].unbind(1))]

    def write(self, cache, state):
        if not state:
            return {}
        layers = []
        for _, v, k, M, z in cache:
            with full_precision(M):
                k = with_previous(k) if self.c.shift else k
                layers.append(store(k, v, M, z, self.c.update == "delta"))
        return {name: torch.stack(new, 1).to(state[name].dtype) for name, new in zip(("M", "z"), zip(*layers))}
