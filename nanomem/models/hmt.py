"""Hierarchical Memory Transformer: RMT with a bank of its past memories, and a search that says which ones to read."""
from dataclasses import dataclass

import torch
from torch import nn

from . import rmt
from .rmt import RMT

QUERIES = ("prev", "split", "paper")


@dataclass
class Config(rmt.Config):
    bank: int = 64           # N, memories that are kept, one for each of the last N segments
    query: str = "prev"      # the half segment that asks: prev (before this one), split (its first), paper (leaks)
    search: str = "learned"  # learned, or uniform: the mean of the bank

    j = property(lambda c: max(1, c.seg // 2))                                      # tokens of the query
    tail = property(lambda c: max(c.k, c.j) if c.query == "prev" else c.k)          # tokens that the next segment needs

    def __post_init__(self):
        super().__post_init__()
        assert self.bank > 0, f"bank must hold at least one memory, got {self.bank}"
        assert self.query in QUERIES, f"query is one of {', '.join(QUERIES)}, got {self.query}"
        assert self.search in ("learned", "uniform"), f"search is learned or uniform, got {self.search}"


class HMT(RMT):
    """Three memories: the last k tokens again (sensory), M memory tokens for each segment (short-term), and a bank of
    the last N of those memories (long-term). A summary of half a segment searches the bank. What it finds, the mix P,
    stands where RMT has the newest memory.

        summary = backbone([prompt ; half a segment ; prompt]) at the last position                eq. 1
        w       = softmax over the bank of (summary Wq) (bank Wk)^T / sqrt(C)                      eq. 2
        P       = gain * sum of w bank                                                             eq. 3
        [. ; . ; h ; memory] = backbone([P ; sensory ; segment ; P]),  logits = head(h)            eq. 4-5

    state    bank (B, N, M, C) memories, the newest last   n (B,) segments so far
             ids (B, k) the last tokens of the segment before (query=prev: at least S/2), -1 at a document's start
    read     P as M tokens in front. query=prev: the end of the segment before asks. query=split: the newest memory
             stands in front, then the first half asks, and P stands between the halves
    write    the hidden states of a copy of P behind the segment; the bank moves up by one and loses its oldest memory
    paper    Hierarchical Memory Transformer 2405.06067, section 3, eq. 1-5, figure 1. Its S_n is our summary, its H our
             h
    departs  in the paper the first half of a segment asks for the P that is then put in front of that half, so that the
             half can be guessed from P: query=paper, which cannot stream and is scored only where it has not seen the
             target. P has a learned gain, which starts at 1. Wq = Wk at the start: a search for what is alike. A bank
             of N = 64 (paper: 300 or 400). M memory tokens where the paper has one; each searches its own past. The
             first segment of a document has zeros as sensory tokens. Trained from scratch, in one stage, with the loss
             of all segments (paper: a pretrained model, two stages, the last segment)
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.prompt = nn.Parameter(torch.randn(1, c.width))
        self.gain = nn.Parameter(torch.ones(1))
        self.query, self.key = (nn.Linear(c.width, c.width, bias=False) for _ in range(2))
        self.init(self.query)
        self.key.load_state_dict(self.query.state_dict())

    def init_state(self, B):
        """The learned first memory stands in the newest place until one is written; it is no entry of the bank."""
        c, zeros = self.c, self.mem.new_zeros
        bank = torch.cat([zeros(c.bank - 1, c.M, c.width), self.mem[None]]).expand(B, -1, -1, -1).clone()
        return dict(bank=bank, n=zeros(B, dtype=torch.long), ids=zeros(B, c.tail, dtype=torch.long) - 1)

    def scored(self):
        """With query=paper the first j tokens are in P, so that the first j-1 predictions have seen their target."""
        count = super().scored()
        if self.c.query == "paper":
            count[:self.c.j - 1] = False
        return count

    def sensory(self, state):
        return self.embed_previous(state["ids"][:, self.c.tail - self.c.k:])           # (B, k, C)

    def summary(self, half):
        """One vector for half a segment of embeddings (B, j, C): (B, C)."""
        prompt = self.prompt.expand(len(half), 1, -1)
        return self.backbone(torch.cat([prompt, half, prompt], 1))[0][:, -1]  # eq. 1

    def weights(self, state, tokens=None):
        """How much each token of P takes from each memory of the bank, w (B, M, N). `tokens` is the coming segment;
        query=prev needs nothing of it."""
        c, bank = self.c, state["bank"]
        score = bank.new_zeros(len(bank), c.M, c.bank)
        if c.search == "learned":
            half = self.embed_previous(state["ids"][:, c.tail - c.j:]) if c.query == "prev" else \
                self.embed(tokens[:, :c.j])
            q = self.query(self.summary(half)) @ self.key.weight              # q (bank Wk)^T = (q Wk^T) bank^T: cheaper
            score = torch.einsum("bc,bnmc->bmn", q, bank) * c.width ** -0.5   # (B, M, N)
        n = state["n"].clamp(min=1)[:, None]                                  # at first, the learned memory is there
        empty = torch.arange(c.bank, device=bank.device) < c.bank - n         # (B, N)
        return score.type_as(bank).masked_fill(empty[:, None], -torch.inf).softmax(-1)                  # eq. 2

    def recall(self, state, w):
        return self.gain * torch.einsum("bmn,bnmc->bmc", w, state["bank"])    # eq. 3

    def newest(self, state):
        return self.gain * state["bank"][:, -1]                               # (B, M, C)

    def next_state(self, memory, tokens, state):
        bank = torch.cat([state["bank"][:, 1:], memory[:, None].to(state["bank"].dtype)], 1)
        tail = tokens[:, self.c.seg - self.c.tail:].clone()
        return dict(bank=bank, n=state["n"] + 1, ids=tail)

    def read(self, state):
        assert self.c.query != "paper", "query=paper looks ahead and cannot stream: use prev or split"
        w = None if self.c.query == "split" else self.weights(state)
        P = self.newest(state) if w is None else self.recall(state, w)
        kv = self.backbone(torch.cat([P, self.sensory(state)], 1))[1]
        return P, kv, state["ids"][:, :0], state, w                           # the tokens so far, and what was searched

    def extend(self, tokens, cache):
        P, kv, seen, state, w = cache
        before, seen = seen.size(1), torch.cat([seen, tokens], 1)
        if w is not None or seen.size(1) < self.c.j:
            h, kv = self.backbone(self.embed(tokens), kv)
            return self.head(h), (P, kv, seen, state, w)
        first, second = self.embed(tokens).tensor_split([self.c.j - before], 1)    # the first half is complete: it asks
        h, kv = self.backbone(first, kv)
        w = self.weights(state, seen)
        P = self.recall(state, w)
        h2, kv = self.backbone(torch.cat([P, second], 1), kv)
        return self.head(torch.cat([h, h2[:, self.c.M:]], 1)), (P, kv, seen, state, w)

    def retrieved(self, cache):
        """For each token of a full segment the segments of whose memories P has more than an even share, as spans of
        text (B, S, N, 2), -1 for others, and how much of each (B, S, N), mean over P. The first half of query=split
        reads the newest memory, which nobody chose."""
        c, state, w = self.c, cache[3], cache[4].mean(1)                      # (B, N)
        if c.search == "uniform":
            return None
        segment = state["n"][:, None] - c.bank + torch.arange(c.bank, device=w.device)
        chosen = (segment >= 0) & (w * state["n"].clamp(max=c.bank)[:, None] > 1)
        chosen = chosen[:, None].repeat(1, c.seg, 1)                          # (B, S, N)
        if c.query == "split":
            chosen[:, :c.j] = False
        spans = torch.stack([segment, segment + 1], 2)[:, None] * c.seg
        return spans.where(chosen[..., None], -1), w[:, None] * chosen

    def write(self, cache, state):
        P, kv, seen, *_ = cache
        return self.next_state(self.backbone(P, kv)[0], seen, state)

    def forward(self, tokens, state):
        """Read, extend and write in one pass."""
        c, S = self.c, tokens.size(1)
        assert S == c.seg, f"a segment is {c.seg} tokens, got {S}"
        x, P = self.embed(tokens), self.recall(state, self.weights(state, tokens))       # (B, S, C), (B, M, C)
        sensory = self.sensory(state)
        if c.query == "split":
            parts = [self.newest(state), sensory, x[:, :c.j], P, x[:, c.j:], P]
        else:
            parts = [P, sensory, x, P]                                        # eq. 4
        h = self.backbone(torch.cat(parts, 1))[0].split([part.size(1) for part in parts], 1)
        of_tokens = torch.cat([h[2], h[4]], 1) if c.query == "split" else h[2]
        return self.head(of_tokens), self.next_state(h[-1], tokens, state)    # eq. 5
