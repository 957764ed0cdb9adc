"""B'MOJO: a window of raw tokens, a state space that fades, and the tokens that surprised it most, in one attention.

    w tokens in a window and in a chunk     G chunks in this call     t tokens in each of them
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, MLP, angles, attend, norm, rotate

TAPS = 4   # tokens that a short convolution sees, and that the innovation compares: this one and the three before it


@dataclass
class Config(gpt.Config):
    mix: str = "bmojo"           # the layers, in turn: bmojo, ssm (state space only), window (attention only)
    window: int = -1             # w, tokens that are seen as they are, and a chunk; -1: a quarter segment; 0: only one's own
    eidetic: int = -1            # M, tokens kept for good; -1: as many as the window
    fading: int = -1             # state-space outputs seen: the last n before a chunk; -1: those w to 2w before each token
    conv: bool = True            # a short convolution ties each key and value to the tokens before it
    rope: bool = True            # positions, counted from the chunk; the paper has none
    select: str = "innovation"   # who is kept: innovation, random, or as an oracle the token ids 16:48

    kinds = property(lambda c: [c.mix.split(",")[i % len(c.mix.split(","))] for i in range(c.layers)])
    keep = property(lambda c: c.window if c.window >= 0 else next(w for w in range(max(1, c.seg // 4), 0, -1)
                                                                  if c.seg % w == 0))   # rows of the past in a window
    w = property(lambda c: c.keep or c.seg)
    M = property(lambda c: c.eidetic if c.eidetic >= 0 else c.keep)

    def __post_init__(self):
        super().__post_init__()
        for kind in self.mix.split(","):
            assert kind in ("bmojo", "ssm", "window"), f"mix is of bmojo, ssm and window, got '{kind}'"
        assert self.seg % self.w == 0, f"a segment of {self.seg} tokens is not whole chunks of window={self.window}"
        assert -1 <= self.fading <= 2 * self.w, f"fading is -1 to 2 windows = {2 * self.w}, got {self.fading}"
        assert self.eidetic >= -1, f"eidetic counts tokens, got {self.eidetic}"
        lo, _, hi = self.select.partition(":")
        assert self.select in ("innovation", "random") or lo.isdigit() and hi.isdigit(), \
            f"select is innovation, random or token ids lo:hi, got '{self.select}'"


# ----------------------------------------------------------------------------------------------------------------------
# The state space: h_t = exp(a_t) h_{t-1} + x_t (x) b_t and y_t = h_t c_t, with one decay a_t <= 0 for each head

def step(x, a, b, c, h):
    """One token: x (B, 1, H, D), a (B, 1, H), b and c (B, 1, N), h (B, H, D, N) -> y (B, 1, H, D) and the next h."""
    h = a[:, 0, :, None, None].exp() * h + x[:, 0, :, :, None] * b[:, 0, None, None]
    return torch.einsum("bhdn,bn->bhd", h, c[:, 0])[:, None], h


def decays(a):
    """What is left at i of what came at j, the exp of the sum of a over j < r <= i: a (..., n) -> (..., n, n)."""
    a = a.cumsum(-1)
    later = torch.ones(a.size(-1), a.size(-1), dtype=torch.bool, device=a.device).triu(1)
    return (a[..., :, None] - a[..., None, :]).masked_fill(later, -math.inf).exp()


def scan(x, a, b, c, h, Q=64):
    """All T tokens at once, in matrix products: attention with decay inside chunks of Q, and one state for each chunk
    handed to all later ones (Mamba-2 2405.21060, section 6). The same map as `step`, T times."""
    T = x.size(1)
    Q = min(Q, T)
    x, a, b, c = (F.pad(v, (0, 0) * (v.ndim - 2) + (0, -T % Q)).unflatten(1, (-1, Q)) for v in (x, a, b, c))
    a = a.permute(0, 3, 1, 2)                                                 # (B, H, K, Q)
    left = decays(a)                                                          # (B, H, K, Q, Q)
    y = torch.einsum("bkin,bkjn,bhkij,bkjhd->bkihd", c, b, left, x)           # what came in the same chunk
    new = torch.einsum("bhkj,bkjhd,bkjn->bhkdn", left[..., -1, :], x, b)      # what a chunk adds to the state
    h = torch.cat([h[:, :, None], new], 2)                                    # (B, H, 1+K, D, N)
    h = torch.einsum("bhij,bhjdn->bhidn", decays(F.pad(a.sum(-1), (1, 0))), h)  # before each chunk, and at the end
    y = y + torch.einsum("bhki,bkin,bhkdn->bkihd", a.cumsum(-1).exp(), c, h[:, :, :-1])
    return y.flatten(1, 2)[:, :T], h[:, :, -1]


class SSM(nn.Module):
    """Mamba-2's block on the heads of the attention: H states (D, D) that forget at a rate read from each token.

    remembers  h (B, H, D, D)
    """

    def __init__(self, c):
        super().__init__()
        self.c, C, H, D = c, c.width, c.heads, c.head_dim
        self.inp = nn.Linear(C, 2 * C + 2 * D + H, bias=False)
        dt = torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt = nn.Parameter(dt.expm1().log())                              # its softplus is dt again
        self.A = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(H))
        self.out = nn.Linear(C, C, bias=False)

    def start(self, zeros):
        return dict(h=zeros(self.c.heads, self.c.head_dim, self.c.head_dim))

    def forward(self, u, past):
        C, H, D = self.c.width, self.c.heads, self.c.head_dim
        z, xbc, dt = self.inp(u).split([C, C + 2 * D, H], -1)
        with torch.autocast(u.device.type, enabled=False):                    # decays want all their digits
            x, b, c = F.silu(xbc).type_as(self.A).split([C, D, D], -1)
            x, dt = x.unflatten(2, (H, D)), F.softplus(dt + self.dt)          # (B, T, H, D), (B, T, H)
            y, h = (step if u.size(1) == 1 else scan)(dt[..., None] * x, -dt * self.A.exp(), b, c, past["h"])
            y = (y + self.skip[:, None] * x).flatten(2).type_as(z)
        return self.out(norm(y * F.silu(z))), dict(h=h)


# ----------------------------------------------------------------------------------------------------------------------
# The attention: one softmax over window, fading tokens and eidetic tokens

class Here:
    """Where the T tokens of a call stand: P into the segment, n + P into the text; in whole chunks, or all in one."""

    def __init__(self, c, tokens, n, P):
        T, device = tokens.size(1), tokens.device
        self.n, self.first, self.end = n, P - P % c.w, P + T
        self.at = torch.arange(P, P + T, device=device)                       # (T,) in the segment
        self.start = torch.arange(self.first, P + T, c.w, device=device)      # (G,) where the chunks begin, the same
        self.G = len(self.start)
        self.j = self.at[-(T // self.G):, None] - self.start[-1]              # (t, 1) in a chunk
        self.bonus = 0                                                        # for the innovation, only in ablations:
        if c.select == "random":
            self.bonus = 1e6 * (((n[:, None] + self.at) * 12.9898).sin() * 43758.5453).frac().abs()   # (B, T) noise
        elif c.select != "innovation":
            lo, hi = map(int, c.select.split(":"))
            self.bonus = 1e6 * ((tokens >= lo) & (tokens < hi))               # (B, T) who knows the answer helps

    def exist(self, p):
        """Places p (m,) of each chunk that lie behind the beginning of the text: (B, G, 1, m)."""
        return (self.start[:, None] + p >= -self.n[:, None, None])[:, :, None]

    def blocks(self, x, size):
        """x (B, ., H, D) in blocks of a size, as many as chunks or more: what each chunk sees of it, as pieces
        (B, G, size, H, D), its own block and the ones behind that."""
        if self.G == 1:
            return [x[:, None]]
        x = x.unflatten(1, (-1, size))
        return [x[:, i:i + self.G] for i in range(x.size(1) - self.G + 1)]


class Attention(gpt.Attention):
    """Of what is older than its chunk a token sees a snapshot taken when the chunk began, so that the chunks of a call do
    not wait for each other.

    remembers  kv (B, M+w, 2C) keys and values: M eidetic tokens, then the last w   eps (B, M+w) their innovation, -1
               where there is none   at (B, M+w) their place in the text   y (B, 3, C) the last outputs of the state space
               faded (B, 2w, 2C) keys and values of outputs
    """

    def __init__(self, c, kind):
        super().__init__(c)
        self.c = c
        self.M, self.fading = (c.M, c.fading) if kind == "bmojo" else (0, 0)

    def start(self, zeros):
        C, M, w = self.c.width, self.M, self.c.keep
        past = dict(kv=zeros(M + w, 2 * C))
        if self.fading:
            past.update(faded=zeros(2 * w, 2 * C))
        if M:
            past.update(eps=zeros(M + w) - 1, at=zeros(M + w).long(), y=zeros(TAPS - 1, C))
        return past

    def turn(self, k, p):
        """Queries or keys (B, ., C) at places p of the segment: QK-norm and RoPE, (B, ., H, D)."""
        turn = angles(p * self.c.rope, self.c.head_dim)
        return rotate(norm(k.unflatten(-1, (self.heads, -1))), [x[:, None] for x in turn])

    def best(self, eps, before):
        """The M largest of the first before (G,) of eps (B, n): values, -1 where there are fewer, and indices."""
        late = torch.arange(eps.size(1), device=eps.device) >= before[:, None]           # (G, n)
        return eps[:, None].masked_fill(late, -1).topk(self.M, -1)                       # (B, G, M) both

    def forward(self, u, y, past, here):
        """The block's input u and the state space's output y, (B, T, C) both, -> (B, T, C) and what it remembers."""
        c, M, w, G, first, (B, T, C) = self.c, self.M, self.c.w, here.G, here.first, u.shape
        q, kv = self.qkv(u).split([C, 2 * C], -1)
        kv = torch.cat([past["kv"].type_as(kv), kv], 1)                                  # (B, M+w+P+T, 2C)
        now = dict(kv=kv)

        # the window: age 0 to w
        p = torch.arange(-c.keep, here.end - here.first if G == 1 else w, device=u.device)
        near = (here.j - p >= 0) & (here.j - p < w)
        places = torch.arange(first - c.keep, here.end, device=u.device)
        seen = [(kv[:, M + first:], places, w, near & here.exist(p))]

        if self.fading:   # age w to 2 w, or the last n before the chunk
            faded = F.linear(norm(y), self.qkv.weight[C:])
            faded = now["faded"] = torch.cat([past["faded"].type_as(kv), faded], 1)      # (B, 2w+P+T, 2C)
            p = torch.arange(-2 * w, 0, device=u.device)
            near = (here.j - p >= w) & (here.j - p < 2 * w) if self.fading < 0 else (p >= -self.fading).expand(len(here.j), -1)
            places = torch.arange(first - 2 * w, first + (G - 1) * w, device=u.device)
            seen += [(faded[:, first:first + len(places)], places, w, near & here.exist(p))]

        if M:             # age w and more: none is seen twice
            now.update(self.surprise(y, past, here))
            eps, i = self.best(now["eps"], M + c.keep + here.start)                      # (B, G, M)
            rows = kv.gather(1, i.flatten(1)[..., None].expand(-1, -1, 2 * C))           # (B, GM, 2C)
            age = here.n[:, None, None] + here.start[:, None] - now["at"].gather(1, i.flatten(1)).view_as(i)
            far = (here.j + age[:, :, None] >= w) & (eps >= 0)[:, :, None]
            seen += [(rows, (here.start - w).repeat_interleave(M), M, far)]

        k = torch.cat([piece for rows, p, size, _ in seen for piece in here.blocks(self.turn(rows[..., :C], p), size)], 2)
        v = torch.cat([piece for rows, _, size, _ in seen
                       for piece in here.blocks(rows[..., C:].unflatten(2, (self.heads, -1)), size)], 2)
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (self.turn(q, here.at).unflatten(1, (G, -1)), k, v))
        mask = torch.cat([m for *_, m in seen], -1).flatten(0, 1)[:, None]               # (BG, 1, t, m)
        o = attend(q, k, v, mask)                                                        # (BG, H, t, D)
        return self.out(o.transpose(1, 2).reshape(B, T, C)), now

    @torch.no_grad()
    def surprise(self, y, past, here):
        """The innovation of every token: how far y_t is from the mean of the outputs before it."""
        y = torch.cat([past["y"], y.type_as(past["y"])], 1)                              # (B, 3+T, C)
        guess = y.unfold(1, TAPS - 1, 1)[:, :-1].mean(-1)
        eps = (y[:, TAPS - 1:] - guess).norm(dim=-1) + here.bonus                        # (B, T)
        return dict(eps=torch.cat([past["eps"], eps], 1), at=torch.cat([past["at"], here.n[:, None] + here.at], 1),
                    y=y[:, 1 - TAPS:])

    def close(self, past):
        """The segment is over: of all rows the M eidetic and the last w remain."""
        kv, w = past["kv"], self.c.keep
        i = torch.arange(kv.size(1) - w, kv.size(1), device=kv.device).expand(len(kv), -1)
        if self.M:
            eps, best = self.best(past["eps"], torch.tensor([kv.size(1)], device=kv.device))
            i = torch.cat([best[:, 0], i], 1)
            past = dict(past, eps=F.pad(eps[:, 0], (0, w), value=-1), at=past["at"].gather(1, i))
        if self.fading:
            past = dict(past, faded=past["faded"][:, -2 * w:])
        return dict(past, kv=kv.gather(1, i[..., None].expand(-1, -1, kv.size(2))))


class Layer(nn.Module):
    """A block as large as GPT's: what the state space takes, the MLP gives. A short convolution before both."""

    def __init__(self, c, kind):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(TAPS, c.width)) if c.conv else None
        self.ssm = SSM(c) if kind != "window" else None
        self.attention = Attention(c, kind) if kind != "ssm" else None
        spare = 12 * c.width ** 2 - sum(p.numel() for p in self.parameters())
        self.mlp = MLP(c, max(8, spare // (16 * c.width) * 8))
        self.apply(GPT.init)
        for part in filter(None, (self.ssm, self.attention)):
            nn.init.normal_(part.out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        past = dict(u=zeros(TAPS - 1, self.mlp.up.in_features)) if self.taps is not None else {}
        for part in filter(None, (self.ssm, self.attention)):
            past.update(part.start(zeros))
        return past

    def forward(self, x, past, here):
        u, y, now = norm(x), None, {}
        if self.taps is not None:
            T, u = u.size(1), torch.cat([past["u"].type_as(u), u], 1)
            now.update(u=u[:, T:])
            u = u[:, TAPS - 1:] + sum(tap * u[:, i:i + T] for i, tap in enumerate(self.taps))
        if self.ssm:
            y, more = self.ssm(u, past)
            now.update(more)
        if self.attention:
            y, more = self.attention(u, y, past, here)
            now.update(more)
        x = x + y
        return x + self.mlp(norm(x)), now

    def close(self, past):
        return self.attention.close(past) if self.attention else past


class BMojo(GPT):
    """..."""
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.blocks = nn.ModuleList(Layer(c, kind) for kind in c.kinds)

    def init_state(self, B):
        zeros = lambda *shape: self.head.weight.new_zeros(B, *shape, dtype=torch.float32)
        return dict({f"{i}.{k}": v for i, block in enumerate(self.blocks) for k, v in block.start(zeros).items()},
                    n=zeros().long())

    def read(self, state):
        pasts = [{} for _ in self.blocks]
        for k, v in state.items():
            i, _, name = k.partition(".")
            if name:
                pasts[int(i)][name] = v
        return state["n"], 0, pasts

    def extend(self, tokens, cache):
        """The rest of an open chunk, then all whole chunks at once, then the beginning of another."""
        n, P, pasts = cache
        T, w, out = tokens.size(1), self.c.w, []
        rest = min(T, -P % w)
        for part in tokens.split([t for t in (rest, (T - rest) // w * w, (T - rest) % w) if t], 1):
            x, here, longer = self.embed(part), Here(self.c, part, n, P), []
            for block, past in zip(self.blocks, pasts):
                x, past = block(x, past, here)
                longer.append(past)
            P, pasts = P + part.size(1), longer
            out.append(norm(x))
        return self.head(torch.cat(out, 1)), (n, P, pasts)

    def write(self, cache, state):
        n, P, pasts = cache
        now = {f"{i}.{k}": v for i, (block, past) in enumerate(zip(self.blocks, pasts))
               for k, v in block.close(past).items()}
        now["n"] = n + P
        return {k: now[k].to(v.dtype, copy=True, memory_format=torch.contiguous_format) for k, v in state.items()}
