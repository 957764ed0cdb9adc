"""Sliding window, Transformer-XL and full attention: the keys and values of the last W tokens, kept as they are."""
import math
from dataclasses import dataclass

import torch

from . import gpt
from .gpt import GPT, attend, rope, rotate


@dataclass
class Config(gpt.Config):
    window: int = -1     # W, tokens of the past that are kept; -n keeps n segments
    slide: bool = False  # each token sees itself and the W before it; if not, all W kept and its segment so far

    W = property(lambda c: c.window if c.window >= 0 else -c.window * c.seg)
    kept = property(lambda c: c.W + 1 if c.W else 0)    # one more: half of its key is in the next one's

    def __post_init__(self):
        super().__post_init__()
        assert self.W > 0 or not self.slide, "a sliding window needs window > 0, got 0"


def window_mask(first, P, T, W, A):
    """The mask of a sliding window for T queries behind P positions, in blocks of A queries: (B, T/A, 1, A, W+A).

    A block is given its own A keys and the W before them. Each query sees itself and the W keys before it, but nothing
    before position `first` (B,), where the text begins.
    """
    i, j = torch.arange(A, device=first.device)[:, None], torch.arange(W + A, device=first.device)
    in_window = (j >= i) & (j <= i + W)                                        # (A, W+A)
    position = P - W + torch.arange(0, T, A, device=first.device)[:, None] + j     # (T/A, W+A) of each key
    there = position >= first[:, None, None]                                   # (B, T/A, W+A)
    return in_window & there[:, :, None, None]


def newest(past, kept):
    """The last `kept` keys and values of each layer (B, H, P, D), moved to positions 0 and on: (B, L, 2, H, kept, D).
    One rotation moves all keys, for rotations add up."""
    gone = past[0][0].size(2) - kept                                           # positions that leave
    back = rope(torch.full((1,), -gone, device=past[0][0].device), past[0][0].size(3))
    return torch.stack([torch.stack([rotate(k[:, :, gone:], back), v[:, :, gone:]], 1) for k, v in past], 1)


class WindowAttention(gpt.Attention):
    """Attention that takes the mask of `window_mask` too. One mask for all T queries at once would be nearly empty:
    with 4,096 tokens and a window of 256 it takes 17 times as long on a CPU."""

    def attend(self, q, k, v, mask):
        if mask is None or mask.ndim < 5:
            return attend(q, k, v, mask)
        n, A, W = mask.size(1), mask.size(3), mask.size(4) - mask.size(3)
        before = k.size(2) - q.size(2) - W                                     # positions before the first window
        q = q.unflatten(2, (n, A))                                             # (B, H, n, A, D)
        k, v = (x[:, :, before:].unfold(2, W + A, A).mT for x in (k, v))       # (B, H, n, W+A, D)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))         # (B n, H, A or W+A, D)
        y = attend(q, k, v, mask.flatten(0, 1))
        return y.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)           # (B, H, T, D)


class XL(GPT):
    """A cache of the last W tokens, one key and value a layer. Two presets are this model with other settings: `window`
    slides over the length of one segment, `full` over eight, which is full attention for a text of eight segments.

    state    kv (B, L, 2, H, W+1, D) keys and values, the newest last, keys rotated to positions 0..W   n (B,) filled;
             the oldest is not looked at, it is there because half of its key belongs to the next one
    read     every layer's keys and values are [kept ; this segment], positions run on through both
    write    the last W+1 of all positions; one rotation by -S moves their keys to positions 0..W
    paper    Transformer-XL 1901.02860, section 3.2 (eq. h~ = [SG(h) ; h]); sliding window as in Longformer 2004.05150
    departs  keeps keys and values, not hidden states: old tokens are not projected again with newer weights; RoPE in
             place of the relative position terms (section 3.3). As in the paper the gradient stops at the cache;
             slide=True lets it through, so that K segments train as one banded sequence
    """
    Config, Attention = Config, WindowAttention
    parallel = property(lambda self: math.inf if self.c.slide else 1)

    def for_length(self, length):
        return dict(window=length) if self.c.window < -1 else {}              # full, and not a window of one segment

    def init_state(self, B):
        c, like = self.c, self.head.weight
        return dict(kv=like.new_zeros(B, c.layers, 2, c.heads, c.kept, c.head_dim, dtype=torch.float32),
                    n=like.new_zeros(B, dtype=torch.long))

    def read(self, state):
        kv = state["kv"] if self.c.slide else state["kv"].detach()            # SG(.) of section 3.2
        return state["n"], [layer.unbind(1) for layer in kv.unbind(1)]        # L times k, v (B, H, W+1, D)

    def extend(self, tokens, cache):
        n, past = cache
        mask = self.mask(n, past[0][0].size(2), tokens.size(1)) if self.c.W else None
        h, past = self.backbone(self.embed(tokens), past, mask)
        return self.head(h), (n, past)

    def mask(self, n, P, T):
        """Which of P + T positions each of the last T may see, given that n (B,) of the first W+1 are filled."""
        c = self.c
        if c.slide:
            return window_mask(c.kept - n, P, T, c.W, min(T, c.seg))          # a segment is a block
        i = torch.arange(P, P + T, device=n.device)[:, None]                  # (T, 1)
        j = torch.arange(P + T, device=n.device)                              # (P+T,)
        first = c.kept - n.clamp(max=c.W)[:, None, None, None]                # (B, 1, 1, 1)
        return (j <= i) & (j >= first)                                        # (B, 1, T, P+T)

    def write(self, cache, state):
        (n, past), kept = cache, self.c.kept
        S = past[0][0].size(2) - kept                                          # tokens that came in
        return dict(kv=newest(past, kept).to(state["kv"].dtype), n=(n + S).clamp(max=kept))
