"""Grouped cross-attention: the text is cut into chunks, and each chunk learns which earlier chunks to look at again."""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, Block, full_precision, norm, rope
from .xl import WindowAttention, newest, window_mask


@dataclass
class Config(gpt.Config):
    chunk: int = -1              # m, tokens in a chunk; -1 takes up to 64, and no more than a quarter of a segment
    topk: int = 4                # k, chunks that are retrieved for each chunk; 0 leaves only the window
    groups: int = 1              # G, groups of upper layers; each group retrieves anew, knowing what the last one found
    window: int = -4             # W, positions before itself that a position sees; -n: n chunks; 0: its whole segment
    bank: int = -1               # M, chunks that are kept, the newest; -1 keeps eight segments
    retrieval: str = "learned"   # how the k are chosen: learned, random or recent
    bypass: bool = True          # what was retrieved goes into the MLP only, not into the residual stream
    sink: bool = False           # a position may turn away from a chunk: one more key in it, which says nothing
    host: bool = False           # the bank lies in the CPU's memory, wherever the model is

    m = property(lambda c: c.chunk if c.chunk > 0 else
                 max(d for d in range(1, max(1, min(64, c.seg // 4)) + 1) if c.seg % d == 0))
    U = property(lambda c: c.m + (c.topk > 0))                             # positions of a chunk: tokens and a landmark
    W = property(lambda c: c.window if c.window >= 0 else -c.window * c.U)
    kept = property(lambda c: c.W + 1 if c.W else 0)                       # one more: half of its key is in the next
    s = property(lambda c: c.seg // c.m)                                   # chunks of a segment
    M = property(lambda c: 0 if not c.topk else c.bank if c.bank >= 0 else max(c.topk, 8 * c.s))
    lower = property(lambda c: c.layers // 2 if c.topk else c.layers)      # layers that do not see the bank

    def __post_init__(self):
        super().__post_init__()
        assert self.chunk > 0 or self.chunk == -1, f"chunk counts tokens, got {self.chunk}"
        assert self.seg % self.m == 0, f"a segment of {self.seg} tokens is no whole number of chunks of {self.m}"
        assert self.topk >= 0, f"topk counts chunks, got {self.topk}"
        upper = self.layers - self.lower
        assert not self.topk or self.M >= max(self.s, self.topk), \
            f"a bank of {self.M} chunks cannot hold the {self.s} of a segment and the {self.topk} that are retrieved"
        assert self.groups > 0 and upper % self.groups == 0, f"{upper} upper layers are not {self.groups} equal groups"
        assert self.retrieval in ("learned", "random", "recent"), \
            f"retrieval is learned, random or recent, got {self.retrieval}"


def gumbel(i, j):
    """Gumbel noise as a function of two whole numbers, so that replay and resume meet the same noise."""
    x = (i * 73_856_093) ^ (j * 19_349_663)
    for _ in range(2):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF                        # a hash of 31 bits
    u = ((x >> 8) + 0.5) / 2 ** 23                                             # between 0 and 1
    return -(-u.log()).log()


def gather(x, i):
    """x (B, N, ...) and indices i (B, n, k) -> x at these places, (B, n, k, ...)."""
    first = x.size(1) * torch.arange(len(x), device=x.device)[:, None, None]
    return x.flatten(0, 1).index_select(0, (first + i.to(x.device)).flatten()).unflatten(0, i.shape)


class CrossAttention(nn.Module):
    """Every position attends to each of k chunks separately, with a softmax for each chunk; w mixes the k answers."""

    def __init__(self, c):
        super().__init__()
        self.sink = c.sink
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)

    def forward(self, x, kv, w):
        """Positions x (B, n, u, C) of n chunks, keys and values kv (B, n, k, H, m, 2D) of k chunks for each of them,
        weights w (B, n, k) -> (B, n, u, C)."""
        if self.sink:
            kv = F.pad(kv, (0, 0, 0, 1))                                       # a key and a value of zeros
        q = self.q(x).unflatten(3, (kv.size(3), -1)).transpose(2, 3)           # (B, n, H, u, D)
        k, v = kv.type_as(q).chunk(2, -1)                                      # (B, n, k, H, m, D)
        q = q[:, :, None].expand(-1, -1, kv.size(2), -1, -1, -1)               # (B, n, k, H, u, D)
        y = F.scaled_dot_product_attention(*(z.flatten(0, 2) for z in (q, k, v))).unflatten(0, w.shape)
        y = torch.einsum("bnk,bnkhud->bnuhd", w.type_as(y), y)                 # w mixes the k answers
        return self.out(y.flatten(3))


class GCA(GPT):
    """Text in chunks of m tokens, each closed by a landmark. All chunks of a call are processed at once, and all layers
    see a window. What the lower layers make of a chunk is encoded, once, into a key (at its landmark) and into keys and
    values (at its tokens), and joins the bank. In the upper layers the landmark of chunk t asks the bank, and chunk t+1
    looks at what was found.

    state    key (B, M, C) and bank (B, M, H, m, 2D) of the last M chunks, the newest last   n (B,) chunks so far
             ask (B, G, C) what the last landmark asks   near (B, L, 2, H, W+1, D) keys and values of the window
    read     score = <ask, key> / sqrt(C), w = softmax over the k best. Every position attends to each of the k chunks
             by itself, and w mixes the answers: so the loss on the next token teaches the choice, and nothing else does
    write    the chunks of a full segment come in, and the oldest go
    paper    Grouped Cross-Attention 2410.01651, the method and the released code (for the bypass and the shared K, V)
    departs  our backbone (RoPE for ALiBi, squared ReLU for SwiGLU); one encoder layer (code: 2); the upper MLPs,
             through which all retrieval goes, do not start at zero; k = 4, a window of 4 chunks (code: 8 and 8), no
             sink (the code has one on books); chunks of at most a quarter of a segment (code: 63 or 64 tokens); a
             segment sees chunks that are still kept at its end (paper: all stay); the Gumbel noise that explores in
             training is a function of the two chunks' numbers; what the last landmark of a segment asks is found in
             the next one (in the code the first chunk of a segment finds nothing)
    """
    Config, Attention = Config, WindowAttention
    parallel = property(lambda self: max(1, self.c.M // self.c.s) if self.c.W else 1)      # all of them fit in the bank

    def __init__(self, c):
        super().__init__(c)
        self.landmark = nn.Parameter(torch.randn(c.width))
        self.encoder = Block(c)
        self.kv = nn.Linear(c.width, 2 * c.width, bias=False)
        self.gain = nn.Parameter(torch.ones(c.groups, c.width))
        self.cross = nn.ModuleList(CrossAttention(c) for _ in range(c.layers - c.lower))
        for module in (self.encoder, self.kv, self.cross):
            module.apply(self.init)
        for block in self.blocks[c.lower:]:
            nn.init.normal_(block.mlp.out.weight, std=(8 * c.layers * c.width) ** -0.5)

    def for_length(self, length):
        """A bank for the whole text; and segments of up to 1,024 tokens, which give the same logits and copy the bank
        less often."""
        n = math.gcd(length // self.c.seg, max(1, 1024 // self.c.seg)) if self.c.W else 1
        return dict(bank=length // self.c.m, chunk=self.c.m, seg=n * self.c.seg)

    def init_state(self, B):
        c, here = self.c, self.head.weight.device
        zeros = lambda *shape, device=here: torch.zeros(B, *shape, device=device)
        return dict(key=zeros(c.M, c.width),
                    bank=zeros(c.M, c.heads, c.m, 2 * c.head_dim, device="cpu" if c.host else here),
                    n=zeros().long(), ask=zeros(c.groups, c.width),
                    near=zeros(c.layers, 2, c.heads, c.kept, c.head_dim))

    def read(self, state):
        """The cache: the state, and of this segment the bank entries of its chunks (new; their keys join `key`), the
        open chunk after the lower layers (open), what was found for it (found) and for the others (picks, weights)."""
        c, B, empty = self.c, len(state["n"]), state["ask"].new_zeros
        near = [layer.unbind(1) for layer in state["near"].unbind(1)]          # L times k, v (B, H, W+1, D)
        return dict(state, near=near, new=empty(B, 0, c.heads, c.m, 2 * c.head_dim), open=empty(B, 0, c.width),
                    found=[], picks=empty(B, 0, c.groups, c.topk).long(), weights=empty(B, 0, c.groups, c.topk))

    def extend(self, tokens, cache):
        """First the tokens that fill up an open chunk; then whole chunks, side by side; then the next open chunk."""
        m, T, logits = self.c.m if self.c.topk else self.c.seg, tokens.size(1), []
        fill = min(T, -cache["open"].size(1) % m)
        sizes = [fill, (T - fill) // m * m, (T - fill) % m]
        for part, n in zip(tokens.split(sizes, 1), (1, sizes[1] // m, 1)):
            if part.size(1):
                x, cache = self.chunks(self.embed(part).unflatten(1, (n, -1)), cache)
                logits.append(self.head(x))
        return torch.cat(logits, 1), cache

    def chunks(self, x, cache):
        """The next tokens x (B, n, u, C), of n whole chunks or of a part of one -> hidden states (B, n u, C), cache."""
        c, cache, (B, n, u, _) = self.c, dict(cache), x.shape
        full = c.topk > 0 and cache["open"].size(1) + u == c.m
        if full:
            x = torch.cat([x, self.landmark.expand(B, n, 1, -1)], 2)           # (B, n, u+1, C)
        by_chunk = lambda x: x.unflatten(1, (n, -1))                           # (B, R, C) -> (B, n, u or u+1, C)
        x, near = x.flatten(1, 2), []                                          # (B, R, C): R tokens and landmarks
        P, R = cache["near"][0][0].size(2), x.size(1)
        A = max(d for d in range(1, max(c.W // 2, c.U) + 1) if R % d == 0)     # queries that share a block of the mask
        mask = window_mask(c.kept - cache["n"] * c.U, P, R, c.W, A) if c.W else None
        angles = rope(torch.arange(P, P + R, device=x.device), c.head_dim)
        for block, past in zip(self.blocks[:c.lower], cache["near"]):          # the lower layers
            x, kv = block(x, angles, past, mask)
            near.append(kv)
        if not c.topk:
            return norm(x), dict(cache, near=near)

        first = cache["new"].size(1)                                           # chunks since `read`, before x
        h = torch.cat([cache["open"], x], 1)                                   # what the lower layers put out
        cache["open"] = h[:, :0] if full else h
        if full:
            key, kv = self.encode(by_chunk(h))
            cache["key"] = torch.cat([cache["key"], key.to(cache["key"])], 1)  # (B, M + new, C)
            cache["new"] = torch.cat([cache["new"], kv], 1)

        found, asks, size = list(cache["found"]), [], (c.layers - c.lower) // c.groups
        for g in range(c.groups):                                              # the upper layers, group by group
            landmarks = by_chunk(x)[:, :, u:].flatten(1, 2)                    # (B, n, C), none if the chunk is open
            ask = torch.cat([cache["ask"][:, g:g + 1], norm(landmarks) * self.gain[g]], 1)
            asks.append(ask[:, -1])
            if g == len(found):                                                # once for a chunk
                found.append(self.find(ask[:, :n], first, g, cache))           # what chunk t asks, chunk t+1 looks at
            kv, w, _ = found[g]
            for l in range(c.lower + g * size, c.lower + (g + 1) * size):
                y, now = self.blocks[l].attention(norm(x), angles, cache["near"][l], mask)
                near.append(now)
                x = x + y
                with_chunks = x + self.cross[l - c.lower](by_chunk(norm(x)), kv, w).flatten(1, 2)
                x = (x if c.bypass else with_chunks) + self.blocks[l].mlp(norm(with_chunks))
        cache.update(near=near, ask=torch.stack(asks, 1).to(cache["ask"].dtype), found=[] if full else found)
        if full:                                                               # for `retrieved`, (B, n, G, k) both
            w, picks = (torch.stack([of_group[i] for of_group in found], 2) for i in (1, 2))
            cache["weights"] = torch.cat([cache["weights"], w.detach()], 1)
            cache["picks"] = torch.cat([cache["picks"], picks], 1)
        return norm(by_chunk(x)[:, :, :u].flatten(1, 2)), cache

    def encode(self, h):
        """Full chunks h (B, n, U, C) -> their keys (B, n, C), and their keys and values (B, n, H, m, 2D)."""
        c, (B, n, U, _) = self.c, h.shape
        angles = rope(torch.arange(U, device=h.device), c.head_dim)
        both_ways = torch.ones(U, U, dtype=torch.bool, device=h.device)
        z = norm(self.encoder(norm(h.flatten(0, 1)), angles, mask=both_ways)[0]).unflatten(0, (B, n))
        return z[:, :, c.m], self.kv(z[:, :, :c.m]).unflatten(3, (c.heads, -1)).transpose(2, 3)

    def find(self, ask, first, g, cache):
        """For chunks first, first+1, ... since `read`, what the chunk before each asks, ask (B, n, C) -> the keys
        and values of k chunks (B, n, k, H, m, 2D), their weights (B, n, k), and their numbers (B, n, k), -1 for
        none."""
        c, key, device, start = self.c, cache["key"], ask.device, cache["n"][:, None]    # (B, 1) chunks before `read`
        i = torch.arange(first, first + ask.size(1), device=device)
        reader = (start + i)[..., None]                                        # (B, n, 1) the chunk that looks
        end = (start + i // c.s * c.s + c.s)[..., None]                        # (B, n, 1) one past its segment
        ids = (start - c.M + torch.arange(key.size(1), device=device))[:, None]          # (B, 1, M + new)
        seen = (ids >= 0) & (ids < reader - 1) & (ids >= end - c.M)            # before what asks, and not yet gone
        with full_precision(ask):                                              # rounding must not change the best k
            score = ask.to(key.dtype) @ key.mT * ask.size(-1) ** -0.5          # (B, n, M + new)
        noise = gumbel((reader - 1) * c.groups + g, ids) if self.training or c.retrieval == "random" else 0
        rank = dict(learned=score + noise, random=0 * score + noise, recent=0 * score + ids)[c.retrieval]
        best, top = rank.masked_fill(~seen, -torch.inf).topk(c.topk, -1)       # (B, n, k)
        real = best > -torch.inf
        score = score.gather(2, top) * (c.retrieval == "learned")              # without the noise
        w = score.masked_fill(~real, torch.finfo(score.dtype).min).softmax(-1) * real    # all -inf would give nan
        kv = gather(cache["bank"], top.clamp(max=c.M - 1)).to(device)
        if cache["new"].size(1):
            new = gather(cache["new"], (top - c.M).clamp(min=0)).to(kv.dtype)
            kv = torch.where((top < c.M)[..., None, None, None], kv, new)
        return kv, w, ids.expand_as(seen).gather(2, top).where(real, -1)

    def retrieved(self, cache):
        """For each token of this segment the chunks that it has looked at, as spans of text (B, T, G k, 2): first token
        and one past the last, -1 for none; and their shares (B, T, G k), at most 1 together."""
        if not self.c.topk:
            return None
        picks, w = (cache[name].flatten(2).repeat_interleave(self.c.m, 1) for name in ("picks", "weights"))
        spans = torch.stack([picks, picks + 1], -1) * self.c.m
        return spans.where(picks[..., None] >= 0, -1), w / self.c.groups

    def write(self, cache, state):
        c, near, bank, new = self.c, cache["near"], state["bank"], cache["new"].size(1)
        return dict(key=cache["key"][:, new:].clone(),
                    bank=torch.cat([bank, cache["new"].to(bank)], 1)[:, new:].clone(),
                    n=state["n"] + (near[0][0].size(2) - c.kept) // c.U, ask=cache["ask"],
                    near=newest(near, c.kept).to(state["near"].dtype))
