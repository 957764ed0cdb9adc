"""Mamba-2: a recurrent state that each token reads and writes, and that forgets at a rate which depends on the token.

    N channels by which the state of a head is read and written     Q tokens in a chunk     h the state of all heads
    x values   b keys   c queries   dt step   a log-decay, not above 0        (the paper's X, B, C, Delta, log A)
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, MLP, norm

TAPS = 4   # tokens that the short convolution sees: a token and the three before it


@dataclass
class Config(gpt.Config):
    state: int = -1      # N, channels by which a head's state is read and written; -1: as wide as the head
    conv: bool = True    # a short convolution, which gives each token a view of the three before it

    N = property(lambda c: c.state if c.state > 0 else c.head_dim)

    def __post_init__(self):
        super().__post_init__()
        assert self.state >= -1, f"state counts channels, got {self.state}"


# ----------------------------------------------------------------------------------------------------------------------
# The selective state space, for each head (Mamba-2, eq. 2):
#     h_t = exp(a_t) h_{t-1} + dt_t x_t b_t^T          (D, N)
#     y_t = h_t c_t + skip x_t                         (D,)

def step(x, dt, a, b, c, skip, h):
    """The equations for one token: x (B, 1, H, D), dt and a (B, 1, H), b and c (B, 1, N), skip (H,), h (B, H, D, N)
    -> y (B, 1, H, D) and the next h."""
    x, dt, a, b, c = x[:, 0], dt[:, 0, :, None, None], a[:, 0, :, None, None], b[:, 0], c[:, 0]
    h = a.exp() * h + dt * x[..., None] * b[:, None, None]                     # (B, H, D, N)
    y = (h @ c[:, None, :, None])[..., 0] + skip[:, None] * x                  # (B, H, D)
    return y[:, None], h


def ssd(x, dt, a, b, c, skip, h, Q=64):
    """The same map for T tokens, in matrix products (section 6). x (B, T, H, D), dt and a (B, T, H), b and c (B, T, N)
    -> y (B, T, H, D) and the last h. The tokens come in chunks of Q: inside a chunk the state space is an attention
    without softmax, whose weights c_i b_j fade with the distance; between chunks it is the recurrence of h."""
    x, y = x.transpose(1, 2), []                                               # (B, H, T, D)
    write = x * dt.mT[..., None]                                               # dt_t x_t, what b_t writes
    chunks = zip(write.split(Q, 2), a.mT.split(Q, 2), b[:, None].split(Q, 2), c[:, None].split(Q, 2))
    for w, a, b, c in chunks:                                                  # b, c (B, 1, Q, N): one for all heads
        A = a.cumsum(2)[..., None]                                             # (B, H, Q, 1) decay since the chunk began
        L = (A - A.mT).tril().exp().tril()                                     # (B, H, Q, Q) decay from j to i, j <= i
        inside = (c @ b.mT * L) @ w                                            # from tokens of this chunk
        before = A.exp() * (c @ h.mT)                                          # from the state before this chunk
        y.append(inside + before)
        end = A[:, :, -1:]
        h = end.exp() * h + ((end - A).exp() * w).mT @ b                       # the state after this chunk
    y = torch.cat(y, 2) + skip[:, None, None] * x
    return y.transpose(1, 2), h


class SSM(nn.Module):
    """Mamba-2's block (section 7.1): the input says what is written, how it is read, and how much is forgotten."""

    def __init__(self, c):
        super().__init__()
        self.c, C, H = c, c.width, c.heads
        self.project = nn.Linear(C, 2 * C + 2 * c.N + H, bias=False)                 # all that depends on the token
        self.dt_bias = nn.Parameter(torch.full((H,), math.log(math.expm1(0.1))))      # softplus makes a step of 0.1 of it
        self.log_A = nn.Parameter(torch.linspace(math.log(0.01), 0, H))              # log of -A: half-lives of 7 to 700 tokens
        self.skip = nn.Parameter(torch.ones(H))
        self.out = nn.Linear(C, C, bias=False)

    def start(self, zeros):
        return dict(ssm=zeros(self.c.heads, self.c.head_dim, self.c.N))

    def forward(self, u, h):
        """u (B, T, C) and the state h (B, H, D, N) -> y (B, T, C) and the next state."""
        C, H, N = self.c.width, self.c.heads, self.c.N
        z, x, b, c, dt = self.project(u).split([C, C, N, N, H], -1)
        with torch.autocast(u.device.type, enabled=False):                       # decays need all digits of float32
            x, b, c, dt, h = (v.type_as(self.log_A) for v in (x, b, c, dt, h))
            dt = F.softplus(dt + self.dt_bias)                                        # (B, T, H)
            a = -self.log_A.exp() * dt                                               # (B, T, H)
            run = step if u.size(1) == 1 else ssd
            y, h = run(x.unflatten(2, (H, -1)), dt, a, norm(b), norm(c), self.skip, h)
        y = y.flatten(2).type_as(z) * F.silu(z)                                  # (B, T, C) the gate
        return self.out(norm(y)), h


# ----------------------------------------------------------------------------------------------------------------------
# The model

def short_conv(u, last, taps):
    """Causal convolution, each channel for itself: u_t + sum_i taps_i u_{t-3+i}. u (B, T, C), the three tokens before
    it (B, 3, C), taps (4, C) -> (B, T, C) and the last three tokens."""
    T = u.size(1)
    line = torch.cat([last.type_as(u), u], 1)                                  # (B, 3+T, C)
    return u + sum(taps[i] * line[:, i:i + T] for i in range(TAPS)), line[:, T:]


def remaining_hidden(c, parts):
    """Hidden channels of an MLP, a multiple of 8, with which a layer of these parts has as many parameters as GPT's."""
    remaining = (4 * c.width + 2 * c.hidden) * c.width - sum(p.numel() for p in parts.parameters())
    return max(8, remaining // (16 * c.width) * 8)


class Layer(nn.Module):
    """Convolution and state space, then the MLP; x is added around both."""

    def __init__(self, c):
        super().__init__()
        self.taps = nn.Parameter(0.3 * torch.randn(TAPS, c.width)) if c.conv else None
        self.ssm = SSM(c)
        self.mlp = MLP(c, remaining_hidden(c, self))
        self.apply(GPT.init)
        nn.init.normal_(self.ssm.out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        memory = self.ssm.start(zeros)
        if self.taps is not None:
            memory.update(conv=zeros(*self.taps[1:].shape))
        return memory

    def forward(self, x, memory):
        u, memory = norm(x), dict(memory)
        if self.taps is not None:
            u, memory["conv"] = short_conv(u, memory["conv"], self.taps)
        y, memory["ssm"] = self.ssm(u, memory["ssm"])
        x = x + y
        return x + self.mlp(norm(x)), memory


def flatten(layers):
    """What each layer remembers, as one flat dict: the tensor "conv" of layer 0 is called "0.conv"."""
    return {f"{l}.{name}": tensor for l, layer in enumerate(layers) for name, tensor in layer.items()}


def unflatten(state, L):
    """The inverse of flatten: a dict for each of the L layers."""
    layers = [{} for _ in range(L)]
    for key, tensor in state.items():
        l, _, name = key.partition(".")
        if name:
            layers[int(l)][name] = tensor
    return layers


def own(now, state):
    """The tensors of `now` as copies that are contiguous, with the types that they have in `state`."""
    return {k: now[k].to(old.dtype, copy=True, memory_format=torch.contiguous_format) for k, old in state.items()}


class Mamba(GPT):
    """Layers of state spaces and no attention. A text of any length is summed up in a state of fixed size, which fades.

    state    of each layer l:   l.conv (B, 3, C) the last inputs of its convolution   l.ssm (B, H, D, N) h of eq. 2
    read     y_t = h_t c_t + skip x_t at every token
    write    h_t = exp(a_t) h_{t-1} + dt_t x_t b_t^T at every token: the end of a segment changes nothing
    paper    Mamba-2 2405.21060: eq. 2 (selective state space), section 6 (chunks), section 7.1 (block)
    departs  x is C wide, in the paper 2C; the convolution comes before the projection and is added to its input, and no
             SiLU follows (paper: on x, b and c, with a SiLU); b and c are normed, as keys and queries are; the steps start
             longer, for short training; an MLP follows each state space, so that a layer has the size of GPT's
    """
    Config = Config
    parallel = math.inf                     # nothing waits for the end of a segment

    def __init__(self, c):
        super().__init__(c)
        self.blocks = nn.ModuleList(Layer(c) for _ in range(c.layers))

    def init_state(self, B):
        zeros = lambda *shape: self.head.weight.new_zeros(B, *shape, dtype=torch.float32)
        return flatten(layer.start(zeros) for layer in self.blocks)

    def read(self, state):
        return unflatten(state, self.c.layers)

    def extend(self, tokens, cache):
        x, now = self.embed(tokens), []
        for layer, memory in zip(self.blocks, cache):
            x, memory = layer(x, memory)
            now.append(memory)
        return self.head(norm(x)), now                                         # (B, T, V)

    def write(self, cache, state):
        return own(flatten(cache), state)
