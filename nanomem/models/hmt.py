"""Hierarchical Memory Transformer: RMT with a bank of its past memories, and a search that says which ones to read."""
from dataclasses import dataclass

import torch
from torch import nn

from . import gpt
from .gpt import GPT

QUERIES = ("prev", "split", "paper")


@dataclass
class Config(gpt.Config):
    mem: int = -1            # M, memory tokens; -1 takes one for every 8 tokens of a segment, and at least 4
    sensory: int = -1        # k, last tokens of the segment before that are read again; -1 takes an eighth of a segment
    bank: int = 64           # N, memories that are kept, one of each of the last N segments
    query: str = "prev"      # half a segment that asks: prev (before this one), split (its first), paper (looks ahead)
    search: str = "learned"  # learned, or uniform: the mean of the bank

    M = property(lambda c: c.mem if c.mem >= 0 else max(4, c.seg // 8))
    k = property(lambda c: c.sensory if c.sensory >= 0 else c.seg // 8)
    j = property(lambda c: max(1, c.seg // 2))                                      # tokens of the query
    tail = property(lambda c: max(c.k, c.j) if c.query == "prev" else c.k)          # tokens that the next segment needs

    def __post_init__(self):
        super().__post_init__()
        assert self.mem >= -1, f"mem counts memory tokens, got {self.mem}"
        assert -1 <= self.sensory <= self.seg, f"sensory is a part of the {self.seg} tokens before, got {self.sensory}"
        assert self.bank > 0, f"bank must hold at least one memory, got {self.bank}"
        assert self.query in QUERIES, f"query is one of {', '.join(QUERIES)}, got {self.query}"
        assert self.search in ("learned", "uniform"), f"search is learned or uniform, got {self.search}"


class HMT(GPT):
    """Three memories: the last k tokens again (sensory), one memory of M rows a segment (short-term), and a bank of the
    last N of those (long-term). A summary of half a segment searches the bank; the mix that it finds, P, stands where
    RMT has the newest memory.

        S = trunk([prompt ; half a segment ; prompt]) at the last row                              eq. 1
        w = softmax over the bank of (S Wq) (bank Wk)^T / sqrt(C)                                  eq. 2
        P = gain sum of w bank                                                                     eq. 3
        [. ; . ; H ; memory] = trunk([P ; sensory ; segment ; P]),  logits = head(H)               eq. 4-5

    state    bank (B, N, M, C) memories, the newest last   n (B,) filled
             ids (B, k or S/2) the last tokens of the segment before, -1 where a book has just begun
    read     P as M rows in front. query=prev: the end of the last segment asks. split: the newest memory in front, then
             the first half asks, and P stands between the halves
    write    what the trunk makes of a copy of P behind; the bank moves up by one and the oldest memory is gone
    paper    Hierarchical Memory Transformer 2405.06067, section 3, eq. 1-5, figure 1
    departs  the paper's own query is the first half of the segment that P is then put in front of, so that this half
             can be guessed from P: query=paper, which cannot stream, and is scored on clean positions only. A learned
             gain on P, from 1, since our embeddings have unit RMS as hidden states do; Wq = Wk at the start, a search
             for what is alike; M rows where the paper has one, each searching its own past; a book's first segment has
             rows of zeros as sensory tokens; the summary is made in every segment's own call, also where there is no
             choice yet, not for all segments of a window at once (on a CPU that is no faster from 8 rows on)
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.mem = nn.Parameter(torch.randn(c.M, c.width))
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
        count[:self.c.j - 1] &= self.c.query != "paper"
        return count

    def embed_previous(self, ids):
        """Tokens of the segment before, embedded anew; zeros where there was none, so that shapes never change."""
        return self.embed(ids.clamp(min=0)) * (ids >= 0)[..., None]           # (B, k or j, C)

    def sensory(self, state):
        return self.embed_previous(state["ids"][:, self.c.tail - self.c.k:])           # (B, k, C)

    def weights(self, state, tokens=None):
        """How much each row of P takes from each memory of the bank, w (B, M, N). `tokens` is the coming segment, of
        which query=prev needs nothing."""
        c, bank = self.c, state["bank"]
        empty = torch.arange(c.bank, device=bank.device) < c.bank - state["n"].clamp(min=1)[:, None]    # (B, N)
        score = bank.new_zeros(len(bank), c.M, c.bank)
        if c.search == "learned":
            half = self.embed_previous(state["ids"][:, c.tail - c.j:]) if c.query == "prev" else self.embed(tokens[:, :c.j])
            prompt = self.prompt.expand(len(bank), 1, -1)
            S = self.backbone(torch.cat([prompt, half, prompt], 1))[0][:, -1]    # (B, C)  eq. 1
            q = self.query(S) @ self.key.weight                               # q (bank Wk)^T = (q Wk^T) bank^T: no keys
            score = torch.einsum("bc,bnmc->bmn", q, bank) * c.width ** -0.5   # (B, M, N)
        return score.type_as(bank).masked_fill(empty[:, None], -torch.inf).softmax(-1)    # eq. 2

    def recall(self, state, tokens=None):
        return self.gain * torch.einsum("bmn,bnmc->bmc", self.weights(state, tokens), state["bank"])    # eq. 3

    def newest(self, state):
        return self.gain * state["bank"][:, -1]                               # (B, M, C)

    def next_state(self, memory, tokens, state):
        bank = torch.cat([state["bank"][:, 1:], memory[:, None].to(state["bank"].dtype)], 1)
        tail = tokens[:, self.c.seg - self.c.tail:].clone()
        return dict(bank=bank, n=(state["n"] + 1).clamp(max=self.c.bank), ids=tail)

    def read(self, state):
        assert self.c.query != "paper", "query=paper looks ahead and cannot stream: use prev or split"
        split = self.c.query == "split"
        P = self.newest(state) if split else self.recall(state)
        kv = self.backbone(torch.cat([P, self.sensory(state)], 1))[1]
        return P, kv, state["ids"][:, :0], state if split else None           # the tokens so far, and what to search

    def extend(self, tokens, cache):
        P, kv, page, state = cache
        page = torch.cat([page, tokens], 1)
        if state is None or page.size(1) < self.c.j:
            h, kv = self.backbone(self.embed(tokens), kv)
            return self.head(h), (P, kv, page, state)
        half = self.c.j - page.size(1) + tokens.size(1)                       # these tokens make the first half whole
        h, kv = self.backbone(self.embed(tokens[:, :half]), kv)
        P = self.recall(state, page)
        rest, kv = self.backbone(torch.cat([P, self.embed(tokens[:, half:])], 1), kv)
        return self.head(torch.cat([h, rest[:, self.c.M:]], 1)), (P, kv, page, None)

    def write(self, cache, state):
        P, kv, page, _ = cache
        return self.next_state(self.backbone(P, kv)[0], page, state)

    def forward(self, tokens, state):
        """Read, extend and write in one pass."""
        c, S = self.c, tokens.size(1)
        assert S == c.seg, f"a segment is {c.seg} tokens, got {S}"
        x, P, sensory, first = self.embed(tokens), self.recall(state, tokens), self.sensory(state), c.M + c.k
        if c.query == "split":
            rows = torch.cat([self.newest(state), sensory, x[:, :c.j], P, x[:, c.j:], P], 1)    # (B, M+k+j+M+S-j+M, C)
            h = self.backbone(rows)[0]
            h = torch.cat([h[:, :first + c.j], h[:, first + c.j + c.M:]], 1)                    # without P in between
        else:
            h = self.backbone(torch.cat([P, sensory, x, P], 1))[0]                                 # (B, M+k+S+M, C)  eq. 4
        return self.head(h[:, first:first + S]), self.next_state(h[:, first + S:], tokens, state)    # eq. 5
