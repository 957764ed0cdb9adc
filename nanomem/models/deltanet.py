"""Gated DeltaNet: a matrix as memory. A token does not add its value: it corrects the value stored for its key.

    N channels of a key     Q tokens in a chunk     h the matrices of all heads
    a log of the decay, a <= 0     b how much of the error is corrected, 0 to 1     (in the paper S, log alpha, beta)
    dt step, as in mamba: a = -dt exp(log_A)
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import mamba
from .gpt import GPT, MLP, full_precision, norm, split_heads
from .mamba import TAPS, Mamba, remaining_hidden, short_conv


@dataclass
class Config(mamba.Config):
    rule: str = "gated_delta"   # gated_delta; delta: nothing fades; gated: values are added, nothing is corrected

    def __post_init__(self):
        super().__post_init__()
        assert self.rule in ("gated_delta", "delta", "gated"), f"rule is gated_delta, delta or gated, got {self.rule}"


# The gated delta rule (eq. 10). For each head
#     u_t = b_t (v_t - exp(a_t) h_{t-1} k_t)           (D,)     b times the error: value - answer of the faded h
#     h_t = exp(a_t) h_{t-1} + u_t k_t^T               (D, N)
#     o_t = h_t q_t                                    (D,)
# Multiplied out, this is h_t = h_{t-1} exp(a_t) (I - b_t k_t k_t^T) + b_t v_t k_t^T, as the paper writes it.

def delta_rule(q, k, v, a, b, h, correct=True, Q=64):
    """The rule for T tokens, in matrix products: q and k (B, H, T, N), v (B, H, T, D), a and b (B, H, T), h (B, H, D,
    N) -> o (B, H, T, D) and the last h. correct=False leaves h_{t-1} k_t out: u_t = b_t v_t.

    In a chunk that begins with h, let G_ij be the decay from token j to token i, and G_i that since the chunk began.
    The memory that token i finds is the h of the beginning and what the tokens before it have written:
        u_i + sum_{j<i} b_i G_ij (k_i k_j) u_j = b_i (v_i - G_i h k_i)
    For all i together this is (1 + L) u = r with a matrix L that is zero on and above the diagonal. It is solved from
    the first token to the last, by substitution.
    """
    o = []
    for q, k, v, a, b in zip(*(x.split(Q, 2) for x in (q, k, v, a, b[..., None]))):
        A = a.cumsum(2)[..., None]                                             # (B, H, Q, 1) log of G_i
        G = (A - A.mT).tril().exp().tril()             # (B, H, Q, Q) from j to i; 0 for j > i, where exp may overflow
        u = b * v
        if correct:
            L = (b * G * (k @ k.mT)).tril(-1)                                  # (B, H, Q, Q)
            r = u - b * A.exp() * (k @ h.mT)                                   # (B, H, Q, D)
            u = torch.linalg.solve_triangular(L, r, upper=False, unitriangular=True)     # eq. 6, 7 with decay
        o.append(A.exp() * (q @ h.mT) + (G * (q @ k.mT)) @ u)                  # eq. 9 with decay
        end = A[:, :, -1:]
        h = end.exp() * h + ((end - A).exp() * u).mT @ k                       # eq. 8 with decay: the end of the chunk
    return torch.cat(o, 2), h


class Memory(nn.Module):
    """The block of the paper (section 3.4): queries, keys and values from a short convolution, the rule, a gate."""

    def __init__(self, c):
        super().__init__()
        self.c, C, H = c, c.width, c.heads
        linear = lambda n: nn.Linear(C, n, bias=False)
        self.q, self.k, self.v = linear(H * c.N), linear(H * c.N), linear(C)
        self.taps = nn.Parameter(0.3 * torch.randn(TAPS, 2 * H * c.N + C)) if c.conv else None
        self.b, self.gate, self.out = linear(H), linear(C), linear(C)
        if c.rule != "delta":
            self.dt = linear(H)
            self.dt_bias = nn.Parameter(torch.full((H,), math.log(math.expm1(0.1))))     # as in mamba: half-lives
            self.log_A = nn.Parameter(torch.linspace(math.log(0.01), 0, H))              # begin at 7 to 700 tokens

    def start(self, zeros):
        conv = dict(conv=zeros(*self.taps[1:].shape)) if self.taps is not None else {}
        return dict(conv, matrix=zeros(self.c.heads, self.c.head_dim, self.c.N))

    def forward(self, x, memory):
        """x (B, T, C) and the memory of this layer -> y (B, T, C) and the next memory."""
        c, memory = self.c, dict(memory)
        qkv = torch.cat([self.q(x), self.k(x), self.v(x)], 2)                  # (B, T, 2 H N + C)
        if c.conv:
            qkv, memory["conv"] = short_conv(qkv, memory["conv"], self.taps)
        q, k, v = F.silu(qkv).split([c.heads * c.N, c.heads * c.N, c.width], 2)
        q, k, v = (split_heads(z, c.heads) for z in (q, k, v))                 # (B, H, T, N) q and k, (B, H, T, D) v
        b, dt = self.b(x), self.dt(x) if c.rule != "delta" else None           # (B, T, H) both
        with full_precision(x):                                                # decays need all digits of float32
            q, k, v, b, h = (z.type_as(self.out.weight) for z in (q, k, v, b, memory["matrix"]))
            a = torch.zeros_like(b)                                            # rule=delta: nothing fades
            if c.rule != "delta":
                a = -F.softplus(dt.type_as(b) + self.dt_bias) * self.log_A.exp()
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)              # of length 1
            o, memory["matrix"] = delta_rule(q, k, v, a.mT, b.sigmoid().mT, h, correct=c.rule != "gated")
        o = norm(o).transpose(1, 2).flatten(2).type_as(x)                      # (B, T, C)
        return self.out(o * F.silu(self.gate(x))), memory


class Layer(nn.Module):
    """A memory, then an MLP. The size is that of GPT's layer."""

    def __init__(self, c):
        super().__init__()
        self.memory = Memory(c)
        self.mlp = MLP(c, remaining_hidden(c, self))
        self.apply(GPT.init)
        nn.init.normal_(self.memory.out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        return self.memory.start(zeros)

    def forward(self, x, memory):
        y, memory = self.memory(norm(x), memory)
        x = x + y
        return x + self.mlp(norm(x)), memory


class DeltaNet(Mamba):
    """Layers of matrices and no attention. A matrix maps keys to values. Mamba adds each value to what is there, and
    can only forget all keys alike. The delta rule replaces the value of one key, and leaves other keys alone.

    state    of each layer l:   l.conv (B, 3, 2 H N + C) the last inputs of the convolution   l.matrix (B, H, D, N) h
    read     o_t = h_t q_t at every token
    write    h_t = exp(a_t) h_{t-1} + u_t k_t^T at every token: the end of a segment changes nothing
    paper    Gated DeltaNet 2412.06464v3: eq. 10 (rule), 6 to 9 with the decay of section 3.3 (chunks), section 3.4
             (block); rule=delta is DeltaNet 2406.06484, with this gate; rule=gated is gated linear attention (in the
             paper's terms Mamba-2), with b_t in front of v_t
    departs  keys and values have width C, keys another one with `state` (released code: 0.75 C and 1.5 C); decays
             start as in mamba, for short training; the convolution is added to its input; no weights in the norm of o,
             which `out` can learn; q is not scaled by N^-1/2, since o has a norm; the MLP has a squared ReLU (paper:
             SwiGLU), and the width that gives a layer the size of GPT's
    """
    Config = Config

    def layer(self, l):
        return Layer(self.c)
