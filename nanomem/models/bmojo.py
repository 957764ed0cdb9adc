"""B'MOJO: one attention over three memories: the last tokens, outputs of a state space, and tokens that surprised it.

    u inputs of a layer, raw tokens     y outputs of its state space, fading tokens
    M eidetic tokens     W tokens in an attention window, itself included, and in a chunk (the paper's w)
"""
import re
from dataclasses import dataclass

import torch
from torch import nn

from . import gpt, mamba
from .gpt import GPT, MLP, attend, norm, rope, rotate
from .mamba import SSM, TAPS, Mamba, remaining_hidden, short_conv

SPAN = 3   # outputs whose mean predicts the next one, k of algorithm 1


@dataclass
class Config(mamba.Config):
    mix: str = "bmojo"           # the layers in turn: bmojo, ssm (a state space only), window (attention only)
    window: int = -1             # W, raw tokens seen, itself included; -1: up to a quarter of it; 0: its segment only
    eidetic: int = -1            # M, tokens kept, those of most surprise so far; -1: W, or none with window=0
    fading: int = -1             # state-space outputs seen: the last n before a chunk; -1: the W before the window
    rope: bool = True            # positions, counted within two windows; the paper has none
    select: str = "innovation"   # tokens that are kept: innovation, random, or, of an oracle, ids lo-hi (hi excluded)

    past = property(lambda c: c.window if c.window >= 0 else     # raw tokens kept of the chunk before: W or 0
                    max(w for w in range(1, max(1, c.seg // 4) + 1) if c.seg % w == 0))
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
    """eps_t of algorithm 1: the distance of each output y_t (B, T, C) from the mean of the 3 before it. last (B, 3, C)
    are the outputs before y. -> eps (B, T) and the new last outputs."""
    T, line = y.size(1), torch.cat([last, y], 1)                               # (B, 3+T, C)
    predicted = sum(line[:, i:i + T] for i in range(SPAN)) / SPAN              # (B, T, C) y^ of algorithm 1
    return (line[:, SPAN:] - predicted).norm(dim=-1), line[:, T:]


def rope_of_keys(positions, D):
    """RoPE for keys whose slow half comes from the position before: that half has the angles of that position."""
    own, before = rope(positions, D), rope(positions - 1, D)
    return [torch.cat([a[:, :D // 4], b[:, D // 4:]], 1) for a, b in zip(own, before)]


class Attention(gpt.Attention):
    """Algorithm 1 for a chunk of W tokens at a time (appendix B.2). In a chunk that begins at position s, the query at
    position t sees in one softmax

        raw tokens u_p          t - W < p <= t
        fading tokens y_p       t - 2W < p <= t - W     (with fading=n: the n before s)
        eidetic tokens u_p      p <= t - W              of the M tokens before s with the largest eps_p

    The memory holds their keys, with norm and shift but not yet rotated, and their values: (B, tokens, 2, H, D).
    """

    def __init__(self, c, kind):
        super().__init__(c)
        self.M, self.fading = (c.M, c.fading) if kind == "bmojo" else (0, 0)

    def start(self, zeros):
        """The memory where a text begins: empty places. Eidetic ones have the position -1."""
        c, shape = self.c, (self.c.heads, self.c.head_dim)
        memory = dict(window=zeros(c.past, 2, *shape), last_key=zeros(1, *shape))
        if self.fading:
            memory.update(fading=zeros(2 * c.W, 2, *shape), last_fading_key=zeros(1, *shape))
        if self.M:
            memory.update(eidetic=zeros(self.M, 2, *shape), innovation=zeros(self.M) - 1,
                          position=zeros(self.M).long() - 1, outputs=zeros(SPAN, c.width))
        return memory

    def keys_values(self, x, last, t):
        """Keys and values of x (B, T, C) at positions t (B, T), together (B, T, 2, H, D), and the last key as it is. As
        in gpt.with_previous, a key has the slow half of the key before it; last (B, 1, H, D) is the one before x."""
        k, v = (linear(x).unflatten(2, (self.c.heads, -1)) for linear in (self.k, self.v))       # (B, T, H, D)
        line = torch.cat([last.type_as(v), norm(k).type_as(v)], 1)             # (B, 1+T, H, D)
        k, before = line[:, 1:], line[:, :-1]
        if not self.c.past:
            before = before * (t % self.c.W > 0)[:, :, None, None]             # there is no past before a chunk
        if self.c.shift:
            half = k.size(-1) // 2
            k = torch.cat([k[..., :half], before[..., half:]], -1)
        return torch.stack([k, v], 2), line[:, -1:]

    def forward(self, u, y, memory, t, fixed):
        """u and y (B, T, C) at positions t (B, T) -> out_t of algorithm 1 (B, T, C), and the memory after these tokens.
        The tokens of a chunk that is not yet full stand behind those of the memory. `fixed`: see BMojo.fixed."""
        W, T, memory, out = self.c.W, u.size(1), dict(memory), []
        q, new = self.q(u).unflatten(2, (self.c.heads, -1)), {}                # (B, T, H, D)
        new["window"], memory["last_key"] = self.keys_values(u, memory["last_key"], t)
        if self.fading:                                                        # keys and values of y by the same maps
            new["fading"], memory["last_fading_key"] = self.keys_values(y, memory["last_fading_key"], t)
        if self.M:
            eps, memory["outputs"] = innovation(y.detach(), memory["outputs"])
            new.update(innovation=eps if fixed is None else fixed, position=t)
        begun = memory["window"].size(1) - self.c.past                         # tokens of the open chunk so far
        cuts = tuple(range(W - begun, T, W))                                   # where chunks begin in this call
        for q, t, *parts in zip(*(x.tensor_split(cuts, 1) for x in (q, t, *new.values()))):
            for name, x in zip(new, parts):
                memory[name] = torch.cat([memory[name], x], 1)
            out.append(self.attend_chunk(q, t, memory))
            if memory["window"].size(1) == self.c.past + W:
                memory = self.close_chunk(memory)
        return self.out(torch.cat(out, 1).flatten(2)), memory

    def attend_chunk(self, q, t, memory):
        """Queries q (B, T, H, D) at positions t (B, T), of the last tokens in the memory's window -> (B, T, H, D)."""
        W, M, T, window, device = self.c.W, self.M, q.size(1), memory["window"], q.device
        begun = window.size(1) - self.c.past - T                               # tokens of the chunk before these
        s, t = t[:, :1, None] - begun, t[:, :, None]                           # (B, 1, 1), (B, T, 1)
        offset = torch.arange(-self.c.past, begun + T, device=device)          # p - s
        p = s + offset                                                         # (B, 1, .)
        seen = [(window, offset, (p > t - W) & (p <= t) & (p >= 0))]           # keys and values, p - s, mask (B, T, .)
        if self.fading:
            offset = torch.arange(-2 * W, 0, device=device)
            p = s + offset
            mask = (p > t - 2 * W) & (p <= t - W) if self.fading < 0 else (offset >= -self.fading).expand(1, T, -1)
            seen.append((memory["fading"][:, :2 * W], offset, mask & (p >= 0)))
        if M:
            p = memory["position"][:, None, :M]                                # (B, 1, M)
            offset = torch.full((M,), -W, device=device)                       # all at -W, however old they are
            seen.append((memory["eidetic"], offset, (p <= t - W) & (p >= 0)))
        kv, offset, mask = zip(*seen)
        k, v = torch.cat(kv, 1).transpose(1, 3).unbind(2)                      # (B, H, ., D)
        q = norm(q.transpose(1, 2))                                            # (B, H, T, D)
        if self.c.rope:
            angles = rope_of_keys if self.c.shift else rope
            q = rotate(q, rope(torch.arange(begun, begun + T, device=device), self.c.head_dim))
            k = rotate(k, angles(torch.cat(offset), self.c.head_dim))
        q = (q * self.gain).type_as(v)
        return attend(q, k.type_as(v), v, torch.cat(mask, 2)[:, None]).transpose(1, 2)

    def close_chunk(self, memory):
        """A chunk is full. The window and the fading tokens move on by W. The eidetic tokens become M_t of algorithm 1,
        with a bound (appendix B.2): the M largest innovations of those kept so far and those of the chunk."""
        W, window, memory = self.c.W, memory["window"], dict(memory)
        memory["window"] = window[:, W:]
        if self.fading:
            memory["fading"] = memory["fading"][:, W:]
        if self.M:
            kept = memory["position"][:, None, :self.M]                        # (B, 1, M)
            memory["seen"] = torch.cat([memory.get("seen", kept[:, :0]), kept], 1)     # (B, chunks, M) for `retrieved`
            memory["innovation"], best = memory["innovation"].topk(self.M, 1)  # (B, M)
            memory["position"] = memory["position"].gather(1, best)
            candidates = torch.cat([memory["eidetic"], window[:, self.c.past:]], 1)                  # (B, M+W, 2, H, D)
            memory["eidetic"] = candidates.take_along_dim(best[:, :, None, None, None], 1)
        return memory


class Layer(nn.Module):
    """A layer of kind bmojo, window (no state space) or ssm (no attention). The size is that of GPT's layer."""

    def __init__(self, c, kind):
        super().__init__()
        self.ssm = SSM(c) if kind != "window" else None
        self.taps = nn.Parameter(0.3 * torch.randn(TAPS, c.width)) if c.conv and self.ssm else None
        self.attention = Attention(c, kind) if kind != "ssm" else None
        self.mlp = MLP(c, remaining_hidden(c, self))
        self.apply(GPT.init)
        nn.init.normal_((self.attention or self.ssm).out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        memory = dict(conv=zeros(*self.taps[1:].shape)) if self.taps is not None else {}
        for part in (self.ssm, self.attention):
            memory.update(part.start(zeros) if part else {})
        return memory

    def forward(self, x, memory, t, fixed):
        u, y, memory = norm(x), None, dict(memory)
        if self.ssm:
            tied = u
            if self.taps is not None:
                tied, memory["conv"] = short_conv(u, memory["conv"], self.taps)
            y, memory["ssm"] = self.ssm(tied, memory["ssm"])
        if self.attention:
            y, memory = self.attention(u, y, memory, t, fixed)
        x = x + y
        return x + self.mlp(norm(x)), memory


class BMojo(Mamba):
    """Layers whose attention sees three memories side by side: the last W tokens as they are, outputs of a state space
    that sum up the tokens before, and M tokens from anywhere that the state space did not expect. Presets leave parts
    out: `bmojo_f` the eidetic tokens; `hybrid` alternates layers of window attention and layers of state space.

    state    n (B,) tokens so far, and of each layer l, as far as it has them:
             l.conv (B, 3, C), l.ssm (B, H, D, N) as in mamba   l.outputs (B, 3, C) the last outputs y
             l.window (B, W, 2, H, D), l.fading (B, 2W, 2, H, D), l.eidetic (B, M, 2, H, D) keys and values
             l.last_key, l.last_fading_key (B, 1, H, D) the last keys before their shift
             l.innovation (B, M) of the eidetic tokens   l.position (B, M) theirs in the text, -1: none there
    read     one softmax over the last W raw tokens, the W fading tokens before them, the M eidetic tokens
    write    after every W tokens the M largest innovations, of the M tokens kept and the W new ones: M_t of algorithm
             1, with the bound of appendix B.2
    paper    B'MOJO 2407.06324: section 3, algorithm 1, the chunks of appendix B.2
    departs  Mamba-2 for Mamba-1 (see mamba); each token sees W fading tokens, as in the authors' later code (algorithm
             1 has one, appendix B.2 leaves it open); the paper leaves open of how many outputs y^ is the weighted mean
             (here of 3, with equal weights), what error is (here Euclidean distance), and whether raw and fading tokens
             share projections (here they do); RoPE within two windows (paper: none); no raw token is seen twice; a key
             knows the token before it, as in all our models, so that an eidetic token can say what followed; the
             convolution is the state space's alone; gradient goes into earlier segments
    """
    Config = Config

    def layer(self, l):
        kinds = self.c.mix.split(",")
        return Layer(self.c, kinds[l % len(kinds)])

    def fixed(self, tokens, t):
        """For ablations, scores (B, T) in place of the innovations. random: a hash of the token and its position. An
        oracle's: high for its tokens, low for others, and higher for newer ones."""
        if self.c.select == "innovation":
            return None
        if self.c.select == "random":
            return (((t + 1) * 73_856_093) ^ ((tokens + 1) * 19_349_663)) % 1_000_003 / 1_000_003
        low, high = map(int, self.c.select.split("-"))
        return (t + 1) * torch.where((tokens >= low) & (tokens < high), 1.0, 2.0 ** -25)

    def init_state(self, B):
        return dict(super().init_state(B), n=torch.zeros(B, dtype=torch.long, device=self.head.weight.device))

    def read(self, state):
        return state["n"], super().read(state)

    def extend(self, tokens, cache):
        n, layers = cache
        x, now, T = self.embed(tokens), [], tokens.size(1)
        t = n[:, None] + torch.arange(T, device=n.device)                      # (B, T) positions in the text
        fixed = self.fixed(tokens, t)
        for layer, memory in zip(self.blocks, layers):
            x, memory = layer(x, memory, t, fixed)
            now.append(memory)
        return self.head(norm(x)), (n + T, now)                                # (B, T, V)

    def write(self, cache, state):
        n, layers = cache
        layers = [{name: x for name, x in memory.items() if name != "seen"} for memory in layers]
        return dict(super().write(layers, state), n=n.clone())

    def retrieved(self, cache):
        """For each token of a full segment the eidetic tokens that it could see in all layers, as spans of text of one
        token (B, T, L M, 2), -1 for none. Their weights are not known: nan (B, T, L M)."""
        n, layers = cache
        seen = [memory["seen"] for memory in layers if "seen" in memory]
        if not seen:
            return None
        p = torch.cat(seen, 2).repeat_interleave(self.c.W, 1)                  # (B, T, L M)
        t = n[:, None, None] - torch.arange(p.size(1), 0, -1, device=n.device)[:, None]
        p = p.where(p <= t - self.c.W, -1)
        spans = torch.stack([p, p + 1], 3).masked_fill(p[..., None] < 0, -1)
        return spans, torch.full(p.shape, torch.nan, device=n.device)
