"""MemoryLLM and M+: every layer keeps a pool of its own outputs that forgets at random; M+ catches what falls out."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, angles, norm, rotate

DRAWS = 256   # different drops that the table holds


@dataclass
class Config(gpt.Config):
    rows: int = -1     # K, rows of a segment that go into memory, in every layer; -1 takes half of the segment
    slots: int = -1    # N, vectors in the pool of a layer; -1 takes 8 K
    store: int = -1    # M, vectors in the long-term store of a layer; -1 takes 16 N, 0 is MemoryLLM
    found: int = -1    # K0, vectors of the store that a segment gets to see; -1 takes N/4
    query: int = -1    # m, rows of text that search the store; -1 takes K
    ask: str = "lag"   # which rows search: the last ones of the segment before (lag), or this one's first (self)

    N = property(lambda c: c.slots if c.slots >= 0 else 8 * c.K)
    K = property(lambda c: c.rows if c.rows >= 0 else 0 if c.slots == 0 else -(-c.seg // 2))
    M = property(lambda c: 0 if c.found == 0 else c.store if c.store >= 0 else 16 * c.N)
    K0 = property(lambda c: min(c.M, c.found if c.found >= 0 else -(-c.N // 4)))
    m = property(lambda c: c.query if c.query >= 0 else c.K)
    r = property(lambda c: max(32, c.width // 16))    # width of a key of the store

    def __post_init__(self):
        super().__post_init__()
        for name in ("rows", "slots", "store", "found", "query"):
            assert getattr(self, name) >= -1, f"{name} counts vectors, got {getattr(self, name)}"
        assert self.K <= min(self.seg, self.N), \
            f"rows must fit into a segment of {self.seg} and a pool of {self.N}, got {self.K}"
        assert self.K > 0 or self.N == 0, f"a pool of {self.N} slots needs rows > 0, got 0"
        assert self.K <= self.M or self.M == 0, f"a store must hold the {self.K} rows of a write, got store {self.M}"
        assert 0 < self.m <= self.seg or self.M == 0, f"query must lie between 1 and {self.seg} rows, got {self.m}"
        assert self.ask in ("lag", "self"), f"ask is lag or self, got {self.ask}"


class Projector(nn.Module):
    """An MLP for each layer. Rows of all, (B, L, n, C) -> (B, L, n, r), or of layer l alone, (B, n, C) -> (B, n, r)."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.Parameter(torch.randn(c.layers, c.width, 2 * c.r) * c.width ** -0.5)
        self.out = nn.Parameter(torch.randn(c.layers, 2 * c.r, c.r) * (2 * c.r) ** -0.5)

    def forward(self, x, l=slice(None)):
        return F.silu(norm(x) @ self.up[l]) @ self.out[l]


def wide(index, x):
    """index (B, L, n) in the form in which gather and scatter take it for x (B, L, N) or (B, L, N, C)."""
    return index.view(*index.shape, *[1] * (x.ndim - 3)).expand(*index.shape, *x.shape[3:]).to(x.device)


def pick(x, index):
    return x.gather(2, wide(index, x))


class MPlus(GPT):
    """A pool of N vectors in every layer, which its tokens read as more keys and values. The last K rows of a segment,
    as the layer put them out, come in, and K others, drawn at random, drop out: a vector is still there after t writes
    with probability (1 - K/N)^t. M+ moves what drops out to a store and searches it; `memoryllm` has no store.

    state    pool (B, L, N, C) oldest first   birth (B, L, N) running number of a vector, -1 where there is none yet
             step (B,) writes so far, counted from another number in each row, so that rows draw differently
             old (B, L, M, C), key (B, L, M, r), old_birth (B, L, M) the store   probe (B, L, m, r) its next query
             aux (B,) the searcher's loss. `old` may be moved to the host: what is found and what drops out then travels
    read     layer l attends to [found ; start ; pool ; segment]: K0 vectors of the store, a learned row, N vectors, all
             of them keys and values only. Gradient goes through the pool into its writes, and never through the store
    write    a second pass, with the K newest of the pool (detached) in front and the marker p on the last K rows: what
             these become in a layer goes into its pool, K drop out, and the store keeps the M youngest of all dropped
    paper    MemoryLLM 2402.04624, section 3.1 (forgetting: eq. 3-5); M+ 2502.00592, section 3.2
    departs  everything is trained, from scratch, in place of LoRA on Llama, one set of weights for both passes; drops
             come from a table. `lag` searches with the last rows of the segment before, which is causal; the paper's
             search is `self`: the prompt searches for itself, and its first rows see what follows (`scored`). In the
             searcher's loss the paper calls right what was written by the same document, wrong what by others; a row of
             ours reads one book, and right is what attention looks at. Found rows stand before the start row, where
             they shift nothing; places that are still empty are masked, not noise
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.start = nn.Parameter(torch.randn(c.layers, min(1, c.N), c.width))
        self.marker = nn.Parameter(torch.zeros(c.width))                      # p
        if c.M:
            self.f_q, self.f_k = Projector(c), Projector(c)
        dice = torch.rand(DRAWS, c.layers, c.N, generator=torch.Generator().manual_seed(0)).argsort(-1)
        kept, gone = dice.split([c.N - c.K, c.K], 2)
        self.register_buffer("dice", torch.cat([kept.sort()[0], gone], 2), persistent=False)   # (DRAWS, L, N)

    def scored(self):
        """Which of a segment's S predictions count: not the first m-1 of a search that shows them what comes next."""
        leak = self.c.m - 1 if self.c.M and self.c.ask == "self" else 0
        return torch.arange(self.c.seg, device=self.head.weight.device) >= leak

    def init_state(self, B):
        c, new = self.c, self.head.weight.new_zeros
        none = lambda n: new(B, c.layers, n, dtype=torch.long) - 1
        state = dict(pool=new(B, c.layers, c.N, c.width), birth=none(c.N),
                     step=torch.arange(B, device=self.head.weight.device) * 101 % DRAWS)
        if c.M:
            state |= dict(old=new(B, c.layers, c.M, c.width), key=new(B, c.layers, c.M, c.r), old_birth=none(c.M),
                          probe=new(B, c.layers, c.m, c.r), aux=new(B))
        return state

    # ---- read

    def read(self, state):
        return state, state["step"].new_zeros(len(state["step"]), 0), []

    def extend(self, tokens, cache):
        state, page, layers = cache          # page (B, t): the segment so far; layers: what each has seen of it
        t, T, c = page.size(1), tokens.size(1), self.c
        x, longer = self.embed(tokens), []
        turn = angles(torch.arange(t, t + T, device=x.device) + min(1, c.N) + c.N, c.head_dim)
        for l, block in enumerate(self.blocks):
            rows, past, real = layers[l] if layers else (x[:, :0], *self.past(l, x, state))
            rows = torch.cat([rows, x], 1).detach()
            x, past = block(x, turn, past, self.mask(real, t, T))
            longer.append((rows, past, real))
        return self.head(norm(x)), (state, torch.cat([page, tokens], 1), longer)

    def past(self, l, x, state):
        """Layer l's keys and values (B, H, P, D) of its P rows [found ; start ; pool], and which are real (B, P)."""
        c = self.c
        if not c.N:
            return None, None
        rows, real = state["pool"][:, l], state["birth"][:, l] >= 0
        start = self.start[l].expand(len(x), 1, -1)
        rows, real = torch.cat([start, rows], 1), F.pad(real, (1, 0), value=True)
        if c.M:
            probe = state["probe"][:, l] if c.ask == "lag" else self.f_q(x[:, :c.m].detach(), l)
            found, good = self.search(l, probe, state)
            rows, real = torch.cat([found, rows], 1), torch.cat([good, real], 1)
        return self.memory(l, rows, -c.K0), real

    def memory(self, l, rows, first):
        """Keys and values that layer l makes of memory rows (B, P, C) at positions first, first + 1, ..."""
        qkv, H = self.blocks[l].attention.qkv, self.c.heads
        kv = F.linear(norm(rows), qkv.weight[self.c.width:])                  # a memory has no query
        k, v = kv.view(*rows.shape[:2], 2 * H, -1).transpose(1, 2).chunk(2, 1)                   # (B, H, P, D)
        turn = angles(torch.arange(first, first + rows.size(1), device=rows.device), self.c.head_dim)
        return rotate(norm(k), turn).type_as(v), v

    def mask(self, real, t, T):
        """What T rows may look at behind t others of their segment: memory rows that are real, and what came before."""
        if real is None:
            return None
        causal = torch.ones(T, t + T, dtype=torch.bool, device=real.device).tril(t)
        return torch.cat([real[:, None].expand(-1, T, -1), causal.expand(len(real), -1, -1)], 2)[:, None]

    def search(self, l, probe, state):
        """The K0 vectors of layer l's store that score best, oldest first (B, K0, C), and which are real (B, K0)."""
        birth = state["old_birth"][:, l]
        best = self.score(l, probe, state).masked_fill(birth < 0, -1).topk(self.c.K0)[1]
        birth, order = birth.gather(1, best).sort()
        best, old = best.gather(1, order), state["old"][:, l]
        return torch.take_along_dim(old, best[..., None].to(old.device), 1).to(birth.device), birth >= 0

    def score(self, l, probe, state):
        """s_j = mean over queries of sigmoid(<q_i, k_j>), for every vector j of layer l's store: (B, M)."""
        key = state["key"][:, l]
        return (probe @ key.mT).to(key.dtype).sigmoid().mean(1)

    # ---- write

    def write(self, cache, state):
        _, page, layers = cache
        c, step, new = self.c, state["step"], []
        if not c.N:
            return dict(state)
        x, P, S = self.embed(page), c.K + 1, page.size(1)
        near, real = state["pool"][:, :, c.N - c.K:].detach(), state["birth"][:, :, c.N - c.K:] >= 0
        mark = F.pad(self.marker.expand(c.K, -1), (0, 0, S - c.K, 0))
        turn = angles(torch.arange(P, P + S, device=x.device), c.head_dim)
        for l, block in enumerate(self.blocks):
            rows = torch.cat([self.start[l].expand(len(x), 1, -1), near[:, l]], 1)
            mask = self.mask(F.pad(real[:, l], (1, 0), value=True), 0, S)
            x, _ = block(x + mark, turn, self.memory(l, rows, 0), mask)
            new.append(x[:, S - c.K:])                                        # E_l
        draw, new = self.dice[step % DRAWS], torch.stack(new, 1).to(state["pool"].dtype)   # (B, L, N), (B, L, K, C)
        kept, gone = pick(state["pool"], draw).split([c.N - c.K, c.K], 2)
        birth, death = pick(state["birth"], draw).split([c.N - c.K, c.K], 2)
        now = step[:, None, None] * c.K + torch.arange(c.K, device=x.device)
        out = dict(pool=torch.cat([kept, new], 2), birth=torch.cat([birth, now.expand(-1, c.layers, -1)], 2),
                   step=step + 1)
        if c.M:
            out |= self.shelve(gone.detach(), death, state)
            query = self.f_q(torch.stack([rows for rows, *_ in layers], 1))                       # (B, L, S, r)
            out |= dict(probe=query[:, :, S - c.m:].detach().to(state["probe"].dtype, copy=True),
                        aux=self.loss(query, self.looked(layers), state) if self.training else state["aux"] * 0)
        return out

    def shelve(self, gone, death, state):
        """Put K dropped vectors into the store, in place of its oldest K where those are older than they."""
        death, order = death.sort(descending=True)                            # the youngest against the oldest
        birth, place = state["old_birth"].topk(self.c.K, largest=False)
        gone, younger, out = pick(gone, order), birth < death, {}
        for name, new in dict(old=gone, key=self.f_k(gone).detach(), old_birth=death).items():
            was = state[name]
            new = torch.where(wide(younger, was), new.to(was), pick(was, place))
            out[name] = was.scatter(2, wide(place, was), new)
        return out

    # ---- what the searcher learns

    def looked(self, layers):
        """How each row of the segment would share its attention between the start row and the pool, mean over heads."""
        c, shares, pool = self.c, [], slice(self.c.K0, self.c.K0 + 1 + self.c.N)
        turn = angles(torch.arange(c.seg, device=self.head.weight.device) + c.N + 1, c.head_dim)
        for block, (rows, (k, _), real) in zip(self.blocks, layers):
            q = F.linear(norm(rows), block.attention.qkv.weight[:c.width])
            q = rotate(norm(q.view(*rows.shape[:2], c.heads, -1).transpose(1, 2)), turn).type_as(k)
            w = (q @ k[:, :, pool].mT).float() * c.head_dim ** -0.5                               # (B, H, S, 1+N)
            shares.append(w.masked_fill(~real[:, None, None, pool], -torch.inf).softmax(-1).mean(1)[..., 1:])
        return torch.stack(shares, 1)                                                             # (B, L, S, N)

    def loss(self, query, seen, state):
        """(B,) how badly m rows of the segment, asking together, tell the vectors of the pool that they look at, with
        three times an even share of attention, from the others: the mean of -log s over the former and of -log(1 - s)
        over the latter, half each (M+, section 3.2)."""
        c, pool = self.c, state["pool"].detach()
        s = (query @ self.f_k(pool).mT).to(pool.dtype).sigmoid().unfold(2, c.m, c.m).mean(-1)     # (B, L, S/m, N)
        right = seen.unfold(2, c.m, c.m).mean(-1) > 3 / c.N
        wrong = ~right & (state["birth"][:, :, None] >= 0)
        mean = lambda x, of: (x * of).sum((1, 2, 3)) / of.sum((1, 2, 3)).clamp(min=1)
        return (mean(-(s + 1e-5).log(), right) + mean(-(1 - s + 1e-5).log(), wrong)) / 2
