"""MemoryLLM: every layer keeps a pool of its own outputs. Each write puts K vectors in and drops K others at random."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, norm, rope

TABLE = 256   # random choices of what to drop that the table holds; a write uses the one at its number, modulo 256


@dataclass
class Config(gpt.Config):
    new: int = -1      # K, last tokens of a segment that go into the pool of every layer; -1 takes half of the segment
    slots: int = -1    # N, vectors in the pool of a layer; -1 takes 8 K; 0 is no memory

    N = property(lambda c: c.slots if c.slots >= 0 else 8 * c.K)
    K = property(lambda c: c.new if c.new >= 0 else 0 if c.slots == 0 else -(-c.seg // 2))

    def __post_init__(self):
        super().__post_init__()
        for name in ("new", "slots"):
            assert getattr(self, name) >= -1, f"{name} counts vectors, got {getattr(self, name)}"
        assert self.K <= min(self.seg, self.N), \
            f"new must fit into a segment of {self.seg} and a pool of {self.N}, got {self.K}"
        assert self.K > 0 or self.N == 0, f"a pool of {self.N} slots needs new > 0, got 0"


def expand(index, x):
    """index (B, L, n) as gather and scatter want it for x (B, L, N) or (B, L, N, C)."""
    return index.view(*index.shape, *[1] * (x.ndim - 3)).expand(*index.shape, *x.shape[3:]).to(x.device)


def pick(x, index):
    """The vectors of x (B, L, N, C), or numbers of x (B, L, N), at index (B, L, n)."""
    return x.gather(2, expand(index, x))


class MemoryLLM(GPT):
    """A pool of N vectors in every layer, which its tokens read as more keys and values. The hidden states of a
    segment's last K tokens, as the layer puts them out, come in; K others, drawn at random, drop out. So a vector is
    still there after t writes with probability (1 - K/N)^t.

    state    pool (B, L, N, C) oldest first   birth (B, L, N) the running number of each vector, -1: empty   step (B,)
             how many writes there were, which decides what drops out
    read     layer l attends to [start ; pool ; segment]: a learned vector and N vectors, as keys and values only. Their
             gradient goes back into the segment that wrote them
    write    a second pass over the segment, with start and the K newest vectors of the pool (detached) in front and the
             marker p added to its last K tokens, in every layer. What these become in a layer goes into its pool
    paper    MemoryLLM 2402.04624, section 3.1 (write: figure 2; forgetting: eq. 3-5). K and N as there
    departs  trained from scratch on the next token, all weights, one set of them for both passes, where the paper adds
             LoRA to Llama and has three ways to train; gradient goes through all writes of a BPTT window (paper:
             through one, in one of the three). Half of a key comes from whichever vector stands before it, as half
             comes from the token before in all our models. N is 8 K (paper: 30 K). What drops out comes from a table of
             random choices, so that replay and resume repeat it. Empty slots are masked (in the paper: random vectors)
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.start = nn.Parameter(torch.randn(c.layers, min(1, c.N), c.width))
        self.marker = nn.Parameter(torch.zeros(c.width))                       # p
        order = torch.rand(TABLE, c.layers, c.N, generator=torch.Generator().manual_seed(0)).argsort(-1)
        kept, dropped = order.split([c.N - c.K, c.K], 2)
        self.register_buffer("table", torch.cat([kept.sort()[0], dropped], 2), persistent=False)   # (TABLE, L, N)

    def init_state(self, B):
        c, zeros = self.c, self.head.weight.new_zeros
        return dict(pool=zeros(B, c.layers, c.N, c.width), birth=zeros(B, c.layers, c.N, dtype=torch.long) - 1,
                    step=zeros(B, dtype=torch.long))

    # ---- read

    def memory(self, l, x, state):
        """What layer l reads besides the segment, x being its input (B, T, C): vectors (B, P, C), the last of which
        stands just before the segment, and which of them are filled (B, P)."""
        start = self.start[l].expand(len(x), 1, -1)
        return torch.cat([start, state["pool"][:, l]], 1), F.pad(state["birth"][:, l] >= 0, (1, 0), value=True)

    def keys_values(self, l, vectors, end):
        """The keys and values (B, H, P, D) that layer l makes of memory (B, P, C), at the positions before `end`."""
        angles = rope(torch.arange(end - vectors.size(1), end, device=vectors.device), self.c.head_dim)
        return self.blocks[l].attention.keys_values(norm(vectors), angles)

    def mask(self, filled, t, T):
        """What T tokens behind t others of their segment may look at (B, 1, T, P+t+T): memory that is filled, and the
        tokens before them."""
        causal = torch.ones(T, t + T, dtype=torch.bool, device=filled.device).tril(t)
        return torch.cat([filled[:, None].expand(-1, T, -1), causal.expand(len(filled), -1, -1)], 2)[:, None]

    def read(self, state):
        return state, state["step"].new_zeros(len(state["step"]), 0), []

    def begin(self, l, x, state):
        """Layer l where a segment begins: the keys and values of its memory, what of it is filled, no inputs so far."""
        if not self.c.N:
            return None, None, x[:, :0]
        vectors, filled = self.memory(l, x, state)
        return self.keys_values(l, vectors, self.c.N + 1), filled, x[:, :0]

    def extend(self, tokens, cache):
        """The cache: the state, the segment's tokens so far (B, t), and for each layer its keys and values, which of
        the memory is filled, and its inputs so far (B, t, C), with which M+ searches."""
        state, before, layers = cache
        c, t, T = self.c, before.size(1), tokens.size(1)
        x, longer, first = self.embed(tokens), [], c.N + min(1, c.N)           # where the segment begins
        angles = rope(torch.arange(first + t, first + t + T, device=x.device), c.head_dim)
        for l, block in enumerate(self.blocks):
            past, filled, inputs = layers[l] if layers else self.begin(l, x, state)
            inputs = torch.cat([inputs, x], 1).detach()
            x, past = block(x, angles, past, self.mask(filled, t, T) if c.N else None)
            longer.append((past, filled, inputs))
        return self.head(norm(x)), (state, torch.cat([before, tokens], 1), longer)

    # ---- write

    def compress(self, tokens, state):
        """The second pass over a full segment (B, S): what its last K tokens become in each layer, (B, L, K, C)."""
        c, S, new = self.c, tokens.size(1), []
        x, P = self.embed(tokens), 1 + c.K
        newest, filled = state["pool"][:, :, c.N - c.K:].detach(), state["birth"][:, :, c.N - c.K:] >= 0
        marker = F.pad(self.marker.expand(c.K, -1), (0, 0, S - c.K, 0))        # (S, C), zeros but for the last K
        angles = rope(torch.arange(P, P + S, device=x.device), c.head_dim)
        for l, block in enumerate(self.blocks):
            vectors = torch.cat([self.start[l].expand(len(x), 1, -1), newest[:, l]], 1)
            mask = self.mask(F.pad(filled[:, l], (1, 0), value=True), 0, S)
            x, _ = block(x + marker, angles, self.keys_values(l, vectors, P), mask)
            new.append(x[:, S - c.K:])                                         # (B, K, C), for the pool of layer l
        return torch.stack(new, 1).to(state["pool"].dtype)

    def update(self, new, state):
        """Drop K vectors of each layer and append new (B, L, K, C): the next state, and what was dropped with its
        births, (B, L, K, C) and (B, L, K)."""
        c, step = self.c, state["step"]
        order = self.table[step % TABLE]                                       # (B, L, N), first those that stay
        kept, dropped = pick(state["pool"], order).split([c.N - c.K, c.K], 2)
        birth, dropped_birth = pick(state["birth"], order).split([c.N - c.K, c.K], 2)
        now = step[:, None, None] * c.K + torch.arange(c.K, device=step.device)
        return dict(pool=torch.cat([kept, new], 2), birth=torch.cat([birth, now.expand(-1, c.layers, -1)], 2),
                    step=step + 1), dropped, dropped_birth

    def write(self, cache, state):
        _, tokens, _ = cache
        return self.update(self.compress(tokens, state), state)[0] if self.c.N else dict(state)
