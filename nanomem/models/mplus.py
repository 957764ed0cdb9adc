"""M+: MemoryLLM with a long-term store, where a learned search finds again what dropped out of the pool."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import memoryllm
from .gpt import norm, rope, with_previous
from .memoryllm import MemoryLLM, expand, pick


@dataclass
class Config(memoryllm.Config):
    store: int = -1          # M, vectors in the long-term store of a layer; -1 takes 16 N
    found: int = -1          # K0, vectors of the store that a segment gets to see; -1 takes N/4; 0 is MemoryLLM
    query: int = -1          # m, tokens that search the store; -1 takes K
    ask: str = "lag"         # who searches: the last m tokens of the segment before (lag), or this one's first m (self)
    search: str = "learned"  # learned, or random: what is found if the query says nothing

    M = property(lambda c: 0 if c.found == 0 or c.N == 0 else c.store if c.store >= 0 else 16 * c.N)
    K0 = property(lambda c: min(c.M, c.found if c.found >= 0 else -(-c.N // 4)))
    m = property(lambda c: c.query if c.query >= 0 else c.K)
    r = property(lambda c: max(32, c.width // 16))    # width of a key of the store

    def __post_init__(self):
        super().__post_init__()
        for name in ("store", "found", "query"):
            assert getattr(self, name) >= -1, f"{name} counts vectors, got {getattr(self, name)}"
        assert self.K <= self.M or self.M == 0, f"a store must hold the {self.K} vectors of a write, got store {self.M}"
        assert self.N > 3 or self.M == 0, f"the search learns from a pool of at least 4 vectors, got slots {self.N}"
        assert 0 < self.m <= self.seg or self.M == 0, f"query must lie between 1 and {self.seg} tokens, got {self.m}"
        assert self.ask in ("lag", "self"), f"ask is lag or self, got {self.ask}"
        assert self.search in ("learned", "random"), f"search is learned or random, got {self.search}"


class Projector(nn.Module):
    """An MLP for each layer: vectors of all layers (B, L, n, C) -> (B, L, n, r), or of one (B, n, C) -> (B, n, r)."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.Parameter(torch.randn(c.layers, c.width, 2 * c.r) * c.width ** -0.5)
        self.out = nn.Parameter(torch.randn(c.layers, 2 * c.r, c.r) * (2 * c.r) ** -0.5)

    def forward(self, x, l=slice(None)):
        return F.silu(norm(x) @ self.up[l]) @ self.out[l]


class MPlus(MemoryLLM):
    """MemoryLLM with a store of M vectors in every layer. What drops out of the pool moves there. Before each segment,
    a layer searches its store with a small network and reads the K0 best vectors in front of its pool.

    state    as MemoryLLM, and   store (B, L, M, C), store_key (B, L, M, r), store_birth (B, L, M) in any order
             query (B, L, m, r) what searches next   aux (B,) the loss of the search. `store` may be moved to the CPU's
             memory: then only what is found and what is dropped travels
    read     layer l attends to [found ; start ; pool ; segment]. Gradient never goes through the store
    write    as MemoryLLM; the store keeps the M youngest of all that was dropped
    paper    M+ 2502.00592, section 3.2. Its search is trained beside the language model; here `aux` does that
    departs  `lag` searches with the last tokens of the segment before, which is causal. The paper's search is `self`:
             the prompt searches for itself, and its first tokens see what follows (`scored`). In the paper's loss what
             the same document wrote is positive, what others wrote is negative. A batch element of ours has one
             document only: what attention looks at is positive, the rest of the pool negative. Its queries are the
             segment's tokens, m at a time. Found vectors stand before the start vector, where they shift no position;
             half of their keys come from the vector before, as in the pool. r = max(32, C/16) (paper: C/20, released
             code: C/16)
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        if c.M:
            self.f_q, self.f_k = Projector(c), Projector(c)

    def scored(self):
        """All predictions count but the first m-1 of a segment that searches for itself: they see what comes next."""
        leak = self.c.m - 1 if self.c.M and self.c.ask == "self" else 0
        return torch.arange(self.c.seg, device=self.head.weight.device) >= leak

    def init_state(self, B):
        c, zeros = self.c, self.head.weight.new_zeros
        state = super().init_state(B)
        if c.M:
            state |= dict(store=zeros(B, c.layers, c.M, c.width), store_key=zeros(B, c.layers, c.M, c.r),
                          store_birth=zeros(B, c.layers, c.M, dtype=torch.long) - 1,
                          query=zeros(B, c.layers, c.m, c.r), aux=zeros(B))
        return state

    # ---- read

    def memory(self, l, x, state):
        vectors, filled = super().memory(l, x, state)
        if not self.c.M:
            return vectors, filled
        found, birth = self.find(l, self.query(l, x, state), state)
        return torch.cat([found, vectors], 1), torch.cat([birth >= 0, filled], 1)

    def query(self, l, x, state):
        """What searches layer l's store (B, m, r), x being the layer's inputs in this segment."""
        if self.c.ask == "lag":
            return state["query"][:, l]
        assert x.size(1) >= self.c.m, f"ask=self searches with the first {self.c.m} tokens of a segment, so they " \
            f"must come in one call, got {x.size(1)}: ask=lag or query=1 can write text"
        return self.f_q(x[:, :self.c.m].detach(), l)

    def find(self, l, query, state):
        """The K0 vectors of layer l's store that score best, oldest first (B, K0, C), and their births (B, K0), -1 for
        none."""
        birth = state["store_birth"][:, l]
        best = self.score(l, query, state).masked_fill(birth < 0, -1).topk(self.c.K0)[1]
        birth, order = birth.gather(1, best).sort()
        best, store = best.gather(1, order), state["store"][:, l]
        return store.take_along_dim(best[..., None].to(store.device), 1).to(birth.device), birth

    def score(self, l, query, state):
        """s_j = mean over queries of sigmoid(<q_i, k_j>), for every vector j of layer l's store: (B, M)."""
        if self.c.search == "random":                                          # a function of the state, for replay
            return (state["store_birth"][:, l] * 7919 + state["step"][:, None] * 104_729) % 1009 / 1009
        key = state["store_key"][:, l]
        return (query @ key.mT).to(key.dtype).sigmoid().mean(1)

    def retrieved(self, cache):
        """For each token of this segment the tokens that the found vectors of all layers come from, as spans of text of
        one token (B, T, L K0, 2), -1 for none. Their weights are not known: nan (B, T, L K0)."""
        c, (state, tokens, layers) = self.c, cache
        if not c.M:
            return None
        birth = torch.cat([self.find(l, self.query(l, x, state), state)[1] for l, (*_, x) in enumerate(layers)], 1)
        start = birth // c.K * c.seg + c.seg - c.K + birth % c.K               # each write takes the last K tokens
        spans = torch.stack([start, start + 1], 2).masked_fill(birth[..., None] < 0, -1)
        spans = spans[:, None].expand(-1, tokens.size(1), -1, -1)
        return spans, torch.full(spans.shape[:3], torch.nan, device=spans.device)

    # ---- write

    def write(self, cache, state):
        _, tokens, layers = cache
        if not self.c.M:
            return super().write(cache, state)
        new, dropped, birth = self.update(self.compress(tokens, state), state)
        query = self.f_q(torch.stack([inputs for *_, inputs in layers], 1))    # (B, L, S, r)
        return new | self.move_to_store(dropped.detach(), birth, state) | dict(
            query=query[:, :, query.size(2) - self.c.m:].detach().to(state["query"].dtype, copy=True),
            aux=self.search_loss(query, self.attention_to_pool(layers), state) if self.training else state["aux"] * 0)

    def move_to_store(self, dropped, birth, state):
        """Put the K dropped vectors in the place of the store's oldest K, where those are older."""
        birth, order = birth.sort(descending=True)                             # the youngest against the oldest
        oldest, place = state["store_birth"].topk(self.c.K, largest=False)
        dropped, younger, out = pick(dropped, order), oldest < birth, {}
        for name, new in dict(store=dropped, store_key=self.f_k(dropped).detach(), store_birth=birth).items():
            old = state[name]
            new = torch.where(expand(younger, old), new.to(old), pick(old, place))
            out[name] = old.scatter(2, expand(place, old), new)
        return out

    # ---- what the search learns

    def attention_to_pool(self, layers):
        """How each token of the segment would share its attention between the start vector and the pool, mean over
        heads: the pool's part (B, L, S, N)."""
        c, shares, pool = self.c, [], slice(self.c.K0, self.c.K0 + 1 + self.c.N)
        angles = rope(torch.arange(c.seg, device=self.head.weight.device) + c.N + 1, c.head_dim)
        for block, ((k, _), filled, inputs) in zip(self.blocks, layers):
            k = (with_previous(k) if c.shift else k)[:, :, pool]               # (B, H, 1+N, D)
            q = block.attention.queries(norm(inputs), angles)                  # (B, H, S, D)
            w = (q @ k.mT).float() * c.head_dim ** -0.5                        # (B, H, S, 1+N)
            w = w.masked_fill(~filled[:, None, None, pool], -torch.inf).softmax(-1)
            shares.append(w.mean(1)[..., 1:])
        return torch.stack(shares, 1)

    def search_loss(self, query, seen, state):
        """(B,) how badly m tokens that ask together tell the vectors of the pool that they look at from the others.
        They look at a vector if it gets three times an even share of attention to a full pool. The loss is the mean of
        -log s over these and of -log(1 - s) over the others, half each, as in the released code. The paper (section
        3.2) prints s without the sigmoid; then the logarithm need not exist."""
        c, pool = self.c, state["pool"].detach()
        s = (query @ self.f_k(pool).mT).to(pool.dtype).sigmoid().unfold(2, c.m, c.m).mean(-1)     # (B, L, S/m, N)
        right = seen.unfold(2, c.m, c.m).mean(-1) > 3 / c.N
        wrong = ~right & (state["birth"][:, :, None] >= 0)
        mean = lambda x, of: (x * of).sum((1, 2, 3)) / of.sum((1, 2, 3)).clamp(min=1)
        return (mean(-(s + 1e-5).log(), right) + mean(-(1 - s + 1e-5).log(), wrong)) / 2
