"""B'MOJO: a window of raw tokens, the outputs of a state space that fades, and the tokens that surprised it the most.

    w tokens in a window and in a chunk     G chunks in a call     t tokens in each of them, less than w while decoding
"""
import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, MLP, angles, attend, norm, rotate, take

TAPS = 4   # tokens that the short convolution sees, and that the innovation compares: one and the three before it


@dataclass
class Config(gpt.Config):
    mix: str = "bmojo"           # the layers in turn: bmojo, ssm (a state space only), window (attention only)
    window: int = -1             # w, raw tokens that a token sees; -1: a quarter of a segment; 0: no past, plain GPT
    eidetic: int = -1            # M, tokens kept for good; -1: as many as the window
    state: int = -1              # N, channels by which a head's state is read and written; -1: as wide as the head
    fading: int = -1             # state-space outputs seen: the last n before a chunk; -1: the w before the window
    conv: bool = True            # a short convolution, which ties each token to the three before it
    rope: bool = True            # positions, counted within two windows; the paper has none
    select: str = "innovation"   # tokens that are kept: innovation, random, or those of an oracle, ids lo-hi

    past = property(lambda c: c.window if c.window >= 0 else     # raw tokens that are carried to the next segment
                    next(w for w in range(max(1, c.seg // 4), 0, -1) if c.seg % w == 0))
    w = property(lambda c: c.past or c.seg)
    N = property(lambda c: c.state if c.state > 0 else c.head_dim)
    M = property(lambda c: c.eidetic if c.eidetic >= 0 else c.past)

    def __post_init__(self):
        super().__post_init__()
        assert {*self.mix.split(",")} <= {"bmojo", "ssm", "window"}, f"mix is of bmojo, ssm and window, got {self.mix}"
        assert self.window >= -1 and self.seg % self.w == 0, f"window={self.window} does not cut {self.seg} tokens"
        assert self.window or self.fading == 0 or "bmojo" not in self.mix, \
            "fading outputs lie before a window: window=0 goes with fading=0, or with a mix without bmojo"
        assert -1 <= self.fading <= 2 * self.w, f"fading goes up to two windows, {2 * self.w}, got {self.fading}"
        assert self.eidetic >= -1 and self.state >= -1, f"eidetic={self.eidetic} and state={self.state} count"
        assert re.fullmatch(r"innovation|random|\d+-\d+", self.select), \
            f"select is innovation, random or ids lo-hi, got {self.select}"


# ----------------------------------------------------------------------------------------------------------------------
# The state space: h_t = exp(a_t) h_{t-1} + dt_t x_t (x) b_t and y_t = h_t c_t + skip x_t, with a decay a_t <= 0 and a
# step dt_t >= 0 for each head

def step(x, dt, a, b, c, skip, h):
    """One token: x (B, 1, H, D), dt and a (B, 1, H), b and c (B, 1, N), skip (H,), h (B, H, D, N) -> y (B, 1, H, D) and
    the next h."""
    h = a[:, 0, :, None, None].exp() * h + (dt[..., None] * x)[:, 0, :, :, None] * b[:, 0, None, None]
    return torch.einsum("bhdn,bn->bhd", h, c[:, 0])[:, None] + skip[:, None] * x, h


def scan(x, dt, a, b, c, skip, h, Q=64):
    """`step` for T tokens at once, in K chunks of Q tokens."""
    T, Q = x.size(1), min(Q, x.size(1))
    if T % Q:
        x, dt, a, b, c = (F.pad(v, (0, 0) * (v.ndim - 2) + (0, -T % Q)) for v in (x, dt, a, b, c))
    x, dt, a, b, c = (v.unflatten(1, (-1, Q)) for v in (x, dt, a, b, c))
    y, h = Scan.apply(*(v.movedim(3, 1) for v in (x, dt, a)), b[:, None], c[:, None], skip, h)
    return y.movedim(1, 3).flatten(1, 2)[:, :T], h


def decays(A, since):
    """exp of A_i - since_j for j <= i, else 0: what is left at i of what came at j. Both (..., n) -> (..., n, n)."""
    return (A[..., :, None] - since[..., None, :]).tril_().exp_().tril_()       # on a CPU exp(-inf) is slow


class Scan(torch.autograd.Function):
    """The chunks in matrix products only (Mamba-2 2405.21060, section 6): a masked attention inside of each, and the
    states before all of them from what each adds. x (B, H, K, Q, D), dt and a (B, H, K, Q), b and c (B, 1, K, Q, N),
    skip (H,), h (B, H, D, N) -> y (B, H, K, Q, D) and the last h. The gradient of the decays needs no (Q, Q): their sum
    A_i up to i stands in y_i as the factor exp(A_i), and in what x_i adds to any y or h as exp(-A_i), so that dA_i is
    y_i dy_i - x_i dx_i, in which the skip cancels."""

    @staticmethod
    def forward(ctx, x, dt, a, b, c, skip, h0):
        x, A = x.contiguous(), a.cumsum(-1)                                     # A (B, H, K, Q)
        into, out = (dt * (A[..., -1:] - A).exp())[..., None], A.exp()[..., None]
        write, read = into * b, out * c                                         # (B, H, K, Q, N)
        end = F.pad(A[..., -1], (1, 0)).cumsum(-1)
        left = decays(end, end)                                                 # (B, H, 1+K, 1+K)
        new = torch.cat([h0[:, :, None], x.mT @ write], 2).flatten(3)           # (B, H, 1+K, DN) that comes into h
        h, last = (part @ new for part in left.split([A.size(2), 1], 2))        # before each chunk, and at the end
        h, last = h.unflatten(3, (-1, b.size(-1))), last.view_as(h0)
        mask = decays(A, A - dt.log())                                          # (B, H, K, Q, Q)
        att = c @ b.mT * mask
        att.diagonal(dim1=-2, dim2=-1).add_(skip[:, None, None])
        y = att @ x
        y += read @ h.mT                                                        # from the chunk, and from the state
        ctx.save_for_backward(x, dt, b, c, skip, into, out, write, read, left, h, last, mask, att, y)
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        x, dt, b, c, skip, into, out, write, read, left, h, last, mask, att, y = ctx.saved_tensors
        dy = dy.contiguous()
        dh = torch.cat([dy.mT @ read, dlast[:, :, None]], 2).flatten(3)         # (B, H, K+1, DN)
        dh0, dnew = (part @ dh for part in left.mT.contiguous().split([1, h.size(2)], 2))
        dh0, dnew = dh0.view_as(last), dnew.view_as(h)
        dx = att.mT @ dy
        dx += write @ dnew.mT
        dcb = (dy @ x.mT).mul_(mask).sum(1, keepdim=True)                       # of c @ b.mT (B, 1, K, Q, Q)
        db = dcb.mT @ c + (x @ dnew).mul_(into).sum(1, keepdim=True)
        dc = dcb @ b + (dy @ h).mul_(out).sum(1, keepdim=True)
        ydy, xdx, xdy = (torch.linalg.vecdot(*v) for v in ((y, dy), (x, dx), (x, dy)))       # (B, H, K, Q)
        dA = ydy - xdx
        dA[:, :, -1, -1] += (last * dlast).sum((-2, -1))                        # the last h is read like a y
        da = dA.flatten(2).flip(2).cumsum(2).flip(2).view_as(dt)                # A_i, over all chunks, holds a up to i
        ddt = (xdx - skip[:, None, None] * xdy) / dt.clamp(min=torch.finfo(dt.dtype).tiny)
        return dx, ddt, da, db, dc, xdy.sum((0, 2, 3)), dh0


class SSM(nn.Module):
    """Mamba-2's block, on the heads of the attention: each forgets at a rate of its own, read from the token."""

    def __init__(self, c):
        super().__init__()
        self.c, C, H = c, c.width, c.heads
        self.inp = nn.Linear(C, 2 * C + 2 * c.N + H, bias=False)
        self.dt = nn.Parameter(torch.full((H,), math.log(math.expm1(0.1))))      # its softplus is 0.1
        self.A = nn.Parameter(torch.linspace(math.log(0.01), 0, H))              # half lives of 7 to 700 tokens
        self.skip = nn.Parameter(torch.ones(H))
        self.out = nn.Linear(C, C, bias=False)

    def forward(self, u, h):
        C, H, N = self.c.width, self.c.heads, self.c.N
        z, x, bc, dt = self.inp(u).split([C, C, 2 * N, H], -1)
        with torch.autocast(u.device.type, enabled=False):                       # decays want all their digits
            x, bc, dt = (v.type_as(self.A) for v in (x, bc, dt))
            x, (b, c) = x.unflatten(2, (H, -1)), norm(bc.unflatten(2, (2, N))).unbind(2)     # value, key and query
            dt = F.softplus(dt + self.dt)                                        # (B, T, H)
            y, h = (step if u.size(1) == 1 else scan)(x, dt, -dt * self.A.exp(), b, c, self.skip, h)
        return self.out(norm(y.flatten(2).type_as(z) * F.silu(z))), h


# ----------------------------------------------------------------------------------------------------------------------
# The attention: one softmax over raw, fading and eidetic tokens

class Here:
    """Where the T tokens of a call stand: P into the segment, n + P into the text; in whole chunks, or all in one."""

    def __init__(self, c, tokens, n, P):
        self.c, self.n, self.P, self.end, self.first, w = c, n, P, P + tokens.size(1), P - P % c.w, c.w
        self.at = torch.arange(P, self.end, device=n.device)                     # (T,)
        self.start = torch.arange(self.first, self.end, w, device=n.device)      # (G,) of each chunk
        self.G = len(self.start)
        self.j = self.at[-(len(self.at) // self.G):, None] - self.start[-1]      # (t, 1) in its chunk
        place = torch.arange(-2 * w, min(w, self.end - self.first), device=n.device)
        age = self.j - place                                                     # (t, up to 3w), of what stands there
        fades = (age >= w) & (age < 2 * w) if c.fading < 0 else (place >= -c.fading).expand_as(age)
        raw, faded = place[2 * w - c.past:], place[:2 * w if c.fading else 0]
        self.raw = self.seen(raw, ((age >= 0) & (age < w))[:, 2 * w - c.past:])
        self.faded = self.seen(faded, fades[:, :len(faded)])
        keys = torch.cat([raw, faded, raw.new_full((c.M,), -w)])                 # places of raw, faded, eidetic keys
        self.turn, self.turns = self.angles(self.j[:, 0]), self.angles(keys)     # what turns queries and keys
        self.bonus = 0                                                           # (B, T), only for ablations
        if c.select == "random":
            self.bonus = 1e6 * (((n[:, None] + self.at) * 12.9898).sin() * 43758.5453).frac().abs()
        elif c.select != "innovation":
            lo, hi = map(int, c.select.split("-"))
            self.bonus = 1e6 * ((tokens >= lo) & (tokens < hi))

    def angles(self, place):
        """What turns rows (B, m, H, D) that stand at places (m,) of their chunk; one for each head, which is faster."""
        return angles(place * self.c.rope, self.c.head_dim)[:, None].repeat(1, self.c.heads, 1, 1)

    def seen(self, place, mask):
        """Which tokens (B, G, t, m) see what stands at places (m,) of their chunk: those of the mask (t, m), unless the
        text begins later."""
        return mask & (self.start[:, None] + place >= -self.n[:, None, None])[:, :, None]

    def runs(self, first, mask):
        """What a mask looks at, as runs (first row, rows): those of a chunk end where those of the next begin."""
        m = mask.size(-1)
        size = m if self.G == 1 else self.c.w
        return [(first + i, size) for i in range(0, m, size)]


class Gather(torch.autograd.Function):
    """What each of G chunks sees of keys and values, rows of k and v (B, n, C): chunk g the run of `size` rows from
    first + g size on, for each (first, size) in `runs`, and rows i (B, G, M), if any -> two (B, G, m, C). The gradient
    adds run by run, in place; that of slices would fill a tensor for each of them, that of a lookup goes row by row."""

    @staticmethod
    def forward(ctx, k, v, runs, i, G):
        ctx.save_for_backward(i)
        ctx.runs, ctx.shape = runs, k.shape
        rows = [torch.arange(first, first + G * size, device=k.device).view(G, size) for first, size in runs]
        rows = torch.cat(rows, 1).expand(len(k), -1, -1)                        # (B, G, .)
        rows = rows if i is None else torch.cat([rows, i], 2)
        return take(k, rows), take(v, rows)

    @staticmethod
    def backward(ctx, *grads):
        (i,), (B, n, C), G, outs = ctx.saved_tensors, ctx.shape, grads[0].size(1), []
        for grad in grads:
            *parts, best = grad.split([size for _, size in ctx.runs] + [0 if i is None else i.size(2)], 2)
            out = grad.new_zeros(B, n, C, dtype=torch.promote_types(grad.dtype, torch.float32))
            for (first, size), part in zip(ctx.runs, parts):
                out[:, first:first + G * size].unflatten(1, (G, size)).add_(part)
            if i is not None:                              # index_add_ would be as fast, but number by number compiled
                at = i.flatten(1) + n * torch.arange(B, device=i.device)[:, None]
                out.flatten(0, 1).scatter_add_(0, at.view(-1, 1).expand(-1, C), best.flatten(0, 2).type_as(out))
            outs.append(out.type_as(grad))
        return *outs, None, None, None


class Attention(gpt.Attention):
    """A token sees raw tokens of age 0 to w, outputs of the state space of age w to 2w (or the last n before its chunk)
    and eidetic tokens of age w and more: the best when its chunk began, so that no chunk waits for another."""

    def __init__(self, c, kind):
        super().__init__(c)
        self.c = c
        self.M, self.fading = (c.M, c.fading) if kind == "bmojo" else (0, 0)

    def start(self, zeros):
        C, M, w = self.c.width, self.M, self.c.past
        rows = M + 3 * w if self.fading else M + w
        past = dict(k=zeros(rows, C), v=zeros(rows, C))
        if M:
            past.update(eps=zeros(M + w) - 1, at=zeros(M + w).long(), y=zeros(TAPS - 1, C))
        return past

    def surprise(self, y, past, here):
        """The innovation of each token (algorithm 1, eps_t): how far y_t is from the mean of the outputs before it."""
        y, T = torch.cat([past["y"], y.type_as(past["y"])], 1), y.size(1)                # (B, 3+T, C)
        gap = torch.sub(y[:, TAPS - 1:], y[:, :T], alpha=1 / (TAPS - 1))
        for i in range(1, TAPS - 1):
            gap.sub_(y[:, i:i + T], alpha=1 / (TAPS - 1))
        eps = gap.norm(dim=-1) + here.bonus                                              # (B, T)
        return dict(eps=torch.cat([past["eps"], eps], 1), at=torch.cat([past["at"], here.n[:, None] + here.at], 1),
                    y=y[:, T:])

    def best(self, eps, before):
        """M_t of algorithm 1: the M largest of the first before (G,) of eps (B, .), -1 if fewer came, and indices."""
        late = torch.arange(eps.size(1), device=eps.device) >= before[:, None]           # (G, .)
        return eps[:, None].masked_fill(late, -1).topk(self.M, -1)                       # (B, G, M) both

    def normed(self, x):
        """Queries, if any, keys and values side by side (B, T, nC) -> n tensors (B, T, C), with norm but the last."""
        *qk, v = x.split(self.c.width, -1)
        return [*(norm(x.unflatten(-1, (-1, self.c.head_dim))).flatten(2) for x in qk), v]

    def forward(self, u, y, past, here):
        """What the block reads, u, and what its state space makes of it, y, (B, T, C) both -> (B, T, C), o_t of
        algorithm 1, and the next past."""
        c, M, w, G, (B, T, C) = self.c, self.M, self.c.w, here.G, u.shape
        q, *kv = self.normed(self.qkv(u))
        faded = self.normed(F.linear(y, self.qkv.weight[C:])) if self.fading else [x[:, :0] for x in kv]
        n, now = M + c.past + here.P, {}                                                 # rows of tokens so far
        for name, new, out in zip("kv", kv, faded):
            old = past[name].type_as(new)
            now[name] = torch.cat([old[:, :n], new, old[:, n:], out], 1)                 # (B, M+w+P+T [+2w+P+T], C)
        runs, masks, i = here.runs(M + here.first, here.raw), [here.raw], None
        if self.fading:
            runs, masks = runs + here.runs(n + T + here.first, here.faded), masks + [here.faded]
        if M:
            now.update(self.surprise(y.detach(), past, here))
            eps, i = self.best(now["eps"], M + c.past + here.start)                      # (B, G, M)
            age = here.n[:, None, None] + here.start[:, None] - now["at"].gather(1, i.flatten(1)).view_as(i)
            masks += [age.where(eps >= 0, 0)[:, :, None] >= w - here.j]                  # far enough: (B, G, t, M)
        k, v = (x.view(B * G, -1, c.heads, c.head_dim) for x in Gather.apply(now["k"], now["v"], runs, i, G))
        k = rotate(k, here.turns[:k.size(1)])
        q = rotate(q.reshape(B * G, -1, c.heads, c.head_dim), here.turn)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        x = attend(q, k, v, torch.cat(masks, -1).flatten(0, 1)[:, None])                 # (BG, H, t, D)
        return self.out(x.transpose(1, 2).reshape(B, T, C)), now

    def close(self, past, P):
        """P tokens came: of all rows the M eidetic and the last w stay, and of the outputs the last 2w."""
        w, n, past = self.c.past, self.M + self.c.past + P, dict(past)
        rows = torch.arange(past["k"].size(1), device=past["k"].device)
        i = torch.cat([rows[n - w:n], rows[n:][-2 * w:]]).expand(len(past["k"]), -1)
        if self.M:
            eps, best = (x[:, 0] for x in self.best(past["eps"], rows.new_full((1,), n)))
            past.update(eps=F.pad(eps, (0, w), value=-1),
                        at=torch.cat([past["at"].gather(1, best), past["at"][:, n - w:]], 1))
            i = torch.cat([best, i], 1)
        return dict(past, k=take(past["k"], i), v=take(past["v"], i))


class Convolve(torch.autograd.Function):
    """Ties rows (B, 3+T, C) to the three before them, by taps (4, C) for each channel: x_t + sum_i taps_i x_{t-3+i},
    (B, T, C). As in `Gather` the gradient adds in place."""

    @staticmethod
    def forward(ctx, line, taps):
        ctx.save_for_backward(line, taps)
        x, T = line[:, TAPS - 1:], line.size(1) - TAPS + 1
        x = torch.addcmul(x, x, taps[-1])
        for i in range(TAPS - 1):
            x.addcmul_(line[:, i:i + T], taps[i])
        return x

    @staticmethod
    def backward(ctx, grad):
        line, taps = ctx.saved_tensors
        out, T = F.pad(grad, (0, 0, TAPS - 1, 0)), grad.size(1)
        for i, tap in enumerate(taps):
            out[:, i:i + T].addcmul_(grad, tap)
        return out, torch.stack([(grad * line[:, i:i + T]).sum(1).sum(0) for i in range(TAPS)])


class Layer(nn.Module):
    """A block of the size of GPT's: what the state space takes, the MLP gives."""

    def __init__(self, c, kind):
        super().__init__()
        self.c, self.taps = c, nn.Parameter(0.3 * torch.randn(TAPS, c.width)) if c.conv else None
        self.ssm = SSM(c) if kind != "window" else None
        self.attention = Attention(c, kind) if kind != "ssm" else None
        spare = (4 * c.width + 2 * c.inner) * c.width - sum(p.numel() for p in self.parameters())
        self.mlp = MLP(c, max(8, spare // (16 * c.width) * 8))
        self.apply(GPT.init)
        nn.init.normal_((self.attention or self.ssm).out.weight, std=(2 * c.layers * c.width) ** -0.5)

    def start(self, zeros):
        past = dict(u=zeros(TAPS - 1, self.c.width)) if self.c.conv else {}
        if self.ssm:
            past.update(h=zeros(self.c.heads, self.c.head_dim, self.c.N))
        return past | (self.attention.start(zeros) if self.attention else {})

    def forward(self, x, past, here):
        u, y, now = norm(x), None, {}
        if self.c.conv:
            line = torch.cat([past["u"].type_as(u), u], 1)                               # (B, 3+T, C)
            u, now["u"] = Convolve.apply(line, self.taps), line[:, u.size(1):]
        if self.ssm:
            y, now["h"] = self.ssm(u, past["h"])
        if self.attention:
            y, more = self.attention(u, y, past, here)
            now.update(more)
        x = x + y
        return x + self.mlp(norm(x)), now


class BMojo(GPT):
    """Layers in which attention sees three memories side by side: the last w tokens as they are, outputs of a state
    space that summarise what came before them, and M tokens from anywhere that the state space did not expect. Presets
    leave parts out: `bmojo_f` the eidetic tokens; `mamba` is state spaces only, `hybrid` has windows between them.

    state    n (B,) tokens read   and of each layer l, as far as it has them:
             l.u (B, 3, C) reach of the convolution   l.h (B, H, D, N) state space   l.y (B, 3, C) its last outputs
             l.k, l.v (B, M+w+2w, C) keys, with norm but not turned, and values: of M eidetic tokens, of the last w, and
             of the last 2w outputs   l.eps, l.at (B, M+w) innovation (-1: not eidetic) and place, of tokens
    read     one softmax over the raw tokens of age 0 to w, the outputs of age w to 2w, the eidetic tokens beyond w
    write    the M largest innovations of those kept and those of the segment: the running maximum of algorithm 1
    paper    B'MOJO 2407.06324, section 3 and algorithm 1; chunks as in appendix B.2; state space of Mamba-2 2405.21060
    departs  the paper takes Mamba-1 and leaves open which outputs fade, and how far back and in which norm innovation
             looks (here three tokens, Euclidean); RoPE within two windows (paper: none); no token is seen twice; one
             convolution before both parts, so that a kept token knows those before it; the state space has the norm of
             keys and queries on c and b, in place of SiLUs, and starts with longer steps, for short training
    """
    Config = Config
    parallel = math.inf

    def __init__(self, c):
        super().__init__(c)
        self.blocks = nn.ModuleList(Layer(c, kind) for kind in (c.mix.split(",") * c.layers)[:c.layers])

    def init_state(self, B):
        zeros = lambda *shape: self.head.weight.new_zeros(B, *shape, dtype=torch.float32)
        layers = {f"{l}.{k}": v for l, block in enumerate(self.blocks) for k, v in block.start(zeros).items()}
        return dict(layers, n=zeros().long())

    def read(self, state):
        layer = lambda l: {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{l}.")}
        return state["n"], 0, [layer(l) for l in range(self.c.layers)]

    def extend(self, tokens, cache):
        """The rest of an open chunk, then all whole chunks at once, then the beginning of another."""
        (n, P, pasts), T, w, out = cache, tokens.size(1), self.c.w, []
        rest = min(T, -P % w)
        for part in tokens.split([size for size in (rest, (T - rest) // w * w, (T - rest) % w) if size], 1):
            x, here, now = self.embed(part), Here(self.c, part, n, P), []
            for block, past in zip(self.blocks, pasts):
                x, past = block(x, past, here)
                now.append(past)
            P, pasts = here.end, now
            out.append(norm(x))
        return self.head(torch.cat(out, 1)), (n, P, pasts)

    def write(self, cache, state):
        n, P, pasts = cache
        pasts = [block.attention.close(past, P) if block.attention else past for block, past in zip(self.blocks, pasts)]
        now = {f"{l}.{k}": v for l, past in enumerate(pasts) for k, v in past.items()} | dict(n=n + P)
        return {k: now[k].to(v.dtype, copy=True, memory_format=torch.contiguous_format) for k, v in state.items()}
