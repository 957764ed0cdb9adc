"""Titans: the memory is a small network, and writing is training it, one step of gradient descent for each token."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, attend, full_precision, merge_heads, norm, rope, split_heads, with_previous

RATES = (-2.0, 0.0, -6.0)   # theta, eta and alpha begin at the sigmoid of these: steps, momentum, forgetting


@dataclass
class Config(gpt.Config):
    form: str = "mac"      # how the memory is attached: mac (as context) or mag (as a gate)
    depth: int = 1         # layers of the memory: 1 is a matrix, 2 an MLP; 0 is GPT
    persist: int = 4       # N_p, learned tokens in front of every segment
    chunk: int = 16        # Q, tokens whose gradients are taken at the same weights
    momentum: bool = True  # steps go on in the direction of those before
    forget: bool = True    # weights fade

    def __post_init__(self):
        super().__post_init__()
        assert self.form in ("mac", "mag"), f"form is mac or mag, got {self.form}"
        assert self.depth in (0, 1, 2), f"depth is 0, 1 or 2, got {self.depth}"
        assert self.chunk > 0, f"chunk must be positive, got {self.chunk}"
        assert self.persist >= 0, f"persist counts tokens, got {self.persist}"

    @property
    def hidden(self):
        """An MLP is narrower, so that a layer has as many parameters as a layer of GPT."""
        C, H = self.width, self.heads
        own = (self.persist + 1) * C + 3 * C * C + 3 * H * (C + 1) + self.depth * C * C // H
        full = self.mlp if self.mlp > 0 else 4 * C
        return max(8, (2 * C * full - own) // (16 * C) * 8) if self.depth else full


# ---- the memory in a chunk of T tokens. w and s: for each of its layers the weights and the momentum, (B, H, D, D)

def bend(a):
    """The hidden layer of a deep memory. The factor makes it about as long as a key, which has length 1."""
    return F.silu(a) * a.size(-1) ** -0.5


def gradients(w, k, v):
    """The gradient of l = |Mem(k) - v|^2 / 2 (eq. 12) for keys and values (B, H, T, D). For the weights of one layer
    and one token it is a product d x^T: x is the input of the layer, d = dl/da what comes back to its output
    a = w x. Returns d and x for each layer, (B, H, T, D) each; no matrix is made for each token."""
    if len(w) == 1:
        return [(k @ w[0].mT - v, k)]                                          # eq. 17
    a = k @ w[0].mT
    on = a.sigmoid()
    h, slope = bend(a), (on + a * on * (1 - on)) * a.size(-1) ** -0.5          # the slope is the derivative of bend
    error = h @ w[1].mT - v
    return [((error @ w[1]) * slope, k), (error, h)]


def ask(w, q):
    """Mem(q) for queries (B, H, T, D), with fixed weights (eq. 15)."""
    y = q @ w[0].mT
    return y if len(w) == 1 else bend(y) @ w[1].mT


def fade(log):
    """Products of factors that are given by their logarithms (B, H, T): from token i+1 to token t, (B, H, T, T) with 0
    for i > t, and from the first to t, (B, H, T, 1)."""
    total = log.cumsum(2)[..., None]
    return (total - total.mT).tril().exp().tril(), total.exp()


def unroll(theta, eta, keep):
    """A chunk of T steps of gradient descent. For the weights w of each layer, with gradients d x^T,

        s_t = eta_t s_{t-1} - theta_t d_t x_t^T              (eq. 14)
        w_t = keep_t w_{t-1} + s_t                           (eq. 13, keep = 1 - alpha)

    All gradients are taken at the same weights, so both recurrences are linear. With the products
    e_ti = eta_{i+1} .. eta_t and f_ti = keep_{i+1} .. keep_t they are sums over the tokens i <= t:

        s_t = e_t0 s_0 - sum_i e_ti theta_i d_i x_i^T
        w_t = f_t0 w_0 + sum_j f_tj s_j = f_t0 w_0 + (f e)_t0 s_0 - sum_i (f e)_ti theta_i d_i x_i^T    (eq. 16, 18)

    theta and the logarithms of eta and keep (B, H, T) -> what stands at w_0 and s_0, (B, H, T, 1) each, and at the
    gradients, (B, H, T, T): for w_t, then for s_t of the last token only."""
    (e, e0), (f, f0), theta = fade(eta), fade(keep), theta[:, :, None]
    return (f0, f @ e0, f @ e * theta), (e0[:, :, -1:], e[:, :, -1:] * theta)


def ask_along(q, w, s, grads, f0, fe0, fe):
    """y_t = Mem_t(q_t) (eq. 15), q (B, H, T, D): w_t times a vector is attention without a softmax."""
    for n, (w, s, (d, x)) in enumerate(zip(w, s, grads)):
        q = bend(q) if n else q
        q = f0 * (q @ w.mT) + fe0 * (q @ s.mT) - (fe * (q @ x.mT)) @ d         # (B, H, T, D)
    return q


def advance(w, s, grads, of_w, of_s):
    """Weights and momentum after the chunk."""
    f0, fe0, fe = (x[:, :, -1:] for x in of_w)
    e0, e = of_s
    return ([f0 * w + fe0 * s - (fe.mT * d).mT @ x for w, s, (d, x) in zip(w, s, grads)],
            [e0 * s - (e.mT * d).mT @ x for s, (d, x) in zip(s, grads)])


class Memory(nn.Module):
    """One network for each head of a layer."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q, self.k, self.v = (nn.Linear(c.width, c.width, bias=False) for _ in range(3))
        self.rates = nn.Linear(c.width, 3 * c.heads, bias=False)
        self.bias = nn.Parameter(torch.tensor(RATES).repeat_interleave(c.heads))
        matrix = (c.heads, c.head_dim, c.head_dim)                             # an empty memory says 0
        self.start = nn.ParameterList([torch.randn(matrix)] * (c.depth - 1) + [torch.zeros(matrix)])

    def queries(self, x):
        return norm(split_heads(self.q(x), self.c.heads)) * self.c.head_dim ** -0.5    # of length 1

    def ask(self, x, w):
        """Mem(q) for tokens x (B, T, C) with fixed weights -> (B, T, C)."""
        with full_precision(x):
            y = ask(w, self.queries(x).type_as(w[0]))
        return norm(merge_heads(y)).type_as(x)

    def forward(self, x, P, memory):
        """Write x (B, T, C), the tokens after the first P of the segment -> Mem_t(q_t) (B, T, C) and the memory."""
        c, memory = self.c, dict(memory)
        k, v = (split_heads(linear(x), c.heads) for linear in (self.k, self.v))
        line = torch.cat([memory["key"].type_as(k), k], 2)                     # the key before is the first
        memory["key"] = line[:, :, -1:]
        k = norm((with_previous(line) if c.shift else line)[:, :, 1:]) * c.head_dim ** -0.5
        xs, rates, ys = [self.queries(x), k, v], self.rates(x), []
        sizes = [min(c.chunk - P % c.chunk, x.size(1))]                        # what is left of the open chunk
        while sum(sizes) < x.size(1):
            sizes.append(min(c.chunk, x.size(1) - sum(sizes)))
        with full_precision(x):
            w, s, at = memory["w"], memory["s"], memory["at"]
            theta, eta, alpha = (rates.type_as(w[0]) + self.bias).mT.chunk(3, 1)       # (B, H, T)
            eta = F.logsigmoid(eta) if c.momentum else torch.full_like(eta, -1e4)      # exp(-1e4) is 0
            xs = [z.type_as(w[0]) for z in xs] + [theta.sigmoid(), eta, F.logsigmoid(-alpha) * c.forget]
            for q, k, v, *rates in zip(*(z.split(sizes, 2) for z in xs)):
                at = w if P % c.chunk == 0 else at
                grads, (of_w, of_s) = gradients(at, k, v), unroll(*rates)
                ys.append(ask_along(q, w, s, grads, *of_w))
                w, s = advance(w, s, grads, of_w, of_s)
                P = P + q.size(2)
        memory.update(w=w, s=s, at=at)
        return norm(merge_heads(torch.cat(ys, 2))).type_as(x), memory


class TitansAttention(gpt.Attention):
    """Attention with persistent tokens and a memory."""

    def __init__(self, c):
        super().__init__(c)
        if c.depth:
            self.persist = nn.Parameter(torch.randn(1, c.persist, c.width))
            self.memory = Memory(c)
            self.scale = nn.Parameter(torch.ones(c.width))

    def forward(self, x, angles, past=None, mask=None):
        """`past`: keys and values of the segment so far, (B, H, P, D), of what stands in front of it, and the memory."""
        if past is None:                                                       # no memory
            return super().forward(x, angles)
        (k, v, *front, memory), c = past, self.c
        context, P, T = c.form == "mac", k.size(2), x.size(1)
        longer = lambda old, new: [torch.cat([a, b.type_as(a)], 2) for a, b in zip(old, new)]
        q, (k, v) = self.queries(x, angles), longer((k, v), self.keys_values(x, angles))
        if context:
            h = self.memory.ask(x, memory["start"])                            # eq. 21
            front = longer(front, self.keys_values(h, angles))
        causal = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
        mask = torch.cat([causal.new_ones(T, c.persist)] + [causal] * (1 + context), 1)
        keys, values = longer(front, (with_previous(k) if c.shift else k, v))  # eq. 22, 26
        y = self.out(merge_heads(attend(q, keys.type_as(q), values.type_as(q), mask)))     # eq. 23, 27
        if context:
            z = norm(x + y)
            m, (_, memory) = self.memory.ask(z, memory["start"]), self.memory(z, P, memory)    # eq. 24
        else:
            m, memory = self.memory(x, P, memory)
        y = y * 2 * (self.scale * m).sigmoid()                                 # eq. 25, 28
        return y, (k, v, *front, memory)


class Titans(GPT):
    """Every head has a small network, its memory. Each token makes a key and a value of itself, and one step of gradient
    descent on |Mem(k) - v|^2 writes them into the network's weights.

    state    of each layer l and each layer n of its memory:   l.wn (B, H, D, D) weights   l.sn (B, H, D, D) momentum
    read     mac: y_t
    write    w
    paper    Titans 2501.00663
    departs  here
    """
    Config, Attention = Config, TitansAttention

    def init_state(self, B):
        start = {f"{l}.w{n}": w.expand(B, -1, -1, -1).clone() for l, block in enumerate(self.blocks) if self.c.depth
                 for n, w in enumerate(block.attention.memory.start)}
        return start | {k.replace("w", "s"): torch.zeros_like(w) for k, w in start.items() if self.c.momentum}

    def read(self, state):
        """For every layer: empty keys and values of the segment, keys and values of the persistent tokens, at the
        positions before 0, and the memory: its weights now, when the chunk began and when the segment began (w, at,
        start), its momentum s and the key of the token before."""
        c, layers = self.c, []
        before = rope(torch.arange(-c.persist, 0, device=self.head.weight.device), c.head_dim)
        for l, block in enumerate(self.blocks if state else []):
            w = [state[f"{l}.w{n}"] for n in range(c.depth)]
            s = [state[f"{l}.s{n}"] for n in range(c.depth)] if c.momentum else [torch.zeros_like(x) for x in w]
            persist = norm(block.attention.persist).expand(len(w[0]), -1, -1)
            empty = w[0][:, :, :0]                                             # (B, H, 0, D)
            memory = dict(w=w, s=s, at=w, start=w, key=w[0].new_zeros(w[0].shape)[:, :, :1])
            layers.append((empty, empty, *block.attention.keys_values(persist, before), memory))
        return layers or None

    def write(self, cache, state):
        now = {f"{l}.{name}{n}": x for l, layer in enumerate(cache if state else [])
               for name in ("w", "s") for n, x in enumerate(layer[4][name])}
        return {k: now[k].to(v.dtype, copy=True, memory_format=torch.contiguous_format) for k, v in state.items()}
