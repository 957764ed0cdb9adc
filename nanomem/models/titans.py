"""Titans: the memory is a small network, and writing is training it, with one step of gradient descent for each token.

    w weights of the memory     s momentum     theta size of a step     eta part of s that stays     alpha forgetting
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, attend, full_precision, merge_heads, norm, rope, split_heads, with_previous


@dataclass
class Config(gpt.Config):
    form: str = "mac"      # how attention and memory work together: mac (memory as context) or mag (memory as a gate)
    depth: int = 1         # layers of the memory: 1 is a matrix, 2 an MLP; 0 is GPT, without memory
    persist: int = 4       # N_p, learned tokens in front of every segment
    chunk: int = 16        # Q, tokens whose gradients are taken at the same weights
    momentum: bool = True  # a step goes on in the direction of the steps before
    forget: bool = True    # what was written fades

    def __post_init__(self):
        super().__post_init__()
        assert self.form in ("mac", "mag"), f"form is mac or mag, got {self.form}"
        assert self.depth in (0, 1, 2), f"depth is 0, 1 or 2, got {self.depth}"
        assert self.persist >= 0 < self.chunk, f"persist and chunk count tokens, got {self.persist} and {self.chunk}"

    @property
    def hidden(self):
        """An MLP gives up what the memory needs, so that a layer has as many parameters as a layer of GPT."""
        C, full = self.width, self.mlp if self.mlp > 0 else 4 * self.width
        memory = 3 * C * C + 3 * self.heads * (C + 1) + (self.persist + 1) * C
        return max(8, (2 * C * full - memory) // (16 * C) * 8) if self.depth else full


# ---- The memory in a chunk of T tokens. w and s hold a matrix (B, H, D, D) for each of its layers, the first one first

def bend(a):
    """Between two layers: SiLU, scaled for vectors of length 1, as keys and queries are."""
    scale = a.size(-1) ** 0.5
    return F.silu(scale * a) / scale


def ask(w, q):
    """Mem(q) of queries (B, H, T, D), eq. 15: w q, or for a deep memory w2 bend(q + w1 q)."""
    if len(w) == 2:
        q = bend(q + q @ w[0].mT)
    return q @ w[-1].mT


def gradients(w, k, v):
    """The gradient of |Mem(k) - v|^2 / 2 (eq. 12) by the weights of each layer, for every token by itself. It is a
    product d x^T of the layer's input x and of the gradient d at its output; both are returned, (B, H, T, D)."""
    if len(w) == 1:
        return [(k @ w[0].mT - v, k)]                                          # eq. 17
    a = k + k @ w[0].mT
    h, on = bend(a), (a.size(-1) ** 0.5 * a).sigmoid()
    error, slope = h @ w[1].mT - v, on + h * a.size(-1) ** 0.5 * (1 - on)      # slope: the derivative of bend
    return [(error @ w[1] * slope, k), (error, h)]


def products(log):
    """Products of factors, given their logarithms (B, H, T): from token i+1 to token t, (B, H, T, T), 0 for i > t; and
    from the first token to t, (B, H, T, 1)."""
    total = log.cumsum(2)[..., None]
    return (total - total.mT).tril().exp().tril(), total.exp()


def unroll(theta, eta, keep):
    """Gradient descent over a chunk, without a loop. For a layer with gradients d x^T, and keep = 1 - alpha:

        s_t = eta_t s_{t-1} - theta_t d_t x_t^T              (eq. 14)
        w_t = keep_t w_{t-1} + s_t                           (eq. 13)

    All gradients are taken at the weights with which the chunk began. So they are known, and both equations are linear.
    With the products e_ti = eta_{i+1} ... eta_t and f_ti = keep_{i+1} ... keep_t,

        s_t = e_t0 s_0 - sum_i e_ti theta_i d_i x_i^T
        w_t = f_t0 w_0 + sum_j f_tj s_j = f_t0 w_0 + (f e)_t0 s_0 - sum_i (f e)_ti theta_i d_i x_i^T     (eq. 16, 18)

    From theta and the logarithms of eta and keep, (B, H, T) each, make the factors of w_0, s_0 and d_i x_i^T in w_t,
    and the factors of s_0 and d_i x_i^T in s_t, for the last token only."""
    (e, e0), (f, f0), theta = products(eta), products(keep), theta[:, :, None]
    return (f0, f @ e0, f @ e * theta), (e0[:, :, -1:], e[:, :, -1:] * theta)


def ask_along(w, s, grads, q, in_w):
    """Mem_t(q_t), each token with the weights that it leaves: w_t times a vector is attention without a softmax."""
    f0, fe0, fe = in_w
    for w, s, (d, x) in zip(w, s, grads):
        inputs = q
        q = f0 * (q @ w.mT) + fe0 * (q @ s.mT) - (fe * (q @ x.mT)) @ d         # (B, H, T, D)
        if len(grads) == 2 and x is grads[0][1]:
            q = bend(inputs + q)
    return q


def advance(w, s, grads, in_w, in_s):
    """w and s after the chunk."""
    f0, fe0, fe = (factor[:, :, -1:] for factor in in_w)
    e0, e = in_s
    return ([f0 * w + fe0 * s - (fe.mT * d).mT @ x for w, s, (d, x) in zip(w, s, grads)],
            [e0 * s - (e.mT * d).mT @ x for s, (d, x) in zip(s, grads)])


class Memory(nn.Module):
    """A network for each head. Its weights are 0 at first."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q, self.k, self.v = (nn.Linear(c.width, c.width, bias=False) for _ in range(3))
        self.rates = nn.Linear(c.width, 3 * c.heads, bias=False)
        self.bias = nn.Parameter(torch.tensor([0, 0, -6.0]).repeat_interleave(c.heads))  # of theta, eta and alpha

    def queries(self, x):
        return norm(split_heads(self.q(x), self.c.heads)) * self.c.head_dim ** -0.5      # (B, H, T, D) of length 1

    def ask(self, x, w):
        """Tokens x (B, T, C) -> what a memory with weights w says, (B, T, C)."""
        with full_precision(x):
            return norm(merge_heads(ask(w, self.queries(x).type_as(w[0])))).type_as(x)

    def forward(self, x, P, memory):
        """Write tokens x (B, T, C), which stand behind P others of their segment -> answers (B, T, C), memory."""
        c, q, ys = self.c, self.queries(x), []
        k, v = (split_heads(linear(x), c.heads) for linear in (self.k, self.v))
        line = torch.cat([memory["key"].type_as(k), k], 2)                     # with the key of the token before
        k = norm((with_previous(line) if c.shift else line)[:, :, 1:]) * c.head_dim ** -0.5
        rates = self.rates(x)
        sizes = [min(c.chunk - P % c.chunk, x.size(1))]                        # first what the open chunk lacks
        while sum(sizes) < x.size(1):
            sizes.append(min(c.chunk, x.size(1) - sum(sizes)))
        with full_precision(x):
            at, w, s = memory["at"], memory["w"], memory["s"]
            q, k, v, rates = (z.type_as(w[0]) for z in (q, k, v, rates))
            theta, eta, alpha = (rates + self.bias.type_as(rates)).mT.chunk(3, 1)        # (B, H, T)
            eta = F.logsigmoid(eta) if c.momentum else torch.full_like(eta, -1e4)        # exp(-1e4) is 0
            keep = F.logsigmoid(-alpha) * c.forget
            theta = theta.sigmoid() * (1 - eta.exp()) * min(1, 2 / c.chunk)
            for q, k, v, *rates in zip(*(z.split(sizes, 2) for z in (q, k, v, theta, eta, keep))):
                at = w if P % c.chunk == 0 else at                             # a chunk begins
                grads, (in_w, in_s) = gradients(at, k, v), unroll(*rates)
                if c.form == "mag":
                    ys.append(ask_along(w, s, grads, q, in_w))
                w, s = advance(w, s, grads, in_w, in_s)
                P = P + k.size(2)
        y = norm(merge_heads(torch.cat(ys, 2))).type_as(x) if ys else self.ask(x, memory["before"])
        return y, dict(memory, at=at, w=w, s=s, key=line[:, :, -1:])


class TitansAttention(gpt.Attention):
    """Attention to [persistent tokens ; the memory's answers ; the segment], whose output the memory gates."""

    def __init__(self, c):
        super().__init__(c)
        if c.depth:
            self.persist = nn.Parameter(torch.randn(1, c.persist, c.width))
            self.memory, self.scale = Memory(c), nn.Parameter(torch.ones(c.width))

    def forward(self, x, angles, past=None, mask=None):
        """`past`: keys and values of the segment, (B, H, P, D), keys and values of what is in front of it, memory."""
        if past is None:                                                       # no memory
            return super().forward(x, angles)
        (k, v, *front, memory), c = past, self.c
        P, T, mac = k.size(2), x.size(1), c.form == "mac"
        longer = lambda old, new: [torch.cat([a, b.type_as(a)], 2) for a, b in zip(old, new)]
        q, (k, v) = self.queries(x, angles), longer((k, v), self.keys_values(x, angles))
        if mac:
            front = longer(front, self.keys_values(self.memory.ask(x, memory["before"]), angles))    # eq. 21
        keys, values = longer(front, (with_previous(k) if c.shift else k, v))  # eq. 22, 26
        causal = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
        mask = torch.cat([causal.new_ones(T, c.persist)] + [causal] * (1 + mac), 1)
        y = self.out(merge_heads(attend(q, keys.type_as(q), values.type_as(q), mask)))   # eq. 23, 27
        m, memory = self.memory(norm(x + y) if mac else x, P, memory)          # eq. 24
        return y * 2 * (self.scale * m).sigmoid(), (k, v, *front, memory)      # eq. 25, 28


class Titans(GPT):
    """Each head of a layer has a small network, its memory. A token makes a key, a value and a query. While it reads,
    the memory is trained to answer keys with their values. Its answers to queries are what is remembered.

    state    of each layer l, for each layer n of its memory:   l.wn (B, H, D, D) weights   l.sn their momentum
    read     mac: attention sees answers to all tokens so far, of the memory as it was before the segment; an answer to
             what it makes of them gates it. mag: the answer of the memory as it is after token t gates attention
    write    eq. 13 and 14, at every token: what attention made of it (mac), or the layer's input (mag)
    paper    Titans 2501.00663: eq. 12-15 (memory), 16-18 (chunks), 19 (persistent tokens), 21-25 (mac), 26-28 (mag)
    departs  (other implementations differ in these points too) a memory for each head; a deep one has a residual
             connection around its first layer, or it would be dead when all has faded; theta is 2/Q (1 - eta) times a
             sigmoid, because Q equal tokens would overshoot with more; keys take half of their channels from the token
             before (convolutions); no SiLU on q, k, v. mac: no token sees the answer to a later one, and the gate asks
             the memory from before the segment (eq. 25: after it). mag: attention sees its segment only (a sliding
             window). The gate is 2 sigmoid(scale norm(m)). Persistent tokens are for attention only, in each layer
    """
    Config, Attention = Config, TitansAttention

    def init_state(self, B):
        c, like = self.c, self.head.weight
        return {f"{l}.{name}{n}": like.new_zeros(B, c.heads, c.head_dim, c.head_dim, dtype=torch.float32)
                for l in range(c.layers) for name in ("w", "s")[:1 + c.momentum] for n in range(c.depth)}

    def read(self, state):
        """For each layer: no keys and values of the segment yet, those of the persistent tokens, before position 0, and
        the memory: w, s, w when the chunk and when the segment began (at, before), the key of the last token."""
        c, layers = self.c, []
        positions = torch.arange(-c.persist, 0, device=self.head.weight.device)
        for l, block in enumerate(self.blocks if state else []):
            w = [state[f"{l}.w{n}"] for n in range(c.depth)]
            s = [state[f"{l}.s{n}"] if c.momentum else torch.zeros_like(w[n]) for n in range(c.depth)]
            memory = dict(w=w, s=s, at=w, before=w, key=torch.zeros_like(w[0][:, :, :1]))
            persist = norm(block.attention.persist).expand(len(w[0]), -1, -1)
            kv = block.attention.keys_values(persist, rope(positions, c.head_dim))
            layers.append((*[w[0][:, :, :0]] * 2, *kv, memory))
        return layers or None

    def write(self, cache, state):
        return {key: cache[int(key.split(".")[0])][-1][key[-2]][int(key[-1])].to(v.dtype, copy=True) for key, v in state.items()}
