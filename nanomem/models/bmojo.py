"""B'MOJO: one attention over three memories: the last tokens, outputs of a state space, and the tokens that surprised it.

    u inputs of a layer (raw tokens)     y outputs of its state space (fading tokens)
    W tokens in the attention window and in a chunk, the paper's w     M eidetic tokens
"""
import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt, mamba
from .gpt import GPT, MLP, attend, norm, rope, rotate
from .mamba import SSM, TAPS, flatten, own, remaining_hidden, short_conv, unflatten

SPAN = 3   # outputs whose mean predicts the next one: k in algorithm 1


@dataclass
class Config(mamba.Config):
    mix: str = "bmojo"           # the layers in turn: bmojo, ssm (a state space only), window (attention only)
    window: int = -1             # W, raw tokens that a token sees; -1: a quarter of a segment; 0: no past, plain GPT
    eidetic: int = -1            # M, tokens kept for good; -1: as many as the window
    fading: int = -1             # state-space outputs seen: the last n before a chunk; -1: the W before the window
    rope: bool = True            # positions, counted within two windows; the paper has none
    select: str = "innovation"   # tokens that are kept: innovation, random, or those of an oracle, ids lo-hi

    past = property(lambda c: c.window if c.window >= 0 else     # raw tokens of the chunk before, 0 or W
                    next(w for w in range(max(1, c.seg // 4), 0, -1) if c.seg % w == 0))
    W = property(lambda c: c.past or c.seg)
    M = property(lambda c: c.eidetic if c.eidetic >= 0 else c.past)

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
    """eps_t of algorithm 1: the distance of each output y_t (B, T, C) from the mean of the k outputs before it. The k
    outputs before y are in last (B, k, C). -> eps (B, T) and the new last outputs."""
    T, line = y.size(1), torch.cat([last, y], 1)                               # (B, k+T, C)
    predicted = sum(line[:, i:i + T] for i in range(SPAN)) / SPAN              # (B, T, C) y^ of algorithm 1
    return (line[:, SPAN:] - predicted).norm(dim=-1), line[:, T:]


class Attention(gpt.Attention):
    """Algorithm 1 for a chunk of W tokens at a time (appendix B.2). In a chunk that begins at position s of the text, the
    query at position t sees, in one softmax,

        raw tokens u_p          t - W < p <= t
        fading tokens y_p       t - 2W < p <= t - W     (with fading=n: the n before s)
        eidetic tokens u_p      p <= t - W              of the M tokens before s with the largest eps_p

    All fading and eidetic tokens are known when the chunk begins, so its queries do not wait for each other. The memory
    holds keys, with norm but not rotated, and values of tokens: (B, tokens, 2, H, D).
    """

    def __init__(self, c, kind):
        super().__init__(c)
        self.c = c
        self.M, self.fading = (c.M, c.fading) if kind == "bmojo" else (0, 0)

    def start(self, zeros):
        """The memory where a text begins. It has room for all tokens; position and innovation say which are there."""
        keys_values = lambda n: zeros(n, 2, self.c.heads, self.c.head_dim)
        memory = dict(window=keys_values(self.c.past))
        if self.fading:
            memory.update(fading=keys_values(2 * self.c.W))
        if self.M:
            memory.update(eidetic=keys_values(self.M), innovation=zeros(self.M) - 1, position=zeros(self.M).long(),
                          outputs=zeros(SPAN, self.c.width))
        return memory

    def keys_values(self, kv):
        """(B, T, 2C) -> keys, with norm, and values (B, T, 2, H, D)."""
        k, v = kv.unflatten(2, (2, self.heads, -1)).unbind(2)
        return torch.stack([norm(k), v], 2)

    def forward(self, u, y, memory, t, bonus):
        """u and y (B, T, C) at positions t (B, T) -> out_t of algorithm 1 (B, T, C), and the memory after these tokens.
        Tokens of a chunk that is not yet full stand behind those of the memory."""
        (W, past, C, T), memory = (self.c.W, self.c.past, self.c.width, u.size(1)), dict(memory)
        q, kv = self.qkv(u).split([C, 2 * C], 2)
        q, new = norm(q.unflatten(2, (self.heads, -1))), dict(window=self.keys_values(kv))
        if self.fading:                                                        # u and y share the maps to keys and values
            new.update(fading=self.keys_values(F.linear(y, self.qkv.weight[C:])))
        if self.M:                                                             # the choice itself has no gradient
            eps, memory["outputs"] = innovation(y.detach(), memory["outputs"])
            new.update(innovation=eps + bonus, position=t)
        begun, out = memory["window"].size(1) - past, []                       # tokens of the open chunk so far
        borders = [0, *range(W - begun, T, W), T]                              # where chunks begin in this call
        sizes = [right - left for left, right in zip(borders, borders[1:])]
        for q, t, *tokens in zip(*(x.split(sizes, 1) for x in (q, t, *new.values()))):
            for name, x in zip(new, tokens):
                memory[name] = torch.cat([memory[name], x], 1)
            out.append(self.attend_chunk(q, t, memory))
            if memory["window"].size(1) == past + W:
                memory = self.close_chunk(memory)
        return self.out(torch.cat(out, 1).flatten(2)), memory

    def attend_chunk(self, q, t, memory):
        """The attention of queries q (B, T, H, D) at positions t (B, T), the last tokens of the open chunk so far."""
        W, M, T, device, window = self.c.W, self.M, q.size(1), q.device, memory["window"]
        begun = window.size(1) - self.c.past - T                               # tokens of the chunk before these
        s, t = t[:, :1, None] - begun, t[:, :, None]                           # (B, 1, 1), (B, T, 1)
        local = torch.arange(-self.c.past, begun + T, device=device)           # positions counted from s
        p = s + local                                                          # (B, 1, .)
        parts = [(window, local, (p > t - W) & (p <= t) & (p >= 0))]
        if self.fading:
            local = torch.arange(-2 * W, 0, device=device)
            p = s + local
            seen = (p > t - 2 * W) & (p <= t - W) if self.fading < 0 else (p >= s - self.fading) & (p <= t)
            parts.append((memory["fading"][:, :2 * W], local, seen & (p >= 0)))
        if M:
            local = torch.full((M,), -W, device=device)                        # wherever they stood in the text
            p, eps = memory["position"][:, None, :M], memory["innovation"][:, None, :M]              # (B, 1, M)
            parts.append((memory["eidetic"], local, (p <= t - W) & (eps >= 0)))
        kv, local, seen = (torch.cat(x, dim) for x, dim in zip(zip(*parts), (1, 0, 2)))
        q, k, v = (x.transpose(1, 2) for x in (q, *kv.type_as(q).unbind(2)))   # (B, H, ., D)
        if self.c.rope:
            q = rotate(q, rope(torch.arange(begun, begun + T, device=device), self.c.head_dim))
            k = rotate(k, rope(local, self.c.head_dim))
        return attend(q, k, v, seen[:, None]).transpose(1, 2)

    def close_chunk(self, memory):
        """A chunk is full. The window and the fading tokens move on by W. The eidetic tokens become M_t of algorithm 1:
        the M largest innovations of the tokens kept so far and those of the chunk."""
        W, past, window = self.c.W, self.c.past, memory["window"]
        memory = dict(memory, window=window[:, W:])
        if self.fading:
            memory["fading"] = memory["fading"][:, W:]
        if self.M:
            memory["innovation"], best = memory["innovation"].topk(self.M, 1)  # (B, M)
            memory["position"] = memory["position"].gather(1, best)
            candidates = torch.cat([memory["eidetic"], window[:, past:]], 1)   # (B, M+W, 2, H, D)
            memory["eidetic"] = candidates.take_along_dim(best[:, :, None, None, None], 1)
        return memory


class Layer(nn.Module):
    """A layer of kind bmojo, window (no state space) or ssm (no attention), with as many parameters as a layer of GPT."""

    def __init__(self, c, kind):
        super().__init__()
        self.taps = nn.Parameter(0.3 * torch.randn(TAPS, c.width)) if c.conv else None
        self.ssm = SSM(c) if kind != "window" else None
        self.attention = Attention(c, kind) if kind != "ssm" else None
        self.mlp = MLP(c, remaining_hidden(c, self))
        self.apply(GPT.init)
        nn.init.normal_((self.attention or self.ssm).out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        memory = dict(conv=zeros(*self.taps[1:].shape)) if self.taps is not None else {}
        for part in (self.ssm, self.attention):
            memory.update(part.start(zeros) if part else {})
        return memory

    def forward(self, x, memory, t, bonus):
        u, y, memory = norm(x), None, dict(memory)
        if self.taps is not None:
            u, memory["conv"] = short_conv(u, memory["conv"], self.taps)
        if self.ssm:
            y, memory["ssm"] = self.ssm(u, memory["ssm"])
        if self.attention:
            y, memory = self.attention(u, y, memory, t, bonus)
        x = x + y
        return x + self.mlp(norm(x)), memory


class BMojo(GPT):
    """Layers in which attention sees three memories side by side: the last W tokens as they are, outputs of a state
    space that sum up what came before them, and M tokens from anywhere that the state space did not expect. Presets
    leave parts out: `bmojo_f` the eidetic tokens; `hybrid` alternates layers of window attention and of state space.

    state    n (B,) tokens so far, and of each layer l, as far as it has them:
             l.conv (B, 3, C), l.ssm (B, H, D, N) as in mamba   l.outputs (B, 3, C) the last outputs y
             l.window (B, W, 2, H, D), l.fading (B, 2W, 2, H, D), l.eidetic (B, M, 2, H, D) keys and values
             l.innovation (B, M) of the eidetic tokens, -1: none there   l.position (B, M) theirs in the text
    read     one softmax over the last W raw tokens, the W fading tokens before them, the M eidetic tokens
    write    after every W tokens, the M largest innovations of the M kept and the W new tokens: M_t of algorithm 1
    paper    B'MOJO 2407.06324, section 3, algorithm 1, chunks of appendix B.2; state space of Mamba-2 2405.21060
    departs  the paper has Mamba-1, and leaves open which outputs are the fading tokens, how many outputs predict the next
             (here k = 3) and what error is (here Euclidean distance); RoPE within two windows (paper: none); no token is
             seen twice; one convolution before attention and state space, so that an eidetic token knows the three
             before it; and what mamba departs from
    """
    Config = Config
    parallel = math.inf                     # nothing waits for the end of a segment

    def __init__(self, c):
        super().__init__(c)
        self.blocks = nn.ModuleList(Layer(c, kind) for kind in (c.mix.split(",") * c.layers)[:c.layers])

    def bonus(self, tokens, t):
        """What ablations add to the innovations (B, T); it is larger than any innovation."""
        if self.c.select == "random":                                          # a hash of the position
            return 1e6 * ((t * 12.9898).sin() * 43758.5453).frac().abs()
        if self.c.select != "innovation":
            low, high = map(int, self.c.select.split("-"))
            return 1e6 * ((tokens >= low) & (tokens < high))
        return 0

    def init_state(self, B):
        zeros = lambda *shape: self.head.weight.new_zeros(B, *shape, dtype=torch.float32)
        return dict(flatten(layer.start(zeros) for layer in self.blocks), n=zeros().long())

    def read(self, state):
        return state["n"], unflatten(state, self.c.layers)

    def extend(self, tokens, cache):
        n, layers = cache
        x, now, T = self.embed(tokens), [], tokens.size(1)
        t = n[:, None] + torch.arange(T, device=n.device)                      # (B, T) positions in the text
        bonus = self.bonus(tokens, t)
        for layer, memory in zip(self.blocks, layers):
            x, memory = layer(x, memory, t, bonus)
            now.append(memory)
        return self.head(norm(x)), (n + T, now)                                # (B, T, V)

    def write(self, cache, state):
        n, layers = cache
        return own(dict(flatten(layers), n=n), state)
