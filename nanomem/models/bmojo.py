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


def most_surprising(eps, n, M):
    """The indices of the M largest of the first n (G,) of eps (B, .), and whether there are so many: (B, G, M) both.
    An eps of -1 says that no token is there."""
    late = torch.arange(eps.size(1), device=eps.device) >= n[:, None]          # (G, .)
    best, i = eps[:, None].masked_fill(late, -1).topk(M, -1)
    return i, best >= 0


def by_chunk(kv, first, size, G, W):
    """Keys and values kv (B, 2, H, ., D) for each of G chunks: for chunk g the `size` positions from first + g W on.
    -> (B, G, 2, H, size, D)"""
    kv = kv[:, :, :, first:first + size + (G - 1) * W]
    return kv.unfold(3, size, W).permute(0, 3, 1, 2, 5, 4)


class Attention(gpt.Attention):
    """The attention of algorithm 1, for all chunks at once (appendix B.2). In a chunk that begins at position `start`,
    the query at t sees, in one softmax,

        raw tokens u_p          t - W  < p <= t
        fading tokens y_p       t - 2W < p <= t - W           or, with fading=n, the n before start
        eidetic tokens u_p      p <= t - W, p among the M largest eps before start

    The eidetic tokens are chosen when the chunk begins, so that chunks need not wait for each other.
    """

    def __init__(self, c, kind):
        super().__init__(c)
        self.c = c
        self.M, self.fading = (c.M, c.fading) if kind == "bmojo" else (0, 0)

    def start(self, zeros):
        """What is remembered before a text: room for keys and values of the three memories, and for the choice."""
        c = self.c
        kv = lambda n: zeros(2, c.heads, n, c.head_dim)
        past = dict(window=kv(c.carried))
        if self.fading:
            past.update(fading=kv(2 * c.W))
        if self.M:
            past.update(eidetic=kv(self.M), innovation=zeros(self.M) - 1, position=zeros(self.M).long(),
                        outputs=zeros(SPAN, c.width))
        return past

    def kv(self, x):
        """Normed keys and values, side by side (B, T, 2C) -> (B, 2, H, T, D)."""
        k, v = x.unflatten(2, (2, self.heads, -1)).unbind(2)
        return torch.stack([norm(k).type_as(v), v], 1).transpose(2, 3)

    def forward(self, u, y, past, n, P, bonus):
        """u, y (B, T, C), the tokens P to P + T of a segment; n (B,) tokens came before it -> o_t of algorithm 1
        (B, T, C), and what is remembered. T tokens are G whole chunks, or lie in a single one."""
        c, W, M, T, now = self.c, self.c.W, self.M, u.size(1), {}
        G = max(1, T // W)
        query = torch.arange(P, P + T, device=u.device).view(G, -1)            # (G, t) positions in the segment
        start = query[:, :1] - P % W                                           # (G, 1) where the chunks begin
        first, size = P - P % W, P % W + query.size(1)                         # of the first chunk; tokens of each so far
        text = lambda position: n[:, None, None] + position                    # (B, G, .) positions in the text
        t = text(query)[..., None]                                             # (B, G, t, 1)

        # raw tokens
        q, kv = self.qkv(u).split([c.width, 2 * c.width], 2)
        now["window"] = torch.cat([past["window"].type_as(kv), self.kv(kv)], 3)          # (B, 2, H, W+P+T, D)
        near = torch.arange(-c.carried, size, device=u.device)                 # positions, counted from `start`
        p = text(start + near)[:, :, None]                                     # (B, G, 1, .)
        seen = [(p <= t) & (p > t - W) & (p >= 0)]                             # (B, G, t, .)
        kvs, places = [by_chunk(now["window"], first, len(near), G, W)], [near]

        # fading tokens
        if self.fading:
            new = self.kv(F.linear(y, self.qkv.weight[c.width:]))
            now["fading"] = torch.cat([past["fading"].type_as(new), new], 3)             # (B, 2, H, 2W+P+T, D)
            far = torch.arange(-2 * W, 0, device=u.device)
            p = text(start + far)[:, :, None]
            span = (p <= t - W) & (p > t - 2 * W) if self.fading < 0 else far >= -self.fading
            seen.append((span & (p >= 0)).expand(-1, -1, query.size(1), -1))
            kvs.append(by_chunk(now["fading"], first, 2 * W, G, W))
            places.append(far)

        # eidetic tokens
        if M:
            eps, now["outputs"] = innovation(y.detach(), past["outputs"])
            now["innovation"] = torch.cat([past["innovation"], eps + bonus], 1)          # (B, M+P+T)
            now["position"] = torch.cat([past["position"], text(query).flatten(1)], 1)
            now["eidetic"] = past["eidetic"]
            i, filled = most_surprising(now["innovation"], M + start[:, 0], M)           # (B, G, M)
            p = now["position"][:, None].expand(-1, G, -1).gather(2, i)[:, :, None]      # (B, G, 1, M)
            seen.append((p <= t - W) & filled[:, :, None])
            kvs.append(self.pick(past["eidetic"], now["window"], i))
            places.append(far.new_full((M,), -W))

        k, v = torch.cat(kvs, 4).unbind(2)                                     # (B, G, H, ., D)
        q = norm(q.unflatten(2, (self.heads, -1))).transpose(1, 2)
