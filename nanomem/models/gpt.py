"""One tiny GPT: the notation, the building blocks of every model, and the model that remembers nothing.

    B batch         T tokens in this call     P positions already in the cache     S tokens in a segment (c.seg)
    C width         H heads                   D head width                         L layers
    V vocabulary    M memory slots            W tokens in an attention window      K segments in a BPTT window
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Config:
    vocab: int = 4097   # V, tokens in the vocabulary
    layers: int = 4     # L, blocks
    heads: int = 4      # H, attention heads; a key has two halves, each of pairs of channels: D is a multiple of 4
    width: int = 128    # C, channels of the residual stream
    seg: int = 128      # S, tokens in a segment
    mlp: int = -1       # hidden channels of an MLP; -1: four times the width
    shift: bool = True  # keys take half of their channels from the token before

    head_dim = property(lambda c: c.width // c.heads)                   # D
    hidden = property(lambda c: c.mlp if c.mlp > 0 else 4 * c.width)

    def __post_init__(self):
        for name in ("vocab", "layers", "heads", "width", "seg"):
            assert getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}"
        assert self.width % (4 * self.heads) == 0, \
            f"width {self.width} does not split into {self.heads} heads whose width is a multiple of 4"


def norm(x):
    """RMSNorm without weights: the linear map that follows can learn them."""
    return F.rms_norm(x, x.shape[-1:])


def full_precision(x):
    """A context in which autocast is off on the device of x: for values that bfloat16 would round away."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def rope(positions, D):
    """RoPE (2104.09864, eq. 15): cosine and sine of the angles for positions (T,), each (T, D/2), float32."""
    frequency = 10_000 ** (-torch.arange(0, D, 2, device=positions.device) / D)
    angle = positions.float()[:, None] * frequency                             # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Rotate each pair of channels (2i, 2i+1) of x (..., T, D) by the angle of its position (RoPE, eq. 34).
    Rotations add up: to move a key from position p to p + n, rotate it by the angles of position n."""
    cos, sin = angles
    a, b = x[..., 0::2], x[..., 1::2]                                          # (..., T, D/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def split_heads(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)                         # (B, T, C) -> (B, H, T, D)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)                                        # (B, H, T, D) -> (B, T, C)


def with_previous(k):
    """Keys (B, H, P, D) that know the token before: half of their channels, those that rotate slowly, are taken from
    the key one position earlier. So one layer can find "what followed the last time", which needs two layers
    otherwise."""
    own, slow = k.chunk(2, -1)
    return torch.cat([own, F.pad(slow, (0, 0, 1, 0))[..., :-1, :]], -1)        # zeros before the first position


def attend(q, k, v, mask=None):
    """Fused attention of queries q (B, H, T, D), the last T of P + T positions, to k and v (B, H, P+T, D).

    Causal, unless a `mask` (bool, True: may look) says otherwise. The kernel's own is_causal aligns the queries with
    the first keys, so it is right only when P = 0; a single query may look at everything.
    """
    T, P = q.size(2), k.size(2) - q.size(2)
    if mask is None and P > 0 and T > 1:
        mask = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and P == 0)


class Attention(nn.Module):
    """Self-attention with RoPE and QK-norm. Normed queries and keys have scores of about sqrt(D) at most, too little to
    pick one position of many; a learned gain for each head lifts that limit. `past` holds the rotated keys and the
    values of earlier positions."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q, self.k, self.v, self.out = (nn.Linear(c.width, c.width, bias=False) for _ in range(4))
        self.gain = nn.Parameter(torch.full((c.heads, 1, 1), 2.0))

    def queries(self, x, angles):
        q = split_heads(self.q(x), self.c.heads)
        return (rotate(norm(q), angles) * self.gain).type_as(q)                # (B, H, T, D)

    def keys_values(self, x, angles):
        k, v = (split_heads(linear(x), self.c.heads) for linear in (self.k, self.v))
        return rotate(norm(k), angles).type_as(v), v                           # (B, H, T, D) both

    def attend(self, q, k, v, mask):
        return attend(q, k, v, mask)

    def forward(self, x, angles, past=None, mask=None):
        q, (k, v) = self.queries(x, angles), self.keys_values(x, angles)
        if past is not None:                                                   # in the type in which they are kept
            k, v = (torch.cat([old, new.type_as(old)], 2) for old, new in zip(past, (k, v)))   # (B, H, P+T, D)
        keys = with_previous(k) if self.c.shift else k
        y = self.attend(q, keys.type_as(q), v.type_as(q), mask)                # (B, H, T, D)
        return self.out(merge_heads(y)), (k, v)                                # (B, T, C)


class MLP(nn.Module):
    """Two maps with a squared ReLU in between."""

    def __init__(self, c, hidden=0):
        super().__init__()
        hidden = hidden or c.hidden
        self.up = nn.Linear(c.width, hidden, bias=False)
        self.out = nn.Linear(hidden, c.width, bias=False)

    def forward(self, x):
        h = self.up(x)
        return self.out(h * F.relu(h))


class Block(nn.Module):
    def __init__(self, c, attention=Attention):
        super().__init__()
        self.attention = attention(c)
        self.mlp = MLP(c)

    def forward(self, x, angles, past=None, mask=None):
        y, kv = self.attention(norm(x), angles, past, mask)
        x = x + y
        return x + self.mlp(norm(x)), kv


class GPT(nn.Module):
    """A GPT that sees one segment at a time and remembers nothing: the baseline under every other model.

    state    {} (empty)
    read     nothing
    write    nothing
    paper    GPT-2 (Radford et al. 2019), with the modern parts of the nanoGPT speed runs
    departs  RoPE, RMSNorm and QK-norm without weights, a gain for each head, keys that know the token before, squared
             ReLU, embeddings with a norm, no biases, untied head, MLPs that start at zero
    """
    Config, Attention = Config, Attention   # another model puts its own here
    parallel = 1                            # segments that one call may take: many where none waits for a write

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c, self.Attention) for _ in range(c.layers))
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        self.apply(self.init)

    @staticmethod
    def init(module):
        """All initial weights. Linear maps keep the scale of their input. An MLP adds nothing at first. Attention
        starts with GPT-2's 1/sqrt(2 L), not at zero: memory is read through it, and a zero would stop the gradient."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        if isinstance(module, MLP):
            nn.init.zeros_(module.out.weight)
        if isinstance(module, GPT):
            nn.init.normal_(module.embedding.weight, std=0.02)
            nn.init.normal_(module.head.weight, std=0.02)
            for block in module.blocks:
                nn.init.normal_(block.attention.out.weight, std=(2 * module.c.layers * module.c.width) ** -0.5)

    def embed(self, tokens):
        return norm(self.embedding(tokens))                                    # (B, T, C)

    def backbone(self, x, cache=None, mask=None):
        """All blocks: embeddings x (B, T, C) -> hidden states (B, T, C) and the cache with T positions more.

        The cache is a list of keys and values, (B, H, P, D) each, for every layer. x stands at positions from P on.
        """
        cache = cache or [None] * self.c.layers
        P = 0 if cache[0] is None else cache[0][0].size(2)
        angles = rope(torch.arange(P, P + x.size(1), device=x.device), self.c.head_dim)
        longer = []
        for block, past in zip(self.blocks, cache):
            x, kv = block(x, angles, past, mask)
            longer.append(kv)
        return norm(x), longer

    def scored(self):
        """Which of a segment's S predictions count in the loss: all, unless the model has seen their target."""
        return torch.ones(self.c.seg, dtype=torch.bool, device=self.head.weight.device)

    def for_length(self, length):
        """The fields to change so that the memory can hold a whole text of so many tokens: none here."""
        return {}

    def retrieved(self, cache):
        """What each token of a full segment looked at in the text before, for models that choose places. Spans
        (B, S, n, 2): first token and one past the last, counted from the start of the text, -1 for none. Weights
        (B, S, n): the share of each, at most 1 together, or nan where that is not known. None: nothing is chosen."""
        return None

    def init_state(self, B):
        return {}

    def read(self, state):
        return None

    def extend(self, tokens, cache):
        h, cache = self.backbone(self.embed(tokens), cache)
        return self.head(h), cache                                             # (B, T, V)

    def write(self, cache, state):
        return dict(state)

    def forward(self, tokens, state):
        """One whole segment, tokens (B, S), or n <= `parallel` of them -> logits (B, n S, V), the next state."""
        n, rest = divmod(tokens.size(1), self.c.seg)
        assert 0 < n <= self.parallel and not rest, f"a segment is {self.c.seg} tokens, got {tokens.size(1)}"
        logits, cache = self.extend(tokens, self.read(state))
        return logits, self.write(cache, state)
