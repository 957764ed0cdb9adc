"""Sliding window, Transformer-XL and full attention: the keys and values of the last W tokens, kept as they are."""
import math
from dataclasses import dataclass

import torch

from . import gpt
from .gpt import GPT, angles, band, rotate


@dataclass
class Config(gpt.Config):
    window: int = -1     # W, tokens of the past that are kept; -n keeps n segments
    slide: bool = False  # each token sees itself and the W before it; if not, all W kept and its segment so far

    W = property(lambda c: c.window if c.window >= 0 else -c.window * c.seg)

    def __post_init__(self):
        super().__post_init__()
        assert self.W > 0 or not self.slide, "a sliding window needs window > 0, got 0"


class XL(GPT):
    """A cache of the last W tokens, one key and value a layer. Two presets are this model with other settings: `window`
    slides over one segment's length, `full` over eight, which is full attention for the length of a training window.

    state    kv (B, L, 2, H, W, D) keys and values, the newest last, keys turned to positions 0..W-1   n (B,) filled
    read     every layer's keys and values are [kept ; this segment], positions run on through both
    write    the last W of the W + S positions; one turn by -S moves their keys to positions 0..W-1
    paper    Transformer-XL 1901.02860, section 3.2 (eq. h~ = [SG(h) ; h]); sliding window as in Longformer 2004.05150
    departs  keeps keys and values, not hidden states: old tokens are not projected again with newer weights; RoPE in
             place of the relative position terms (section 3.3). As in the paper the gradient stops at the cache;
             slide=True lets it through, so that K segments train as one banded sequence
    """
    Config = Config
    parallel = property(lambda model: math.inf if model.c.slide else 1)

    def init_state(self, B):
        c, like = self.c, self.head.weight
        return dict(kv=like.new_zeros(B, c.layers, 2, c.heads, c.W, c.head_dim, dtype=torch.float32),
                    n=like.new_zeros(B, dtype=torch.long))

    def read(self, state):
        kv = state["kv"] if self.c.slide else state["kv"].detach()            # SG(.) of section 3.2
        return state["n"], [layer.unbind(1) for layer in kv.unbind(1)]        # L times k, v (B, H, W, D)

    def extend(self, tokens, cache):
        n, past = cache
        mask = self.mask(n, past[0][0].size(2), tokens.size(1)) if self.c.W else None
        h, past = self.trunk(self.embed(tokens), past, mask)
        return self.head(h), (n, past)

    def mask(self, n, P, T):
        """Which of P + T positions each of the last T may see, given that n (B,) of the first W are filled."""
        W = self.c.W
        if T > self.c.seg:                                                    # several segments, a block each
            return band(W - n, P, T, W, self.c.seg)
        i = torch.arange(P, P + T, device=n.device)[:, None]                  # (T, 1)
        j = torch.arange(P + T, device=n.device)                              # (P+T,)
        seen = j <= i                                                         # (T, P+T) causal
        if self.c.slide:
            seen &= j >= i - W                                                # banded
        return seen & (j >= W - n[:, None, None, None])                       # (B, 1, T, P+T)

    def write(self, cache, state):
        n, past = cache
        W, S = self.c.W, past[0][0].size(2) - self.c.W
        turn = angles(torch.full((1,), -S, device=n.device), self.c.head_dim)
        kv = torch.stack([torch.stack([rotate(k[:, :, S:], turn), v[:, :, S:]], 1) for k, v in past], 1)
        return dict(kv=kv.to(state["kv"].dtype), n=(n + S).clamp(max=W))
