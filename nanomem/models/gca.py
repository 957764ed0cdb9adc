"""Grouped cross-attention: text is cut into chunks, and each chunk learns which earlier chunks to read again."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, Block, angles, band, norm, rotate, take


@dataclass
class Config(gpt.Config):
    chunk: int = -1              # m, tokens in a chunk; -1 takes up to 64, and no more than a quarter of a segment
    topk: int = 4                # k, chunks that each chunk reads again; 0 leaves only the window
    groups: int = 1              # G, retrievals on the way up, each of which knows what the one before has found
    window: int = -4             # W, rows before itself that a row attends to; -n: n chunks; 0: its whole segment
    bank: int = -1               # M, chunks that are kept, the newest; -1 keeps eight segments
    retrieval: str = "learned"   # how the k are chosen: learned, random or recent
    bypass: bool = True          # what was read goes into the MLP only, not into the residual stream
    sink: bool = False           # a row may turn away from a chunk: one more key in it, which says nothing
    host: bool = False           # the bank lies in the memory of the CPU, wherever the model is

    m = property(lambda c: c.chunk if c.chunk > 0 else
                 max(d for d in range(1, max(1, min(64, c.seg // 4)) + 1) if c.seg % d == 0))
    U = property(lambda c: c.m + (c.topk > 0))                             # rows of a chunk: its tokens and a landmark
    W = property(lambda c: c.window if c.window >= 0 else -c.window * c.U)
    s = property(lambda c: c.seg // c.m)                                   # chunks of a segment
    M = property(lambda c: 0 if not c.topk else c.bank if c.bank >= 0 else max(c.topk, 8 * c.s))
    lower = property(lambda c: c.layers // 2 if c.topk else c.layers)      # layers that do not read the bank

    def __post_init__(self):
        super().__post_init__()
        assert self.chunk > 0 or self.chunk == -1, f"chunk counts tokens, got {self.chunk}"
        assert self.seg % self.m == 0, f"a segment of {self.seg} tokens is no whole number of chunks of {self.m}"
        assert self.topk >= 0, f"topk counts chunks, got {self.topk}"
        upper = self.layers - self.lower
        assert not self.topk or self.M >= max(self.s, self.topk), \
            f"a bank of {self.M} chunks cannot hold the {self.s} of a segment and the {self.topk} that are read"
        assert self.groups > 0 and upper % self.groups == 0, f"{upper} upper layers are not {self.groups} equal groups"
        assert self.retrieval in ("learned", "random", "recent"), \
            f"retrieval is learned, random or recent, got {self.retrieval}"


def gumbel(i, e):
    """Gumbel noise that two whole numbers decide: who goes the same way again, in replay, meets the same noise."""
    x = (i * 73_856_093) ^ (e * 19_349_663)
    for _ in range(2):
        x = (x ^ x >> 15) * 0x2C1B3C6D & 0x7FFFFFFF
    return -((x >> 8) + 0.5).div(2 ** 23).log().neg().log()


class CrossAttention(nn.Module):
    """Every row attends to each of k chunks by itself, with one softmax a chunk, and w mixes the k answers: here their
    values, so that one product adds them up. Fused attention gives k answers apart, and takes longer on a CPU."""

    def __init__(self, c):
        super().__init__()
        self.sink = c.sink
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)

    def forward(self, x, kv, w):
        """Rows x (B, n, u, C) of n chunks; each reads k chunks, kv (B, n, H, k, m, 2D), with weights w (B, n, k)."""
        if self.sink:
            kv = F.pad(kv, (0, 0, 0, 1))                                       # a key and a value of zeros
        q = self.q(x).unflatten(3, (kv.size(2), -1)).transpose(2, 3)           # (B, n, H, u, D)
        k, v = kv.type_as(q).chunk(2, -1)                                      # (B, n, H, k, m, D) both
        s = q * q.size(-1) ** -0.5 @ k.flatten(3, 4).mT                        # (B, n, H, u, k m)
        p = s.unflatten(4, k.shape[3:5]).softmax(-1).type_as(q).flatten(4)
        v = (v * w[:, :, None, :, None, None].type_as(v)).flatten(3, 4)        # (B, n, H, k m, D)
        return self.out((p @ v).transpose(2, 3).flatten(3))                    # (B, n, u, C)


class GCA(GPT):
    """Text in chunks of m tokens, each closed by a landmark row; all chunks of a call at once. The lower layers see
    a window. What they make of a chunk is encoded, once, to a key (at its landmark) and to keys and values (at its
    tokens), and joins the bank. In the upper layers a landmark asks the bank, and the chunk after it reads the answer.

    state    key (B, M, C) and bank (B, M, H, m, 2D), chunk i in place i mod M   n (B,) chunks so far   ask (B, G, C)
             the question of the last landmark   near (B, L, 2, H, W, D) keys and values of the window
    read     scores s = <ask, key> / sqrt(C), w = softmax over the k best; every row attends to each of the k chunks by
             itself, and w mixes the answers: so the loss on the next token teaches the choice, and nothing else does
    write    a full chunk takes the place of the oldest. In eval mode under no_grad this happens in place, so that a
             million tokens are read without a copy of the bank: the state that was passed in then holds the new chunks
             as well, where it does not look (if its bank was full: instead of the oldest)
    paper    Grouped Cross-Attention 2410.01651, the method and the released code (for the bypass and the shared K, V)
    departs  our backbone (RoPE for ALiBi, squared ReLU for SwiGLU) and one encoder layer; the upper MLPs, through which
             all reading goes, do not start at zero; the Gumbel noise that explores in training is a function of the two
             chunks' numbers; a question outlives its segment (in the code the first chunk of a segment finds nothing)
    """
    Config = Config
    parallel = property(lambda model: max(1, model.c.M // model.c.s) if model.c.W else 1)      # all of them in the bank

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

    def init_state(self, B):
        c, like = self.c, self.head.weight
        zeros = lambda *shape, at=like.device: torch.zeros(B, *shape, device=at)
        return dict(key=zeros(c.M, c.width),
                    bank=zeros(c.M, c.heads, c.m, 2 * c.head_dim, at="cpu" if c.host else like.device),
                    ask=zeros(c.groups, c.width), n=zeros().long(),
                    near=zeros(c.layers, 2, c.heads, c.W, c.head_dim))     # in the order of `write`: one graph for both

    def read(self, state):
        """Beside the state: the open chunk as the lower layers left it, and what was found for it once it has begun."""
        near = [layer.unbind(1) for layer in state["near"].unbind(1)]          # L times k, v (B, H, W, D)
        return dict(state, near=near, open=state["ask"].new_zeros(len(state["n"]), 1, 0, self.c.width), found={})

    def extend(self, tokens, cache):
        """Whole chunks go side by side; one that is open, or stays open, goes by itself."""
        m, logits = self.c.m if self.c.topk else self.c.seg, []
        while tokens.size(1):
            left = m - cache["open"].size(2)
            T = tokens.size(1) // m * m if left == m <= tokens.size(1) else min(left, tokens.size(1))
            x, cache = self.chunks(self.embed(tokens[:, :T]).unflatten(1, (max(1, T // m), -1)), cache)
            logits.append(self.head(x))
            tokens = tokens[:, T:]
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1), cache

    def chunks(self, x, cache):
        """The next tokens x (B, n, u, C), of n whole chunks or of a part of one -> last hidden states (B, n u, C), and
        the cache, whose `picks` tell which chunks were found for them: for each group (B, n, k), -1 for none."""
        c, cache, (B, n, u, _) = self.c, dict(cache), x.shape
        full = c.topk > 0 and cache["open"].size(2) + u == c.m
        if full:
            x = torch.cat([x, self.landmark.expand(B, n, 1, -1)], 2)           # (B, n, u+1, C)
        rows = lambda x: x.unflatten(1, (n, -1))                               # (B, n (u+1), C) -> (B, n, u+1, C)
        P, R = cache["near"][0][0].size(2), n * x.size(2)
        first = (P - c.W) // c.U                                               # chunks of this call before x
        turn, mask = angles(torch.arange(P, P + R, device=x.device), c.head_dim), self.mask(cache["n"], P, R)
        x, near, asked, found = x.flatten(1, 2), [], [], dict(cache["found"])
        for block, past in zip(self.blocks[:c.lower], cache["near"]):
            x, kv = block(x, turn, past, mask)
            near.append(kv)
        if c.topk:
            cache["open"] = torch.cat([cache["open"].expand(-1, n, -1, -1), rows(x)], 2)
        if full:
            cache.update(self.join(cache["open"], first, cache), open=cache["open"][:, :1, :0])
        for l, (block, cross, past) in enumerate(zip(self.blocks[c.lower:], self.cross, cache["near"][c.lower:])):
            g, inside = divmod(l * c.groups, c.layers - c.lower)
            if not inside:                                                     # group g of layers begins
                ask = cache["ask"][:, g:g + 1]
                if full:
                    q = norm(rows(x)[:, :, -1]) * self.gain[g]                 # (B, n, C) of the landmarks
                    ask = torch.cat([ask, q[:, :-1]], 1)                       # what chunk t asks, chunk t+1 reads
                    asked.append(q[:, -1])
                if g not in found:
                    found[g] = self.find(ask, first, g, cache)
            y, kv = block.attention(norm(x), turn, past, mask)
            near.append(kv)
            x = x + y
            heard = x + cross(rows(norm(x)), *found[g][:2]).flatten(1, 2)
            x = (x if c.bypass else heard) + block.mlp(norm(heard))
        if full:
            cache["ask"] = torch.stack(asked, 1).to(cache["ask"].dtype)
        cache.update(near=near, found={} if full else found, picks=[picks for _, _, picks in found.values()])
        return norm(rows(x)[:, :, :u].flatten(1, 2)), cache

    def mask(self, n, P, R):
        """What each of R rows behind P others may see, given n (B,) chunks so far: itself and the W rows before it."""
        c = self.c
        if not c.W:
            return None
        return band(c.W - n * c.U, P, R, c.W, max(c.W // 2, c.U))

    def join(self, h, first, cache):
        """Full chunks, all rows of them h (B, n, U, C), are encoded: key and bank with them in it; behind these, what
        lost its place to a second or later segment of this call, for until then it is seen."""
        c, (B, n, _, _) = self.c, h.shape
        turn = angles(torch.arange(c.U, device=h.device), c.head_dim)
        all_see_all = torch.ones(c.U, c.U, dtype=torch.bool, device=h.device)
        z = norm(self.encoder(norm(h.flatten(0, 1)), turn, mask=all_see_all)[0]).unflatten(0, (B, n))
        kv = self.kv(z[:, :, :c.m]).unflatten(3, (c.heads, -1)).transpose(2, 3)            # (B, n, H, m, 2D)
        place = (cache["n"][:, None] + torch.arange(first, first + n, device=h.device)) % c.M
        joined = {}
        for name, new in dict(key=z[:, :, c.m], bank=kv).items():
            old = cache[name]
            row, at = torch.arange(B, device=old.device)[:, None], place.to(old.device)
            if self.training or torch.is_grad_enabled() or n > c.s:
                old = torch.cat([old, old[row, at[:, max(0, c.s - first):]]], 1)           # (B, M + chunks, ...)
            old[row, at] = new.to(old)
            joined[name] = old
        return joined

    def find(self, ask, first, g, cache):
        """For chunks first, first+1, ... of this call, what their predecessors asked for, ask (B, n, C): keys and
        values of k chunks (B, n, H, k, m, 2D), their weights (B, n, k) and their numbers (B, n, k)."""
        c, (_, n, C), key, bank = self.c, ask.shape, cache["key"], cache["bank"]
        before, i = cache["n"][:, None], torch.arange(first, first + n, device=ask.device)
        t = (before + i - 1)[..., None]                                        # (B, n, 1) who asks
        end = (before + i // c.s * c.s + c.s - 1)[..., None]                   # (B, n, 1) last chunk of its segment
        last = end[:, -1]                                                      # (B, 1) of this call
        e = last - (last - torch.arange(c.M, device=ask.device)) % c.M         # (B, M) whose place it is by then
        lost = before - c.M + torch.arange(c.s, c.s + key.size(1) - c.M, device=ask.device)
        e = torch.cat([e, lost], 1)                                            # (B, M + lost): see `join`
        e = e.where(e >= 0, last)[:, None]                                     # an empty place is nobody's past
        learned = c.retrieval == "learned"
        with torch.autocast(ask.device.type, enabled=False):                   # close scores must not swap ranks
            s = ask.to(key.dtype) * (learned / C ** 0.5) @ key.mT              # (B, n, M)
        rank = s + e if c.retrieval == "recent" else s
        if c.retrieval == "random" or learned and self.training:
            rank = s + gumbel(t * c.groups + g, e)
        seen = (e < t) & (e > end - c.M)                                       # past, and not yet out of the bank
        top = rank.masked_fill(~seen, -torch.inf).topk(c.topk, -1).indices     # (B, n, k)
        picks, real = e.expand_as(s).gather(2, top), seen.gather(2, top)
        w = s.gather(2, top).masked_fill(~real, torch.finfo(s.dtype).min).softmax(-1) * real     # without the noise
        rows = top[:, :, None] * c.heads + torch.arange(c.heads, device=top.device)[:, None]     # (B, n, H, k)
        kv = take(bank.flatten(1, 2).flatten(2), rows.to(bank.device)).unflatten(4, bank.shape[3:]).to(ask.device)
        return kv, w, picks.where(real, -1)

    def write(self, cache, state):
        c, near = self.c, cache["near"]
        P = near[0][0].size(2)
        turn = angles(torch.full((1,), c.W - P, device=state["n"].device), c.head_dim)
        near = torch.stack([torch.stack([rotate(k[:, :, P - c.W:], turn), v[:, :, P - c.W:]], 1) for k, v in near], 1)
        key, bank = (cache[k] if cache[k].size(1) == c.M else cache[k][:, :c.M].clone() for k in ("key", "bank"))
        return dict(key=key, bank=bank, ask=cache["ask"], n=state["n"] + (P - c.W) // c.U,
                    near=near.to(state["near"].dtype))
