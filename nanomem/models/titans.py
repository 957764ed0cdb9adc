"""Titans: the memory is a small network, and writing is training it, with one step of gradient descent for each token.

    w weights of the memory     s momentum     theta size of a step     eta part of s that stays     alpha forgetting

Mem(q) = w q, or w2 bend(q + w1 q). The lists w and s hold a matrix (B, H, D, D) for each layer of the memory.
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
        assert self.persist >= 0 and self.chunk > 0, f"persist >= 0 and chunk >= 1, got {self.persist} and {self.chunk}"


def bend(a):
    """SiLU, scaled so that a typical vector of length 1 keeps a length of about 0.6, with any number of channels."""
    return F.silu(a * a.size(-1) ** 0.5) / a.size(-1) ** 0.5


def gradients(w, k, v):
    """The gradient of |Mem(k) - v|^2 / 2 (half of eq. 12) with respect to the weights of each layer, for every token by
    itself. It is a product d x^T: x is the layer's input, d the gradient at its output. Returns (d, x) for each layer,
    (B, H, T, D) both."""
    if len(w) == 1:
        return [(k @ w[0].mT - v, k)]                                          # eq. 17
    h, back = torch.func.vjp(bend, k + k @ w[0].mT)
    d = h @ w[1].mT - v
    return [(*back(d @ w[1]), k), (d, h)]


def products(log):
    """Products of factors, given their logarithms (B, H, T): from token i+1 to token t, (B, H, T, T), 0 for i > t; and
    from the first token to t, (B, H, T, 1)."""
    total = log.cumsum(2)[..., None]
    return (total - total.mT).tril().exp().tril(), total.exp()                 # above the diagonal exp may overflow


def descend(w, s, q, grads, theta, log_eta, log_keep):
    """Gradient descent over a chunk of T tokens, without a loop. For a layer with gradients d x^T, keep = 1 - alpha:

        s_t = eta_t s_{t-1} - theta_t d_t x_t^T              (eq. 14)
        w_t = keep_t w_{t-1} + s_t                           (eq. 13)

    All gradients are taken at the weights with which the chunk began, so both equations are linear. With the products
    e_ti = eta_{i+1} ... eta_t and f_ti = keep_{i+1} ... keep_t,

        s_t = e_t0 s_0 - sum_i e_ti theta_i d_i x_i^T
        w_t = f_t0 w_0 + sum_j f_tj s_j = f_t0 w_0 + (f e)_t0 s_0 - sum_i (f e)_ti theta_i d_i x_i^T     (eq. 16, 18)

    So w_t times a vector is attention without a softmax. theta, log_eta and log_keep are (B, H, T).
    Returns Mem_t(q_t) (B, H, T, D), each token asking the weights that it leaves, and the last w and s."""
    (e, e0), (f, f0), theta = products(log_eta), products(log_keep), theta[:, :, None]
    fe0, fe, last_w, last_s = f @ e0, f @ e * theta, [], []                    # fe: (f e)_ti theta_i
    for layer, (w, s, (d, x)) in enumerate(zip(w, s, grads)):
        inputs = bend(q + y) if layer else q                                   # y: the output of the first layer
        y = f0 * (inputs @ w.mT) + fe0 * (inputs @ s.mT) - (fe * (inputs @ x.mT)) @ d
        last_w.append(f0[:, :, -1:] * w + fe0[:, :, -1:] * s - (fe[:, :, -1:].mT * d).mT @ x)
        last_s.append(e0[:, :, -1:] * s - ((e[:, :, -1:] * theta).mT * d).mT @ x)
    return y, last_w, last_s


class Memory(nn.Module):
    """A network for each head. Its weights w are 0 when a text begins; what is learned here is how to use it."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q, self.k, self.v = (nn.Linear(c.width, c.width, bias=False) for _ in range(3))
        self.rates = nn.Linear(c.width, 3 * c.heads, bias=False)
        self.bias = nn.Parameter(torch.tensor([0, 0, -6.0]).repeat_interleave(c.heads))  # theta, eta, alpha

    def ask(self, x, w):
        """The answers of a memory with weights w to tokens x (B, T, C), eq. 15 with a norm -> (B, T, C)."""
        with full_precision(x):
            q = F.normalize(split_heads(self.q(x), self.c.heads).type_as(w[0]), dim=-1)    # (B, H, T, D)
            y = bend(q + q @ w[0].mT) @ w[1].mT if len(w) == 2 else q @ w[0].mT
        return norm(merge_heads(y)).type_as(x)

    def write(self, x, P, memory):
        """Tokens x (B, T, C), behind P others of their segment -> norm(Mem_t(q_t)) (B, T, C) and the memory after
        them."""
        c, answers = self.c, []
        q, k, v = (split_heads(linear(x), c.heads) for linear in (self.q, self.k, self.v))
        line = torch.cat([memory["key"].type_as(k), k], 2)                     # with the key of the token before
        k = (with_previous(line) if c.shift else line)[:, :, 1:]
        cuts = tuple(range(c.chunk - P % c.chunk, x.size(1), c.chunk))         # here new chunks begin
        with full_precision(x):
            at, w, s = memory["at"], memory["w"], memory["s"]
            q, k, v = (F.normalize(z.type_as(w[0]), dim=-1) for z in (q, k, v))
            theta, eta, alpha = (self.rates(x) + self.bias).type_as(w[0]).mT.chunk(3, 1)     # (B, H, T)
            log_eta = F.logsigmoid(eta) if c.momentum else torch.full_like(eta, -1e4)     # eta = 0
            theta = theta.sigmoid() * (1 - log_eta.exp()) * min(1, 2 / c.chunk / c.depth)
            log_keep = F.logsigmoid(-alpha) * c.forget
            parts = zip(*(z.tensor_split(cuts, 2) for z in (q, k, v, theta, log_eta, log_keep)))
            for i, (q, k, v, *rates) in enumerate(parts):
                if i > 0 or P % c.chunk == 0:                                  # a chunk begins: its gradients are at w
                    at = w
                y, w, s = descend(w, s, q, gradients(at, k, v), *rates)
                answers.append(y)
        y = norm(merge_heads(torch.cat(answers, 2))).type_as(x)                # (B, T, C)
        return y, dict(memory, at=at, w=w, s=s, key=line[:, :, -1:])


class TitansAttention(gpt.Attention):
    """Attention to [persistent tokens ; the memory's answers (mac only) ; segment], whose output the memory gates."""

    def __init__(self, c):
        super().__init__(c)
        self.memory, self.scale = Memory(c), nn.Parameter(torch.ones(c.width))
        self.persist = nn.Parameter(torch.randn(1, c.persist, c.width))

    def forward(self, x, angles, past, mask=None):
        """`past`: keys and values of the segment, (B, H, P, D), keys and values of what is in front of it, memory."""
        c, (k, v, front_k, front_v, memory) = self.c, past
        P, T, mac = k.size(2), x.size(1), c.form == "mac"
        join = lambda old, new: torch.cat([old, new.type_as(old)], 2)
        q, (new_k, new_v) = self.queries(x, angles), self.keys_values(x, angles)         # (B, H, T, D)
        k, v = join(k, new_k), join(v, new_v)                                  # (B, H, P+T, D)
        if mac:                                                                # the answers stand where their tokens do
            said_k, said_v = self.keys_values(self.memory.ask(x, memory["before"]), angles)          # eq. 21
            front_k, front_v = join(front_k, said_k), join(front_v, said_v)
        keys = join(front_k, with_previous(k) if c.shift else k)               # eq. 22, 26
        values = join(front_v, v)
        causal = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
        mask = torch.cat([causal.new_ones(T, c.persist)] + [causal] * (1 + mac), 1)
        y = self.out(merge_heads(attend(q, keys.type_as(q), values.type_as(q), mask)))   # eq. 23, 27
        z = norm(x + y) if mac else x
        answers, after = self.memory.write(z, P, memory)                       # eq. 24; 28: M(x)
        m = self.memory.ask(z, memory["before"]) if mac else answers
        return y * 2 * (self.scale * m).sigmoid(), (k, v, front_k, front_v, after)       # eq. 25, 28


class Titans(GPT):
    """Each head of a layer has a small network, its memory. A token makes a key, a value and a query. While it reads,
    the memory is trained to answer keys with their values. Its answers to queries are what is remembered.

    state    w (B, L, depth, H, D, D) weights of the memories   s (the same) their momentum
    read     mac: attention sees the answers to all tokens so far, and another answer gates its output, both from the
             memory before the segment. mag: the answer of the memory as it is after token t gates attention
    write    eq. 13 and 14 at every token: from what attention made of it (mac), or from the layer's input (mag)
    paper    Titans 2501.00663: eq. 12-15 (memory), 16-18 (chunks), 19 (persistent tokens), 21-25 (mac), 26-28 (mag)
    departs  a memory for each head, of depth 1 (in the paper deeper ones do better); a deep one has a residual
             connection, or it would be dead once its weights have faded to 0; queries, keys and values have length 1,
             no SiLU, and theta = min(1, 2 / (Q depth)) (1 - eta) sigmoid(.), or Q equal tokens would overshoot; no
             convolutions: keys take half of their channels from the token before (0 at a segment's first), queries and
             values none; answers get a norm, and the gate is 2 sigmoid(scale m). Persistent tokens: in each layer, for
             attention only. w is 0 when a text begins. mac: no token sees the answer to a later one, or what its own
             segment wrote (eq. 25: it does); an answer stands where its token does (paper: before the segment); it
             writes from input + output of attention. mag: attention to the segment only (paper: sliding), without a
             norm before the gate. The third form, memory as a layer (eq. 29-31), is left out
    """
    Config, Attention = Config, property(lambda self: TitansAttention if self.c.depth else gpt.Attention)

    def init_state(self, B):
        c = self.c
        if not c.depth:
            return {}
        w = torch.zeros(B, c.layers, c.depth, c.heads, c.head_dim, c.head_dim, device=self.head.weight.device)
        return dict(w=w, s=w.clone()) if c.momentum else dict(w=w)

    def read(self, state):
        """For each layer: no keys and values yet; those of the persistent tokens, before position 0; and the memory: w
        and s, `at`: w when the chunk began, `before`: w when the segment began, `key` of the last token."""
        if not state:
            return None
        layers, w, s = [], state["w"], state.get("s", torch.zeros_like(state["w"]))
        positions = rope(torch.arange(-self.c.persist, 0, device=w.device), self.c.head_dim)
        for block, w, s in zip(self.blocks, w.unbind(1), s.unbind(1)):
            w, s, persist = w.unbind(1), s.unbind(1), norm(block.attention.persist).expand(len(w), -1, -1)
            memory = dict(w=w, s=s, at=w, before=w, key=torch.zeros_like(w[0][:, :, :1]))
            none, front = w[0][:, :, :0], block.attention.keys_values(persist, positions)
            layers.append((none, none, *front, memory))
        return layers

    def write(self, cache, state):
        return {name: torch.stack([torch.stack(layer[-1][name], 1) for layer in cache], 1) for name in state}
