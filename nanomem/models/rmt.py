"""Recurrent Memory Transformer: a few embeddings travel with every segment and come out changed."""
from dataclasses import dataclass

import torch
from torch import nn

from . import gpt
from .gpt import GPT


@dataclass
class Config(gpt.Config):
    mem: int = -1      # M, memory tokens; -1 takes one for every 8 tokens of a segment, and at least 4
    sensory: int = -1  # k, last tokens of the segment before, shown again; -1 takes an eighth of a segment

    M = property(lambda c: c.mem if c.mem >= 0 else max(4, c.seg // 8))
    k = property(lambda c: c.sensory if c.sensory >= 0 else c.seg // 8)

    def __post_init__(self):
        super().__post_init__()
        assert self.mem >= -1, f"mem counts memory tokens, got {self.mem}"
        assert -1 <= self.sensory <= self.seg, f"sensory is a part of the {self.seg} tokens before, got {self.sensory}"


class RMT(GPT):
    """M memory tokens stand in front of the segment, where every token can read them, and once more behind it, where
    they see everything. The hidden states of the copy behind are the next memory.

    state    mem (B, M, C)   ids (B, k) the last tokens of the segment before, -1 at the start of a document
    read     the copy in front: M ordinary positions of the causal sequence [mem ; sensory ; segment ; mem]
    write    the last hidden states of the copy behind; no logit of this segment sees them
    paper    Recurrent Memory Transformer 2207.06881, section 3.2 and figure 2
    departs  the last k tokens are shown again, as in HMT, so that the two models differ by the search and its gain
             (sensory=0 is the paper; zeros at the start of a document); no Transformer-XL cache beside the memory (the
             paper tries both); the tokens of one copy see each other causally (in the paper both ways), so that the
             fused kernel needs no mask; embeddings have unit RMS, as hidden states do, so that the memory needs no gain
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.mem = nn.Parameter(torch.randn(c.M, c.width))

    def init_state(self, B):
        return dict(mem=self.mem.expand(B, -1, -1).clone(),
                    ids=torch.full((B, self.c.k), -1, device=self.mem.device))

    def embed_previous(self, ids):
        """Embeddings of tokens of the segment before; zeros where there was none, so that shapes never change."""
        return self.embed(ids.clamp(min=0)) * (ids >= 0)[..., None]           # (B, k, C)

    def read(self, state):
        front = torch.cat([state["mem"], self.embed_previous(state["ids"])], 1)    # (B, M+k, C)
        return state["ids"], self.backbone(front)[1]

    def extend(self, tokens, cache):
        ids, cache = cache
        logits, cache = super().extend(tokens, cache)
        return logits, (torch.cat([ids, tokens], 1)[:, tokens.size(1):], cache)    # the last k tokens so far

    def write(self, cache, state):
        ids, cache = cache
        h, _ = self.backbone(state["mem"], cache)
        return dict(mem=h.to(state["mem"].dtype), ids=ids.clone())

    def forward(self, tokens, state):
        """Read, extend and write in one pass over [mem ; sensory ; tokens ; mem]."""
        c, S, mem = self.c, tokens.size(1), state["mem"]
        assert S == c.seg, f"a segment is {c.seg} tokens, got {S}"
        x = torch.cat([mem, self.embed_previous(state["ids"]), self.embed(tokens), mem], 1)   # (B, M+k+S+M, C)
        h, _ = self.backbone(x)
        _, h, after = h.split([c.M + c.k, S, c.M], 1)
        return self.head(h), dict(mem=after.to(mem.dtype, copy=True), ids=tokens[:, S - c.k:].clone())
