"""Landmark attention: each block of the text ends with a landmark token. A query that attends to a landmark gets the
tokens of its block.

    l tokens in a block     s blocks in a segment     M blocks in the bank     k blocks that a query retrieves
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, full_precision, merge_heads, norm, rope, rotate, with_previous


@dataclass
class Config(gpt.Config):
    block: int = -1     # l, tokens in a block; -1 takes up to 16, and no more than a quarter of a segment
    topk: int = 4       # k, earlier blocks that each query retrieves in each head. Plain GPT: topk=0, bank=0, block=seg
    bank: int = -1      # M, blocks that are kept, the newest; -1 keeps eight segments
    host: bool = False  # the bank lies in the CPU's memory, wherever the model is; its landmarks do not

    l = property(lambda c: c.block if c.block > 0 else
                 max(d for d in range(1, max(1, min(16, c.seg // 4)) + 1) if c.seg % d == 0))
    s = property(lambda c: c.seg // c.l)
    M = property(lambda c: c.bank if c.bank >= 0 else max(c.topk, 8 * c.s))

    def __post_init__(self):
        super().__post_init__()
        assert self.block > 0 or self.block == -1, f"block counts tokens, got {self.block}"
        assert self.seg % self.l == 0, f"a segment of {self.seg} tokens is no whole number of blocks of {self.l}"
        assert self.topk >= 0, f"topk counts blocks, got {self.topk}"
        assert self.M >= self.topk, f"a bank of {self.M} blocks cannot hold the {self.topk} that are retrieved"


def gather(x, i):
    """x (B, H, M, ...) and indices i (B, H, T, k) -> x at these places, (B, H, T, k, ...)."""
    first = x.size(2) * torch.arange(i.size(0) * i.size(1), device=i.device).view(*i.shape[:2], 1, 1)
    return x.flatten(0, 2).index_select(0, (first + i).flatten().to(x.device)).unflatten(0, i.shape)


def share_out(weight, score):
    """The grouped softmax, second half (eq. 4): the weight of each of n landmarks (..., n) goes to the l tokens of its
    block, by a softmax of their scores (..., n, l) -> the weights of the tokens (..., n l)."""
    return (weight[..., None] * score.softmax(-1)).flatten(-2)


class Attention(gpt.Attention):
    """A query sees the tokens of its own block up to itself, all earlier blocks of its segment, and k of the bank."""

    def forward(self, x, angles, cache, places):
        """x (B, T+n, C): T tokens, then the n landmarks of the blocks that they close. places: T, and the positions
        (T+n,) in the segment; a landmark has that of the last token of its block. -> y (B, T+n, C) and the cache."""
        (T, position), cache = places, dict(cache)
        q, (k, v) = self.queries(x, angles), self.keys_values(x, angles)       # (B, H, T+n, D)
        for name, new in dict(k=k[:, :, :T], v=v[:, :, :T], mark=k[:, :, T:]).items():
            cache[name] = torch.cat([cache[name], new.type_as(cache[name])], 2)
        with full_precision(x):                                                # rounding must not change the best k
            q = q.type_as(cache["mark"]) * self.c.head_dim ** -0.5
            own, near_mark, near, near_v = self.segment(q, cache, position)
            far_mark, far, far_v, picks = self.retrieve(q, cache)
            scores = [own, near_mark, far_mark]                                # first half: tokens, and whole blocks
            w, w_near, w_far = torch.cat(scores, 3).softmax(3).split([z.size(3) for z in scores], 3)
            y = (w + share_out(w_near, near)) @ near_v + torch.einsum("bhtp,bhtpd->bhtd", share_out(w_far, far), far_v)
        share = w_far if far.size(3) < self.c.M else w_far.gather(3, picks)    # of the blocks that were picked
        for name, new in dict(picks=picks, share=share.detach()).items():
            cache[name] = torch.cat([cache[name], new[:, :, :T]], 2)
        return self.out(merge_heads(y).type_as(x)), cache

    def segment(self, q, cache, position):
        """The P tokens of the segment so far, in N blocks: scores of those of a query's own block (B, H, T+n, P) and
        of the landmarks of the blocks before (B, H, T+n, N), -inf for all others; of all tokens, block by block
        (B, H, T+n, N, l); and their values (B, H, P, D). Zeros fill up the last block."""
        k, l = with_previous(cache["k"]) if self.c.shift else cache["k"], self.c.l
        k, v = (F.pad(z, (0, 0, 0, -z.size(2) % l)) for z in (k, cache["v"]))  # (B, H, P, D)
        token, block = torch.arange(k.size(2), device=q.device), torch.arange(k.size(2) // l, device=q.device)
        mark = F.pad(cache["mark"], (0, 0, 0, len(block) - cache["mark"].size(2)))      # an open block has none yet
        score, i = q @ k.mT, position[:, None]                                 # (B, H, T+n, P), (T+n, 1)
        own = score.masked_fill((token // l != i // l) | (token > i), -torch.inf)
        before = (q @ mark.mT).masked_fill(block >= i // l, -torch.inf)
        return own, before, score.unflatten(3, (-1, l)), v

    def retrieve(self, q, cache):
        """The k blocks of the bank whose landmarks score best with each query: the scores of the landmarks
        (B, H, T+n, k), -inf where there is none, and of the tokens (B, H, T+n, k, l); their values; and which blocks
        these are (B, H, T+n, k). Where these would be more than the whole bank, nothing is gathered: all M blocks come
        in place of k, and landmarks that a query did not pick have -inf."""
        score, bank = q @ cache["old"].mT, cache["bank"]                       # (B, H, T+n, M)
        best, i = (score + cache["bias"]).topk(self.c.topk, 3)                 # (B, H, T+n, k)
        mark = score.gather(3, i).masked_fill(best == -torch.inf, -torch.inf)
        cos, sin = cache["angles"]                                             # (M, D/2)
        if i.size(2) * i.size(3) < self.c.M:
            k, v = gather(bank, i).to(q.device).chunk(2, -1)                   # (B, H, T+n, k, l, D)
            k = rotate(k, (cos[i][..., None, :], sin[i][..., None, :]))
            return mark, torch.einsum("bhtd,bhtkld->bhtkl", q, k), v.flatten(3, 4), i
        k, v = bank.to(q.device).chunk(2, -1)                                  # (B, H, M, l, D)
        k = rotate(k, (cos[:, None], sin[:, None]))
        mark = torch.full_like(score, -torch.inf).scatter(3, i, mark)          # (B, H, T+n, M)
        return mark, torch.einsum("bhtd,bhmld->bhtml", q, k), v.flatten(2, 3)[:, :, None], i      # v (B, H, 1, M l, D)


class Landmark(GPT):
    """Attention finds by itself what to retrieve: the score of a landmark says how much its block is worth. All blocks
    of the segment compete, and of earlier segments the k best, for each query, head and layer.

    state    n (B,) blocks so far   landmark (B, L, H, M, D) keys of the landmarks of the last M blocks, the newest last
             bank (B, L, H, M, l, 2D) keys and values of their tokens
    read     a softmax over the tokens of a query's own block and the landmarks of other blocks; the weight of a
             landmark goes to the tokens of its block, by a softmax within the block (eq. 1 to 4)
    write    the blocks of a full segment come in, and the oldest go. Keys are rotated to their position in the block
    paper    Landmark Attention 2305.16300, section 3.1 (grouped softmax), 3.2 (retrieval), 3.2.1 (positions)
    departs  a landmark is a learned vector, no token of the vocabulary (paper: one more token), and predicts nothing.
             Blocks of up to 16 tokens (paper: 50). Training uses the bank too, and gradient goes through it into
             earlier segments (paper: single windows, in which all blocks compete, as with topk=bank here). A landmark
             has the position of the token before it, so that tokens stand as in gpt. The last k + 1 blocks keep their
             distance; older ones share one place (paper: those that are retrieved stand in order). Of scores that are
             nearly equal the newest counts: in layer 0 all landmarks have the same key
    """
    Config, Attention = Config, Attention

    def __init__(self, c):
        super().__init__(c)
        self.landmark = nn.Parameter(torch.randn(c.width))

    def for_length(self, length):
        return dict(bank=max(self.c.topk, length // self.c.l))

    def init_state(self, B):
        c, here = self.c, self.head.weight.device
        zeros = lambda *shape, device=here: torch.zeros(B, *shape, device=device)
        bank = zeros(c.layers, c.heads, c.M, c.l, 2 * c.head_dim, device="cpu" if c.host else here)
        return dict(n=zeros().long(), landmark=zeros(c.layers, c.heads, c.M, c.head_dim), bank=bank)

    def read(self, state):
        """For each layer: what the bank holds, and the keys and values of this segment, none so far. The newest block
        begins l tokens before the segment, the one before it 2 l; and none further away than k + 1 blocks."""
        c = self.c
        age = torch.arange(c.M, 0, -1, device=state["n"].device)               # (M,) 1: the newest
        angles = rope(age.clamp(max=c.topk + 1) * -c.l, c.head_dim)
        bias = (-1e-3 * age.log()).masked_fill(age > state["n"][:, None], -torch.inf)[:, None, None]     # (B, 1, 1, M)
        cache, picks = [], age.new_zeros(len(bias), c.heads, 0, c.topk)
        for old, bank in zip(rotate(state["landmark"], angles).unbind(1), state["bank"].unbind(1)):
            none = old[:, :, :0]                                               # (B, H, 0, D)
            cache.append(dict(bank=bank, old=old, angles=angles, bias=bias, k=none, v=none, mark=none, n=state["n"],
                              picks=picks, share=picks.float()))
        return cache

    def extend(self, tokens, cache):
        """The next T tokens, and behind them the landmarks of the blocks that they close."""
        c, t, T = self.c, cache[0]["k"].size(2), tokens.size(1)
        token = torch.arange(t, t + T, device=tokens.device)
        last = torch.arange(t // c.l, (t + T) // c.l, device=tokens.device) * c.l + c.l - 1    # of each closed block
        x = torch.cat([self.embed(tokens), self.landmark.expand(len(tokens), len(last), -1)], 1)    # (B, T+n, C)
        position, layers = torch.cat([token, last]), []
        angles = rope(position, c.head_dim)
        for block, memory in zip(self.blocks, cache):
            x, memory = block(x, angles, memory, (T, position))                # Attention's cache and places
            layers.append(memory)
        return self.head(norm(x[:, :T])), layers                               # (B, T, V)

    def retrieved(self, cache):
        """For each token of this segment the blocks of the bank that it looked at in all layers and heads, as spans of
        text (B, T, L H k, 2), -1 for none, and their shares (B, T, L H k) of the attention of all heads."""
        c = self.c
        picks, share = (torch.cat([layer[name] for layer in cache], 1).transpose(1, 2).flatten(2)
                        for name in ("picks", "share"))                        # (B, L H, T, k) -> (B, T, L H k)
        block = cache[0]["n"][:, None, None] - c.M + picks                     # negative: before the text
        spans = torch.stack([block, block + 1], 3) * c.l
        return spans.where(block[..., None] >= 0, -1), share / (c.layers * c.heads)

    def write(self, cache, state):
        c, new = self.c, {}
        k, v, mark = (torch.stack([layer[name] for layer in cache], 1) for name in ("k", "v", "mark"))
        k, v = (z.unflatten(3, (c.s, c.l)) for z in (with_previous(k) if c.shift else k, v))     # (B, L, H, s, l, D)
        cos, sin = rope(torch.arange(c.s, device=mark.device) * -c.l, c.head_dim)    # (s, D/2) back to position 0
        bank = torch.cat([rotate(k, (cos[:, None], sin[:, None])), v], -1)
        for name, x in dict(landmark=rotate(mark, (cos, sin)), bank=bank).items():
            new[name] = torch.cat([state[name], x.to(state[name])], 3)[:, :, :, c.s:].clone()
        return dict(n=state["n"] + c.s, **new)
