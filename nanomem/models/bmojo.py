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


# ----------------------------------------------------------------------------------------------------------------------
# The attention

def innovation(y, last):
    """eps_t of algorithm 1: how far each output y (B, T, C) is from the mean of the k outputs before it, the first ones
    from those in last (B, k, C). -> eps (B, T) and the last k outputs."""
    T = y.size(1)
    line = torch.cat([last, y.type_as(last)], 1)                               # (B, k+T, C)
    predicted = sum(line[:, i:i + T] for i in range(SPAN)) / SPAN              # (B, T, C), y^ of algorithm 1
    return (line[:, SPAN:] - predicted).norm(dim=-1), line[:, T:]


class Attention(gpt.Attention):
    """Algorithm 1 for a chunk of W tokens at a time (appendix B.2). In a chunk that begins at position s of the text, the
    query at position t sees, in one softmax,

        raw tokens u_p        with  t - W < p <= t
        fading tokens y_p     with  t - 2W < p <= t - W     (fading=n: the n before s)
        eidetic tokens u_p    with  p <= t - W              of the M tokens before s that have the largest eps_p

    So the fading and the eidetic tokens are all known when the chunk begins, and no query waits for another. Of all
    tokens the memory holds keys, with norm but not yet rotated, and values: (B, tokens, 2, H, D).
    """

    def __init__(self, c, kind):
        super().__init__(c)
        self.c = c
        self.M, self.fading = (c.M, c.fading) if kind == "bmojo" else (0, 0)

    def start(self, zeros):
        """The memory where a text begins: there is room, but position and innovation say that nothing is there."""
        c = self.c
        keys_values = lambda n: zeros(n, 2, c.heads, c.head_dim)
        memory = dict(window=keys_values(c.carried))
        if self.fading:
            memory.update(fading=keys_values(2 * c.W))
        if self.M:
            memory.update(eidetic=keys_values(self.M), innovation=zeros(self.M) - 1, position=zeros(self.M).long(),
                          outputs=zeros(SPAN, c.width))
        return memory

    def forward(self, u, y, memory, t, bonus):
        """u, y (B, T, C) at positions t (B, T) of the text -> out_t of algorithm 1 (B, T, C), and the memory after these
        tokens. While a chunk is open, its tokens stand behind those of the memory."""
        memory, split = dict(memory), lambda x, n: x.unflatten(2, (n, self.heads, -1)).unbind(2)     # n (B, T, H, D)
        q, k, v = split(self.qkv(u), 3)
        q, new = norm(q).type_as(v), dict(window=torch.stack([norm(k).type_as(v), v], 2))            # (B, T, 2, H, D)
        if self.fading:
            k, v = split(F.linear(y, self.qkv.weight[self.c.width:]), 2)       # y has the keys and values that u has
            new.update(fading=torch.stack([norm(k).type_as(v), v], 2))
        if self.M:
            eps, memory["outputs"] = innovation(y.detach(), memory["outputs"])
            new.update(innovation=eps + bonus, position=t)
        T, open, out = u.size(1), memory["window"].size(1) - self.c.carried, []
        borders = [0, *range(self.c.W - open, T, self.c.W), T]                 # where chunks begin among these tokens
        sizes = [end - begin for begin, end in zip(borders, borders[1:])]
        for q, t, *parts in zip(*(x.split(sizes, 1) for x in (q, t, *new.values()))):
            for name, x in zip(new, parts):
                memory[name] = torch.cat([memory[name].type_as(x), x], 1)
            out.append(self.attend_chunk(q, t, memory))
            if memory["window"].size(1) == self.c.carried + self.c.W:
                memory = self.close_chunk(memory)
        return self.out(torch.cat(out, 1).flatten(2)), memory

    def attend_chunk(self, q, t, memory):
        """Queries q (B, T, H, D) of one chunk, the last T of its tokens so far, at positions t (B, T) -> (B, T, H, D)."""
        c, W, T, dev = self.c, self.c.W, q.size(1), q.device
        open = memory["window"].size(1) - c.carried - T                        # tokens of this chunk before these
        s, t = t[:, :1, None] - open, t[:, :, None]                            # (B, 1, 1), (B, T, 1)
        place = torch.arange(-c.carried, open + T, device=dev)                 # positions from s on, for RoPE
        p = s + place                                                          # (B, 1, .) positions in the text
        kv, places, seen = [memory["window"]], [place], [(p > t - W) & (p <= t) & (p >= 0)]          # (B, T, .)
        if self.fading:
            place = torch.arange(-2 * W, 0, device=dev)
            p = s + place
            span = (p > t - 2 * W) & (p <= t - W) if self.fading < 0 else (p >= s - self.fading) & (p <= t)
            kv, places, seen = kv + [memory["fading"][:, :2 * W]], places + [place], seen + [span & (p >= 0)]
        if self.M:
            p, eps = memory["position"][:, None, :self.M], memory["innovation"][:, None, :self.M]    # (B, 1, M)
            kv, seen = kv + [memory["eidetic"]], seen + [(p <= t - W) & (eps >= 0)]
            places.append(torch.full((self.M,), -W, device=dev))               # as if all stood just before the window
        k, v = torch.cat([x.type_as(q) for x in kv], 1).transpose(1, 3).unbind(2)                    # (B, H, ., D)
        q = q.transpose(1, 2)
        if c.rope:
            q = rotate(q, rope(torch.arange(open, open + T, device=dev), c.head_dim))
            k = rotate(k, rope(torch.cat(places), c.head_dim))
        return attend(q, k, v, torch.cat(seen, 2)[:, None]).transpose(1, 2)

    def close_chunk(self, memory):
        """A chunk is full. The window and the fading tokens move on, and the eidetic tokens are M_t of algorithm 1: the
        M largest innovations of those kept and those of the chunk."""
        c, window = self.c, memory["window"]
        memory = dict(memory, window=window[:, c.W:])
        if self.fading:
            memory["fading"] = memory["fading"][:, c.W:]
        if self.M:
            memory["innovation"], best = memory["innovation"].topk(self.M, 1)  # (B, M)
            memory["position"] = memory["position"].gather(1, best)
            kv = torch.cat([memory["eidetic"].type_as(window), window[:, c.carried:]], 1)            # (B, M+W, 2, H, D)
            memory["eidetic"] = kv.take_along_dim(best[:, :, None, None, None], 1)
        return memory


# ----------------------------------------------------------------------------------------------------------------------
# The model

class Layer(nn.Module):
    """A layer of one kind: bmojo, window (no state space) or ssm (no attention). All have as many parameters as GPT's."""

    def __init__(self, c, kind):
        super().__init__()
        self.taps = nn.Parameter(0.3 * torch.randn(TAPS, c.width)) if c.conv else None
        self.ssm = SSM(c) if kind != "window" else None
        self.attention = Attention(c, kind) if kind != "ssm" else None
        self.mlp = MLP(c, remaining_hidden(c, self))
        self.apply(GPT.init)
        nn.init.normal_((self.attention or self.ssm).out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        memory = {}
        if self.taps is not None:
            memory.update(conv=zeros(*self.taps[1:].shape))
        if self.ssm:
            memory.update(self.ssm.start(zeros))
        if self.attention:
            memory.update(self.attention.start(zeros))
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
    leave parts out: `bmojo_f` the eidetic tokens; `hybrid` alternates attention windows and state spaces.

    state    n (B,) tokens so far, and of each layer l, as far as it has them:
             l.conv (B, 3, C), l.ssm (B, H, D, N) as in mamba   l.outputs (B, 3, C) the last outputs y
             l.window (B, W, 2, H, D), l.fading (B, 2W, 2, H, D), l.eidetic (B, M, 2, H, D) keys and values
             l.innovation (B, M) of the eidetic tokens, -1 where there is none   l.position (B, M) theirs in the text
    read     each token attends to the W raw, the W fading and the M eidetic tokens in one softmax
    write    after each chunk of W tokens, the M largest innovations of the M kept and the W new tokens: M_t of algorithm 1
    paper    B'MOJO 2407.06324, section 3, algorithm 1, chunks as in appendix B.2; the state space is Mamba-2's, 2405.21060
    departs  the paper has Mamba-1; it leaves open which outputs are the fading tokens, how far back the innovation looks
             (here k = 3 outputs) and which norm it is (here Euclidean); RoPE within two windows (paper: none); no token is
             seen twice; one convolution before both parts, so that an eidetic token knows the three before it; and what
             mamba departs from
    """
    Config = Config
    parallel = math.inf                     # nothing waits for the end of a segment

    def __init__(self, c):
        super().__init__(c)
        self.blocks = nn.ModuleList(Layer(c, kind) for kind in (c.mix.split(",") * c.layers)[:c.layers])

    def bonus(self, tokens, t):
        """What is added to the innovations (B, T): nothing, or for an ablation more than any innovation is."""
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
        now = dict(flatten(layers), n=n)
        return {k: now[k].to(old.dtype, copy=True, memory_format=torch.contiguous_format) for k, old in state.items()}
