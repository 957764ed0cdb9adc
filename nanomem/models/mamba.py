"""Mamba-2: a state that every token changes and reads, and that forgets at a rate which depends on the token.

    N state size, the length of b and c     Q tokens in a chunk     h the states of all heads
    x values    b keys    c queries    dt step    a log of the decay, a <= 0    (in the paper X, B, C, Delta, log A)
    A in ssd: the sum of a since the chunk began
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, MLP, full_precision, norm

TAPS = 4   # tokens that the short convolution sees: a token and the three before it


@dataclass
class Config(gpt.Config):
    state: int = -1      # N, state size: the state of a head is D x N; -1: N = D
    conv: bool = True    # a short convolution, which ties each token to the three before it

    N = property(lambda c: c.state if c.state > 0 else c.head_dim)

    def __post_init__(self):
        super().__post_init__()
        assert self.state >= -1, f"state counts channels, got {self.state}"


# The selective state space (Mamba-2, eq. 2). For each head
#     h_t = exp(a_t) h_{t-1} + dt_t x_t b_t^T          (D, N)
#     y_t = h_t c_t + skip x_t                         (D,)

def step(x, dt, a, b, c, skip, h):
    """The two equations for one token: x (B, 1, H, D), dt and a (B, 1, H), b and c (B, 1, N), skip (H,), h (B, H, D, N)
    -> y (B, 1, H, D) and the next h."""
    x, dt, a = x[:, 0, :, :, None], dt[:, 0, :, None, None], a[:, 0, :, None, None]
    h = a.exp() * h + dt * x * b[:, :, None]                                   # (B, H, D, N)
    y = h @ c[:, :, :, None] + skip[:, None, None] * x                         # (B, H, D, 1)
    return y[:, None, :, :, 0], h


def ssd(x, dt, a, b, c, skip, h, Q=64):
    """The same for T tokens, in matrix products (section 6): x (B, T, H, D), dt and a (B, T, H), b and c (B, T, N) ->
    y (B, T, H, D) and the last h. Inside a chunk of Q tokens the state space is attention without a softmax: the weight
    c_i b_j fades with the distance from j to i. From chunk to chunk it is the recurrence of h."""
    x, y = x.transpose(1, 2), []                                               # (B, H, T, D)
    xdt, a, b, c = x * dt.mT[..., None], a.mT, b[:, None], c[:, None]          # b and c are the same for all heads
    for xdt, a, b, c in zip(*(v.split(Q, 2) for v in (xdt, a, b, c))):
        A = a.cumsum(2)[..., None]                                             # (B, H, Q, 1) since the chunk began
        decay = (A - A.mT).tril().exp().tril()         # (B, H, Q, Q) from j to i; 0 for j > i, where exp may overflow
        within = (c @ b.mT * decay) @ xdt                                      # what the tokens of this chunk add to y
        before = A.exp() * (c @ h.mT)                                          # what the chunks before add to y
        y.append(within + before)
        end = A[:, :, -1:]
        h = end.exp() * h + ((end - A).exp() * xdt).mT @ b                     # at the end of the chunk
    y = torch.cat(y, 2) + skip[:, None, None] * x
    return y.transpose(1, 2), h


class SSM(nn.Module):
    """Mamba-2's block (section 7.1): the token says what is written, how it is read and how much is forgotten."""

    def __init__(self, c):
        super().__init__()
        self.c, C, H = c, c.width, c.heads
        self.project = nn.Linear(C, 2 * C + 2 * c.N + H, bias=False)
        self.dt_bias = nn.Parameter(torch.full((H,), math.log(math.expm1(0.1))))         # steps begin at 0.1
        self.log_A = nn.Parameter(torch.linspace(math.log(0.01), 0, H))        # and half-lives at 7 to 700 tokens
        self.skip = nn.Parameter(torch.ones(H))
        self.out = nn.Linear(C, C, bias=False)

    def start(self, zeros):
        return dict(ssm=zeros(self.c.heads, self.c.head_dim, self.c.N))

    def forward(self, u, h):
        """u (B, T, C) and the state h (B, H, D, N) -> y (B, T, C) and the next state."""
        C, H, N = self.c.width, self.c.heads, self.c.N
        z, x, b, c, dt = self.project(u).split([C, C, N, N, H], 2)
        with full_precision(u):                                                # decays need all digits of float32
            x, b, c, dt, h = (v.type_as(self.log_A) for v in (x, b, c, dt, h))
            x, dt = x.unflatten(2, (H, -1)), F.softplus(dt + self.dt_bias)     # (B, T, H, D), (B, T, H)
            run = step if u.size(1) == 1 else ssd
            y, h = run(x, dt, -dt * self.log_A.exp(), norm(b), norm(c), self.skip, h)
        y = y.flatten(2).type_as(z) * F.silu(z)                                # (B, T, C) gated
        return self.out(norm(y)), h


def short_conv(u, last, taps):
    """A causal convolution, each channel for itself: u_t + sum_i taps_i u_{t-3+i}. u (B, T, C), the three tokens before
    it (B, 3, C), taps (4, C) -> (B, T, C) and the new last three tokens."""
    T, line = u.size(1), torch.cat([last.type_as(u), u], 1)                    # (B, 3+T, C)
    return u + sum(taps[i] * line[:, i:i + T] for i in range(TAPS)), line[:, T:]


def remaining_hidden(c, layer):
    """Hidden channels of an MLP, a multiple of 8, with which this layer has as many parameters as a layer of GPT."""
    remaining = (4 * c.width + 2 * c.hidden) * c.width + c.heads - sum(p.numel() for p in layer.parameters())
    return max(8, remaining // (2 * c.width) // 8 * 8)


class Layer(nn.Module):
    """A convolution and a state space, then an MLP."""

    def __init__(self, c):
        super().__init__()
        self.taps = nn.Parameter(0.3 * torch.randn(TAPS, c.width)) if c.conv else None
        self.ssm = SSM(c)
        self.mlp = MLP(c, remaining_hidden(c, self))
        self.apply(GPT.init)
        nn.init.normal_(self.ssm.out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        conv = dict(conv=zeros(*self.taps[1:].shape)) if self.taps is not None else {}
        return conv | self.ssm.start(zeros)

    def forward(self, x, memory):
        u, memory = norm(x), dict(memory)
        if self.taps is not None:
            u, memory["conv"] = short_conv(u, memory["conv"], self.taps)
        y, memory["ssm"] = self.ssm(u, memory["ssm"])
        x = x + y
        return x + self.mlp(norm(x)), memory


class Mamba(GPT):
    """Layers of state spaces and no attention. A text of any length is summed up in a state of fixed size, which fades.

    state    of each layer l:   l.conv (B, 3, C) the last inputs of the convolution   l.ssm (B, H, D, N) h of eq. 2
    read     y_t = h_t c_t + skip x_t at every token
    write    h_t = exp(a_t) h_{t-1} + dt_t x_t b_t^T at every token: the end of a segment changes nothing
    paper    Mamba-2 2405.21060: eq. 2 (selective state space), section 6 (chunks), section 7.1 (block)
    departs  the inner width, of x, is C (paper: 2C), and N that of a head (released code: 128); the convolution comes
             before the projection and is added to its input (paper: on x, b and c after it, with a SiLU, which is left
             out); b and c have a norm, as keys and queries have; steps start longer and decays slower (A at 0.01 to 1,
             paper: 1 to 16), for short training; an MLP follows, so that a layer has the size of GPT's
    """
    Config = Config
    parallel = math.inf                     # nothing waits for the end of a segment

    def __init__(self, c):
        super().__init__(c)
        self.blocks = nn.ModuleList(self.layer(l) for l in range(c.layers))

    def layer(self, l):
        return Layer(self.c)

    def init_state(self, B):
        zeros = lambda *shape: self.head.weight.new_zeros(B, *shape, dtype=torch.float32)
        return {f"{l}.{name}": x for l, layer in enumerate(self.blocks) for name, x in layer.start(zeros).items()}

    def read(self, state):
        layers = [{} for _ in self.blocks]
        for key, x in state.items():                       # the layer's number, a dot, its own name
            if "." in key:                                 # bmojo has one without a dot
                l, name = key.split(".")
                layers[int(l)][name] = x
        return layers

    def extend(self, tokens, cache):
        x, now = self.embed(tokens), []
        for layer, memory in zip(self.blocks, cache):
            x, memory = layer(x, memory)
            now.append(memory)
        return self.head(norm(x)), now                                         # (B, T, V)

    def write(self, cache, state):
        now = {f"{l}.{name}": x for l, memory in enumerate(cache) for name, x in memory.items()}
        return {k: x.to(state[k].dtype, copy=True, memory_format=torch.contiguous_format) for k, x in now.items()}
