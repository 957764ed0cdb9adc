"""B'MOJO: one attention over three memories: the last tokens, the outputs of a state space, and the tokens that it did
not expect.

    W tokens in the attention window and in a chunk (the paper's w)     M eidetic tokens     G chunks in a call
    u inputs of a layer, raw tokens     y outputs of its state space, fading tokens
"""
import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt, mamba
from .gpt import GPT, MLP, attend, norm, rope, rotate
from .mamba import SSM, TAPS, flatten, remaining_hidden, short_conv, unflatten

SPAN = 3   # outputs whose mean predicts the next one: k in algorithm 1


@dataclass
class Config(mamba.Config):
    mix: str = "bmojo"           # the layers in turn: bmojo, ssm (a state space only), window (attention only)
    window: int = -1             # W, raw tokens that a token sees; -1: a quarter of a segment; 0: no past, plain GPT
    eidetic: int = -1            # M, tokens kept for good; -1: as many as the window
    fading: int = -1             # state-space outputs seen: the last n before a chunk; -1: the W before the window
    rope: bool = True            # positions, counted within two windows; the paper has none
    select: str = "innovation"   # tokens that are kept: innovation, random, or those of an oracle, ids lo-hi

    carried = property(lambda c: c.window if c.window >= 0 else     # raw tokens that the next segment sees
                       next(w for w in range(max(1, c.seg // 4), 0, -1) if c.seg % w == 0))
    W = property(lambda c: c.carried or c.seg)
    M = property(lambda c: c.eidetic if c.eidetic >= 0 else c.carried)

    def __post_init__(self):
        super().__post_init__()
        assert {*self.mix.split(",")} <= {"bmojo", "ssm", "window"}, f"mix is of bmojo, ssm and window, got {self.mix}"
        assert self.window >= -1 and self.seg % self.W == 0, f"window={self.window} does not cut {self.seg} tokens"
        assert self.window or self.fading == 0 or "bmojo" not in self.mix, \
            "fading outputs lie before a window: window=0 goes with fading=0, or with a mix without bmojo"
        assert -1 <= self.fading <= 2 * self.W, f"fading goes up to two windows, {2 * self.W}, got {self.fading}"
        assert self.eidetic >= -1, f"eidetic counts tokens, got {self.eidetic}"
        assert re.fullmatch(r"innovation|random|\d+-\d+", self.select), \
            f"select is innovation, random or ids lo-hi, got {self.select}"


def innovation(y, last):
    """How far each output y (B, T, C) of the state space is from the mean of the SPAN outputs before it; `last`
    (B, SPAN, C) came before. -> eps (B, T), the eps_t of algorithm 1, and the last SPAN outputs."""
    T = y.size(1)
    line = torch.cat([last, y.type_as(last)], 1)                               # (B, SPAN+T, C)
    predicted = sum(line[:, i:i + T] for i in range(SPAN)) / SPAN              # (B, T, C) y^ of algorithm 1
    return (line[:, SPAN:] - predicted).norm(dim=-1), line[:, T:]


class Attention(gpt.Attention):
    """The attention of algorithm 1, chunk by chunk (appendix B.2). A chunk is W tokens. Its memory is chosen when it
    begins, at position s, and is the same for all its queries. The query at position t sees, in one softmax,

        raw tokens u_p        t - W  < p <= t
        fading tokens y_p     t - 2W < p <= t - W      or, with fading=n, the n before s
        eidetic tokens u_p    p <= t - W, and eps_p is one of the M largest before s
    """

    def __init__(self, c, kind):
        super().__init__(c)
        self.c = c
        self.M, self.fading = (c.M, c.fading) if kind == "bmojo" else (0, 0)

    def start(self, zeros):
        """What is remembered where a text begins: nothing, but there is room for keys and values, (2, H, ., D)."""
        c = self.c
        kv = lambda n: zeros(2, c.heads, n, c.head_dim)
        memory = dict(window=kv(c.carried))
        if self.fading:
            memory.update(fading=kv(2 * c.W))
        if self.M:
            memory.update(eidetic=kv(self.M), innovation=zeros(self.M) - 1, position=zeros(self.M).long(),
                          outputs=zeros(SPAN, c.width))
        return memory

    def keys_values(self, kv):
        """Keys, with norm, and values from (B, T, 2C) -> (B, 2, H, T, D)."""
        k, v = kv.unflatten(2, (2, self.heads, -1)).unbind(2)
        return torch.stack([norm(k).type_as(v), v], 1).transpose(2, 3)

    def forward(self, u, y, memory, t, open, bonus):
        """u, y (B, T, C) at positions t (B, T) of the text; `open` tokens of the same chunk came before them ->
        out_t of algorithm 1 (B, T, C), and the memory after them. bonus (B, T) is added to the innovation."""
        W, C, T = self.c.W, self.c.width, u.size(1)
        q, kv = self.qkv(u).split([C, 2 * C], 2)
        q = norm(q.unflatten(2, (self.heads, -1))).type_as(q).transpose(1, 2)  # (B, H, T, D)
        new = dict(window=self.keys_values(kv))                                # (B, 2, H, T, D)
        if self.fading:
            new["fading"] = self.keys_values(F.linear(y, self.qkv.weight[C:]))
        memory = dict(memory)
        if self.M:
            eps, memory["outputs"] = innovation(y.detach(), memory["outputs"])
            new.update(innovation=eps + bonus, position=t)
        along = dict(window=3, fading=3, innovation=1, position=1)             # the dimension of the tokens
        sizes = [min(W - open, T)]
        while sum(sizes) < T:
            sizes.append(min(W, T - sum(sizes)))
        new = {name: x.split(sizes, along[name]) for name, x in new.items()}
        out = []
        for i, (q, t) in enumerate(zip(q.split(sizes, 2), t.split(sizes, 1))):
            for name, parts in new.items():
                memory[name] = torch.cat([memory[name].type_as(parts[i]), parts[i]], along[name])
            out.append(self.chunk(q, t, open, memory))
            open += t.size(1)
            if open == W:
                memory, open = self.keep(memory), 0
        return self.out(torch.cat(out, 2).transpose(1, 2).flatten(2)), memory

    def chunk(self, q, t, open, memory):
        """The attention of queries q (B, H, T, D) at positions t (B, T), of which `open` tokens of their chunk came
        before -> (B, H, T, D)."""
        c, W, T, device = self.c, self.c.W, t.size(1), t.device
        s, t = t[:, :1] - open, t[:, :, None]                                  # (B, 1), (B, T, 1)
        raw = torch.arange(-c.carried, open + T, device=device)                # positions, counted from s
        p = (s + raw)[:, None]                                                 # (B, 1, .)
        seen = [(p <= t) & (p > t - W) & (p >= 0)]                             # (B, T, .)
        kv, place = [memory["window"]], [raw]
        if self.fading:
            fading = torch.arange(-2 * W, 0, device=device)
            p = (s + fading)[:, None]
            near = (p <= t - W) & (p > t - 2 * W) if self.fading < 0 else (p >= s[:, None] - self.fading).expand(-1, T, -1)
            seen.append(near & (p >= 0))
            kv.append(memory["fading"][:, :, :, :2 * W])
            place.append(fading)
        if self.M:
            p = memory["position"][:, None, :self.M]
            seen.append((p <= t - W) & (memory["innovation"][:, None, :self.M] >= 0))
            kv.append(memory["eidetic"])
            place.append(raw.new_full((self.M,), -W))
        k, v = torch.cat(kv, 3).unbind(1)                                      # (B, H, ., D)
        if c.rope:
            q = rotate(q, rope(torch.arange(open, open + T, device=device), c.head_dim))
            k = rotate(k, rope(torch.cat(place), c.head_dim))
        return attend(q, k, v, torch.cat(seen, 2)[:, None])

    def keep(self, memory):
        """A chunk is full: the window and the fading tokens move on, and the M largest innovations are kept, M_t."""
        c, window = self.c, memory["window"]
        memory = dict(memory, window=window[:, :, :, window.size(3) - c.carried:])
        if self.fading:
            memory["fading"] = memory["fading"][:, :, :, -2 * c.W:]
        if self.M:
            memory["innovation"], i = memory["innovation"].topk(self.M, 1)     # (B, M)
            memory["position"] = memory["position"].gather(1, i)
            kv = torch.cat([memory["eidetic"], window[:, :, :, c.carried:]], 3)          # (B, 2, H, M+W, D)
            memory["eidetic"] = kv.take_along_dim(i[:, None, None, :, None], 3)
        return memory


class Layer(nn.Module):
    """A layer of one kind: bmojo, window (no state space) or ssm (no attention). All have as many parameters as GPT's."""

    def __init__(self, c, kind):
        super().__init__()
        self.c, self.taps = c, nn.Parameter(0.3 * torch.randn(TAPS, c.width)) if c.conv else None
        self.ssm = SSM(c) if kind != "window" else None
        self.attention = Attention(c, kind) if kind != "ssm" else None
        self.mlp = MLP(c, remaining_hidden(c, self))
        self.apply(GPT.init)
        nn.init.normal_((self.attention or self.ssm).out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        c, memory = self.c, {}
        if c.conv:
            memory.update(conv=zeros(TAPS - 1, c.width))
        if self.ssm:
            memory.update(ssm=zeros(c.heads, c.head_dim, c.N))
        return memory | self.attention.start(zeros) if self.attention else memory

    def forward(self, x, memory, t, open, bonus):
        u, y, memory = norm(x), None, dict(memory)
        if self.c.conv:
            u, memory["conv"] = short_conv(u, memory["conv"], self.taps)
        if self.ssm:
            y, memory["ssm"] = self.ssm(u, memory["ssm"])
        if self.attention:
            y, memory = self.attention(u, y, memory, t, open, bonus)
        x = x + y
        return x + self.mlp(norm(x)), memory


class BMojo(GPT):
    """TODO"""
    Config = Config
    parallel = math.inf

    def __init__(self, c):
        super().__init__(c)
        self.blocks = nn.ModuleList(Layer(c, kind) for kind in (c.mix.split(",") * c.layers)[:c.layers])

    def init_state(self, B):
        zeros = lambda *shape: self.head.weight.new_zeros(B, *shape, dtype=torch.float32)
        return dict(flatten(layer.start(zeros) for layer in self.blocks), n=zeros().long())

    def bonus(self, tokens, t):
        if self.c.select == "innovation":
            return torch.zeros_like(t, dtype=torch.float32)
        if self.c.select == "random":
            return 1e6 * ((t * 12.9898).sin() * 43758.5453).frac().abs()
        lo, hi = map(int, self.c.select.split("-"))
        return 1e6 * ((tokens >= lo) & (tokens < hi))

    def read(self, state):
        return state["n"], 0, unflatten(state, self.c.layers)

    def extend(self, tokens, cache):
        n, P, layers = cache
        T, x, now = tokens.size(1), self.embed(tokens), []
        t = n[:, None] + torch.arange(P, P + T, device=n.device)
        for layer, memory in zip(self.blocks, layers):
            x, memory = layer(x, memory, t, P % self.c.W, self.bonus(tokens, t))
            now.append(memory)
        return self.head(norm(x)), (n, P + T, now)

    def write(self, cache, state):
        n, P, layers = cache
        now = dict(flatten(layers), n=n + P)
        return {k: now[k].to(old.dtype, copy=True, memory_format=torch.contiguous_format) for k, old in state.items()}
