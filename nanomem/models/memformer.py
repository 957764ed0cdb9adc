"""Memformer: slots beside the text, which every block reads and which are written once a segment, each on its own."""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import gpt
from .gpt import GPT, Block, full_precision, merge_heads, norm, rope, split_heads


@dataclass
class Config(gpt.Config):
    mem: int = -1        # M, memory slots; -1 takes one for every 4 tokens of a segment, and at least 8
    tau: float = 0.25    # temperature of the writer: the lower, the more a slot takes from a single place
    bidir: bool = False  # before it is written, a full segment passes one more block that looks both ways
    back: bool = False   # a segment sees the tokens of the one before, which pass the model again: twice the work

    M = property(lambda c: c.mem if c.mem >= 0 else max(8, c.seg // 4))

    def __post_init__(self):
        super().__post_init__()
        assert self.mem >= -1, f"mem counts memory slots, got {self.mem}"
        assert self.tau > 0, f"tau must be positive, got {self.tau}"


class Reader(nn.Module):
    """Cross-attention from the tokens to all slots. No mask, and no positions, for slots have no order."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.query = nn.Linear(c.width, c.width, bias=False)
        self.kv = nn.Linear(c.width, 2 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)

    def keys_values(self, mem):
        return split_heads(self.kv(mem), 2 * self.c.heads).chunk(2, 1)         # (B, H, M, D) both

    def forward(self, x, slots):
        """x (B, T, C) reads `slots`, the keys and values of the memory."""
        q = split_heads(self.query(x), self.c.heads)                           # (B, H, T, D)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, *slots)))    # (B, T, C)


class Writer(nn.Module):
    """mem (B, M, C) and a segment's hidden states h (B, T, C) -> the next mem: slot attention, then forgetting.

    A slot looks at itself and at the tokens, never at another slot. Its own value enters as it is, and nothing is
    projected afterwards, so a slot that looks only at itself stays what it was. Then the forgetting vector v pulls it
    towards v / |v|. Each write multiplies the angle between v and a slot that is not refreshed by about
    1 / (1 + |v| / |mem|); that is exact in the limit of small angles.
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.query, self.key, self.value = (nn.Linear(c.width, c.width, bias=False) for _ in range(3))
        self.v = nn.Parameter(torch.empty(c.M, c.width))   # forgetting vectors: all that tells slots apart at first

    def weights(self, mem, h):
        """Where each slot takes its next value from: itself, then each of the T tokens. (B, H, M, 1+T)"""
        q, own, k = (split_heads(x, self.c.heads) for x in (self.query(mem), self.key(mem), self.key(h)))
        u = torch.cat([(q * own).sum(-1, keepdim=True), q @ k.mT], -1)         # (B, H, M, 1+T)
        return (u / (self.c.tau * self.c.head_dim ** 0.5)).softmax(-1)

    def forward(self, mem, h):
        w, values = self.weights(mem, h), split_heads(self.value(h), self.c.heads)
        z = w[..., :1] * split_heads(mem, self.c.heads) + w[..., 1:] @ values  # (B, H, M, D)
        return self.normalise(merge_heads(z))

    def normalise(self, z):
        return norm(z + self.v)                                                # (B, M, C)


class Memformer(GPT):
    """M slots for the whole model, not for each layer. Every block reads them between its attention and its MLP. They
    are written from the last hidden states of a full segment.

    state    mem (B, M, C) float32, every slot of RMS 1    with back also last (B, S), tokens, -1 where there were none
    read     x += softmax(q k^T / sqrt D) v in every block, q from x, k and v from mem
    write    w = softmax([q_i k_i, q_i K_1 .. q_i K_T] / (tau sqrt D)),  z_i = w_0 mem_i + sum_j w_j V_j,
             mem'_i = sqrt C (z_i + v_i) / |z_i + v_i|,  and sqrt C v_i / |v_i| to begin with
    paper    Memformer 2010.06891, the text of 2022: memory reader, slot attention, biased memory normalisation. Its
             memory replay is stream.replay
    departs  one causal GPT in place of encoder and decoder, and one memory for all layers (the version of 2020 has a
             decoder with one for each). So the writer sees causal hidden states (bidir: from both sides), and the first
             token of a segment knows the past from memory alone (back: also the segment before). Slots have norm sqrt C
             as hidden states do, not 1, so that at the start a slot counts as much as a token. A slot's query begins as
             its key, so that it lasts. We do not know the paper's tau
    """
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.readers = nn.ModuleList(Reader(c) for _ in range(c.layers))
        self.writer = Writer(c)
        self.both_ways = Block(c) if c.bidir else nn.Identity()
        for part in (self.readers, self.writer, self.both_ways):
            part.apply(self.init)

    @staticmethod
    def init(module):
        """A slot's query begins as its key, scaled so that the slot weighs as much as all S tokens together. So memory
        lasts for a few segments before anything is learned, and gradient finds its way back."""
        GPT.init(module)
        if isinstance(module, Reader):
            nn.init.normal_(module.out.weight, std=(2 * module.c.layers * module.c.width) ** -0.5)
        if isinstance(module, Writer):
            c = module.c
            module.query.weight.data = module.key.weight.data * c.tau * math.log(1 + c.seg) / c.head_dim ** 0.5
            nn.init.normal_(module.v, std=0.1)

    def backbone(self, x, slots, past=None, mask=None):
        """GPT.backbone with a reader in every block; slots and past are the keys and values of each layer."""
        past = past or [None] * self.c.layers
        P = 0 if past[0] is None else past[0][0].size(2)
        angles = rope(torch.arange(P, P + x.size(1), device=x.device), self.c.head_dim)
        longer = []
        for block, reader, kv, slots_kv in zip(self.blocks, self.readers, past, slots):
            y, kv = block.attention(norm(x), angles, kv, mask)
            x = x + y
            if self.c.M:                                                       # a softmax over no slots is 0 / 0
                x = x + reader(norm(x), slots_kv)
            x = x + block.mlp(norm(x))
            longer.append(kv)
        return norm(x), longer

    def init_state(self, B):
        zero = self.writer.v.new_zeros(B, 1, 1)
        state = dict(mem=self.writer.normalise(zero))
        if self.c.back:
            state["last"] = zero.new_full((B, self.c.seg), -1, dtype=torch.long)
        return state

    def read(self, state):
        slots, past, ids = [reader.keys_values(state["mem"]) for reader in self.readers], None, None
        if self.c.back:
            ids = state["last"]
            _, past = self.backbone(self.embed(ids.clamp(min=0)), slots)
            real = (ids >= 0)[:, None, :, None]                                # keys of no token are zeros, as in gpt
            past = [(k * real, v) for k, v in past]
        return slots, past, ids, None

    def extend(self, tokens, cache):
        slots, past, ids, h = cache
        mask = None
        if self.c.back:
            ids = torch.cat([ids, tokens], 1)                                  # (B, P+T)
            T, P = tokens.size(1), ids.size(1) - tokens.size(1)
            causal = torch.ones(T, P + T, dtype=torch.bool, device=ids.device).tril(P)
            mask = causal & (ids >= 0)[:, None, None]                          # (B, 1, T, P+T)
        new, past = self.backbone(self.embed(tokens), slots, past, mask)
        h = new if h is None else torch.cat([h, new], 1)                       # (B, tokens so far, C)
        return self.head(new), (slots, past, ids, h)

    def finished(self, h):
        """What the writer sees of a full segment (B, S, C). No logit sees it, so it may look both ways."""
        if not self.c.bidir:
            return h
        S = h.size(1)
        angles = rope(torch.arange(S, device=h.device), self.c.head_dim)
        return norm(self.both_ways(h, angles, mask=torch.ones(S, S, dtype=torch.bool, device=h.device))[0])

    def write(self, cache, state):
        *_, ids, h = cache
        mem, h = state["mem"], self.finished(h)
        with full_precision(h):                                                # bfloat16 would lose small changes
            new = dict(mem=self.writer(mem, h.to(mem.dtype)))
        if self.c.back:
            new["last"] = ids[:, self.c.seg:].clone()
        return new

    def weights(self, tokens, state):
        """The writer's attention over a whole segment, (B, H, M, 1+S): what a slot keeps, and what it takes from each
        token. A slot whose first weight is near 1 is kept, near 0 it is overwritten."""
        *_, h = self.extend(tokens, self.read(state))[1]
        return self.writer.weights(state["mem"], self.finished(h))
