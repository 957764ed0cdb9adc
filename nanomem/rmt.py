"""Recurrent Memory Transformer: a few embeddings ride along with every segment and come out changed."""
from dataclasses import dataclass

import torch
from torch import nn

from . import gpt
from .gpt import GPT


@dataclass
class Config(gpt.Config):
    mem: int = -1   # M, memory tokens; -1 takes one for every 8 tokens of a segment, and at least 4

    M = property(lambda c: c.mem if c.mem >= 0 else max(4, c.seg // 8))

    def __post_init__(self):
        super().__post_init__()
        assert self.mem >= -1, f"mem counts memory tokens, got {self.mem}"


class RMT(GPT):
    """M memory tokens stand before the segment, where every token can read them, and once more behind it, where they
    can see everything and are rewritten: what the trunk makes of the copies behind is the next memory.

    state    mem (B, M, C)
    read     the copy in front is M ordinary rows of the causal sequence [mem ; segment ; mem]
    write    the last hidden states of the copy behind, M_{n+1}; no logit of this segment sees them
    paper    Recurrent Memory Transformer 2207.06881, section 3.2 and figure 2
    departs  no Transformer-XL cache beside the memory (the paper tries both); the rows of one copy see each other
             causally (in the paper both ways), so that the fused kernel needs no mask; our embeddings have unit RMS as
             hidden states do, so that the memory needs no gain
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.mem = nn.Parameter(torch.randn(c.M, c.width))

    def init_state(self, B):
        return dict(mem=self.mem.expand(B, -1, -1).clone())

    def read(self, state):
        return self.trunk(state["mem"])[1]

    def write(self, cache, state):
        h, _ = self.trunk(state["mem"], cache)
        return dict(mem=h.to(state["mem"].dtype))

    def forward(self, tokens, state):
        """Read, extend and write in one pass over [mem ; tokens ; mem]."""
        M, T, mem = self.c.M, tokens.size(1), state["mem"]
        assert T == self.c.seg, f"a segment is {self.c.seg} tokens, got {T}"
        h, _ = self.trunk(torch.cat([mem, self.embed(tokens), mem], 1))       # (B, M+S+M, C)
        return self.head(h[:, M:M + T]), dict(mem=h[:, M + T:].to(mem.dtype, copy=True))
