"""One tiny GPT: the letters, the bricks that every model is built from, and the model that remembers nothing.

    B batch       T tokens in this call     P positions already in the cache     S tokens in a segment (c.seg)
    C width       H heads                   D head width                         L layers
    V vocabulary  M memory slots            W tokens kept as keys and values     K segments in a training window
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Config:
    vocab: int = 4097   # V, tokens in the vocabulary
    layers: int = 4     # L, blocks
    heads: int = 4      # H, attention heads
    width: int = 128    # C, channels of the residual stream
    seg: int = 128      # S, tokens in a segment
    mlp: int = -1       # channels inside an MLP; -1: four times the width

    head_dim = property(lambda c: c.width // c.heads)   # D
    inner = property(lambda c: c.mlp if c.mlp > 0 else 4 * c.width)

    def __post_init__(self):
        for name in ("vocab", "layers", "heads", "width", "seg"):
            assert getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}"
        assert self.width % (2 * self.heads) == 0, \
            f"width {self.width} does not split into {self.heads} heads of an even width"


def norm(x):
    """RMSNorm without weights: the linear map that follows can learn them. On a CPU twice as fast as F.rms_norm."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (torch.linalg.vecdot(y, y)[..., None] / x.size(-1) + torch.finfo(y.dtype).eps).rsqrt().type_as(x)


def angles(pos, D):
    """RoPE (2104.09864, eq. 15 and 34): cos and sin of what `rotate` turns positions pos (T,) by, (T, D/2, 2)."""
    freq = 10_000 ** (-torch.arange(0, D, 2, device=pos.device) / D)
    theta = pos.float()[:, None] * freq                                        # (T, D/2)
    return torch.stack([theta.cos(), theta.sin()], -1)


def rotate(x, turn):
    """Turn the pairs (2i, 2i+1) of x (..., T, D) by the angles of their positions; turns add up. Complex numbers take a
    single kernel; where a compiler fuses, it wants real ones."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return pairs.flatten(-2).type_as(x)


def take(x, i):
    """Rows i (B, ...) of x (B, n, C): (B, ..., C). An embedding, for its gradient is far faster than that of gather."""
    first = x.size(1) * torch.arange(len(x), device=i.device)
    return F.embedding(i + first.view(-1, *[1] * (i.ndim - 1)), x.flatten(0, 1))


def attend(q, k, v, mask=None):
    """Fused attention of q (B, H, T, D), the last T of the P + T positions of k and v, to everything before them.

    `mask` (bool, True = may look) replaces the causal rule. The kernel's own is_causal aligns top left, so it is
    right only while the cache is empty; a single query at the end needs no mask at all. A mask (B, n, 1, A, W+A) cuts
    queries and keys into blocks of A, and a block of queries sees only itself and the W/A before it.
    """
    T, P = q.size(2), k.size(2) - q.size(2)
    if mask is not None and mask.ndim == 5:
        n, A, near = mask.size(1), mask.size(3), mask.size(4)
        k, v = k[:, :, P + A - near:], v[:, :, P + A - near:]
        if n > 1:
            q, k, v = (x.unflatten(2, (-1, A)).transpose(1, 2) for x in (q, k, v))          # (B, blocks, H, A, D)
            k, v = (torch.stack([x[:, i:i + n] for i in range(near // A)], 3).flatten(3, 4) for x in (k, v))
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))                     # (B n, H, A, D) and (B n, H, W+A, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1))
        return y.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)
    if mask is None and P > 0 and T > 1:
        mask = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and P == 0)


def band(first, P, T, W, most):
    """The mask (B, T/A, 1, A, W+A) of a window, in blocks of A <= most: each of the last T of P + T positions sees
    itself and the W before it, but for those before position first (B,)."""
    A = T if T <= most else max(d for d in range(1, most + 1) if T % d == W % d == 0)
    i, j = torch.arange(A, device=first.device)[:, None], torch.arange(W + A, device=first.device)
    there = P - W + torch.arange(0, T, A, device=first.device)[:, None] + j >= first[:, None, None]     # (B, T/A, W+A)
    return (j >= i) & (j <= i + W) & there[:, :, None, None]


class Attention(nn.Module):
    """Self-attention with RoPE and QK-norm; `past` holds the rotated keys and the values of earlier positions."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)

    def forward(self, x, turn, past=None, mask=None):
        B, T, C = x.shape
        qk, v = self.qkv(x).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).split([2 * self.heads, self.heads], 1)
        q, k = rotate(norm(qk), turn).type_as(v).chunk(2, 1)                            # (B, H, T, D) as v
        if past is not None:
            k, v = (torch.cat([old.type_as(v), new], 2) for old, new in zip(past, (k, v)))   # (B, H, P+T, D)
        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C)
        return self.out(y), (k, v)


class MLP(nn.Module):
    def __init__(self, c, wide=0):
        super().__init__()
        wide = wide or c.inner
        self.up = nn.Linear(c.width, wide, bias=False)
        self.out = nn.Linear(wide, c.width, bias=False)

    def forward(self, x):
        return self.out(F.relu(self.up(x), inplace=True).square())


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x, turn, past=None, mask=None):
        y, kv = self.attention(norm(x), turn, past, mask)
        x = x + y
        return x + self.mlp(norm(x)), kv


class GPT(nn.Module):
    """A GPT that sees one segment at a time and remembers nothing: the baseline under every other model.

    state    {} (empty)
    read     nothing
    write    nothing
    paper    GPT-2 (Radford et al. 2019) in the modern dress of the nanoGPT speed runs
    departs  RoPE, RMSNorm and QK-norm without weights, squared ReLU, no biases, untied head, MLPs that start at zero
    """
    Config = Config
    parallel = 1   # segments that a forward may bring: as many as need not wait for each other

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        self.apply(self.init)

    @staticmethod
    def init(module):
        """Every start in one place: maps keep the scale of their input, an MLP begins as nothing, attention with
        GPT-2's 1/sqrt(2 L). Not as nothing too: what is read through zeros gets no gradient, and there memories are
        read."""
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

    def trunk(self, x, cache=None, mask=None):
        """Rows x (B, T, C) after the P rows in the cache -> their last hidden states (B, T, C) and the longer cache.

        The cache is a list with the keys and values of each layer, (B, H, P, D) both; a row's place in it is its
        position.
        """
        cache = cache or [None] * self.c.layers
        P = 0 if cache[0] is None else cache[0][0].size(2)
        turn = angles(torch.arange(P, P + x.size(1), device=x.device), self.c.head_dim)
        longer = []
        for block, past in zip(self.blocks, cache):
            x, kv = block(x, turn, past, mask)
            longer.append(kv)
        return norm(x), longer

    def scored(self):
        """Which of a segment's S predictions count in loss and score: all of them, unless a model looks ahead."""
        return torch.ones(self.c.seg, dtype=torch.bool, device=self.head.weight.device)

    def init_state(self, B):
        return {}

    def read(self, state):
        return None

    def extend(self, tokens, cache):
        h, cache = self.trunk(self.embed(tokens), cache)
        return self.head(h), cache                                             # (B, T, V)

    def write(self, cache, state):
        return dict(state)

    def forward(self, tokens, state):
        """One whole segment, tokens (B, S) -> logits (B, S, V) and the next state; or `parallel` of them at most."""
        n, rest = divmod(tokens.size(1), self.c.seg)
        assert 0 < n <= self.parallel and not rest, f"a segment is {self.c.seg} tokens, got {tokens.size(1)}"
        logits, cache = self.extend(tokens, self.read(state))
        return logits, self.write(cache, state)
