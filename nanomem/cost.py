"""What a model costs: speed and bytes of training and reading, a race against nanoGPT, and ways to back-propagate.

Each function takes a model and returns plain numbers, in lists and dicts. No model is known here by name.
"""
import copy
import math
import platform
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from . import stream
from .data import Loader
from .footprint import LiveBytes
from .measure import parameters
from .optim import optimizers_of, schedule

# ----------------------------------------------------------------------------------------------------------------------
# Instruments

def wait_for(device):
    """A function that waits until the device has done all that it was asked for."""
    return dict(cuda=torch.cuda.synchronize, mps=torch.mps.synchronize).get(device.type, lambda: None)


def seconds(device, *functions, rounds=5, warm=False):
    """Seconds of each function, (functions, rounds). They are timed in turn in every round, so that a slow minute hits
    them alike and their ratio within a round can be trusted. `warm`: call each once more before it is timed, so that
    memory and caches are as it leaves them itself."""
    times, wait = np.zeros((len(functions), rounds + 1)), wait_for(device)
    for r in range(rounds + 1):
        for i, f in enumerate(functions):
            if warm:
                f()
            wait()
            start = time.perf_counter()
            f()
            wait()
            times[i, r] = time.perf_counter() - start
    return times[:, 1:]   # without the first round


def machine_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {'GPU' if device.type == 'mps' else 'CPU'}"


# ----------------------------------------------------------------------------------------------------------------------
# Cost

class NanoGPT(nn.Module):
    """The other side of the speed comparison: nanoGPT's model (LayerNorm, learned positions, GELU, tied head)."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.token, self.position = nn.Embedding(c.vocab, c.width), nn.Embedding(c.seg, c.width)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        self.head.weight = self.token.weight
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            ln1=nn.LayerNorm(c.width), qkv=nn.Linear(c.width, 3 * c.width), out=nn.Linear(c.width, c.width),
            ln2=nn.LayerNorm(c.width), up=nn.Linear(c.width, 4 * c.width), down=nn.Linear(4 * c.width, c.width)))
            for _ in range(c.layers))
        self.ln = nn.LayerNorm(c.width)
        for name, p in self.named_parameters():                                        # as nanoGPT begins
            if p.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))                    # of a residual branch
                nn.init.normal_(p, std=0.02 * (2 * c.layers) ** -0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def scored(self):
        return torch.ones(self.c.seg, dtype=torch.bool, device=self.head.weight.device)

    def forward(self, tokens, state):
        x = self.token(tokens) + self.position.weight[:tokens.size(1)]                 # (B, T, C)
        for b in self.blocks:
            q, k, v = (y.unflatten(2, (self.c.heads, -1)).transpose(1, 2) for y in b["qkv"](b["ln1"](x)).chunk(3, 2))
            x = x + b["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + b["down"](F.gelu(b["up"](b["ln2"](x))))
        return self.head(self.ln(x)), state

    def init_state(self, B):
        return {}


def training_step(model, batch, K, backward=stream.bptt, compile=False, muon=0.04, dtype=None):
    """A step as train.py makes it, on random tokens, as a function: forward, backward, update."""
    c, device = model.c, stream.device_of(model)
    x, y = torch.randint(c.vocab, (2, batch, K * c.seg), device=device)
    optimizers = optimizers_of(model, muon)
    forward, state = stream.make_step(model, dtype, compile), model.init_state(batch)

    def step():
        backward(model, forward, x, y, stream.detach(state), 1 / x.numel())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        model.zero_grad()
    return step


def operations(model, batch, K):
    """Floating-point operations of the matrix products of a training step, forwards and backwards, counted without
    computing. Attention counts whole, its masked half too."""
    meta = copy.deepcopy(model).to("meta")
    x = torch.zeros(1, K * model.c.seg, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as count:
        stream.bptt(meta, stream.make_step(meta), x, x, stream.detach(meta.init_state(1)), 1.0)
    return batch * count.get_total_flops()


def product_speed(device, dtype):
    """Floating-point operations a second of a large matrix product: what the device can do at best."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / float(np.median(seconds(device, lambda: a @ a)))


def peak_bytes(device, f):
    """The most bytes that a call makes beside those that are there before: on CUDA as its allocator counts them."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        f()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        f()
    return live.peak


def held_bytes(reader):
    """Bytes that a Reader keeps between two calls: the state, and tokens and cache of the open segment."""
    kept = tree_leaves([reader.state, reader.tokens, reader.cache])
    return sum(t.nbytes for t in kept if isinstance(t, torch.Tensor))


def copy_of(reader):
    """A Reader at the same place of the same text, to go on in another way."""
    other = copy.copy(reader)
    other.begin_segment({k: v.clone() for k, v in reader.state.items()}, reader.tokens)
    return other


def cost(model, batch, segments, after, compile=False, dtype=None):
    """Speed of training, also as a multiple of that of nanoGPT's model with the same shape, and as a share of the speed
    of a large matrix product; the peak of bytes made by a training step. And for each number of tokens in `after`, when
    so many were read: ms a token to read on and to decode, bytes held, and the peak of bytes made by reading a segment.
    The text is random tokens."""
    c, device = model.c, stream.device_of(model)
    steps = [training_step(model, batch, segments, compile=compile, dtype=dtype),
             training_step(NanoGPT(c).to(device), batch, segments, compile=compile, muon=0, dtype=dtype)]
    ours, theirs = seconds(device, *steps, rounds=3, warm=True)
    eager = compile and device.type != "cuda"                # where tensors are counted, the compiler's are not seen
    counted = training_step(model, batch, segments, dtype=dtype) if eager else steps[0]
    if eager:
        counted()                                            # a first step makes the moments of the optimizers as well
    training_peak = peak_bytes(device, counted)

    after = sorted({-(-n // c.seg) * c.seg for n in after})  # in whole segments
    text, reader = torch.randint(c.vocab, (1, max(after) + 1), device=device), stream.Reader(model.eval())
    readers, held, peaks = [], [], []
    for n in after:
        if reader.count < n:
            reader(text[:, reader.count:n])
        with torch.no_grad(), LiveBytes() as live:
            ahead = copy_of(reader)
            ahead(text[:, :c.seg + 1])
        held.append(held_bytes(ahead))
        peaks.append(live.peak)
        readers.append(copy_of(reader))
    # one segment each, in one call or a token at a time; readers go on, which changes nothing in the cost
    read, decode = ([lambda r=r, T=T: [r(x) for x in text[:, :c.seg].split(T, 1)] for r in readers] for T in (c.seg, 1))
    times = seconds(device, *read, *decode).reshape(2, len(after), -1)
    model.train()
    read_ms, decode_ms = 1000 * np.median(times, 2) / c.seg
    return dict(parameters=parameters(model), state_bytes=stream.nbytes(model.init_state(1)), compiled=compile,
                training_tokens_per_s=batch * segments * c.seg / float(np.median(ours)),
                speed_over_nanogpt=float(np.median(theirs / ours)), training_peak=training_peak,
                share_of_product=operations(model, batch, segments) / float(np.median(ours))
                / product_speed(device, dtype or torch.float32),
                reading=[dict(after=n, read_ms=r, decode_ms=d, held=h, peak=p)
                         for n, r, d, h, p in zip(after, read_ms.tolist(), decode_ms.tolist(), held, peaks)],
                **{k: float(np.median(t[-1] / t[0])) for k, t in zip(("read_growth", "decode_growth"), times)})


def race(model, books, held_out, steps, batch, segments, rates=(1e-3, 2e-3, 4e-3), checks=10, dtype=None):
    """This model with our recipe against nanoGPT's model with its own (AdamW, warm-up, cosine to a tenth), on the same
    books, tokens and shapes, step by step in turn, so that both have the same machine. nanoGPT's segments are batch
    elements, as it has no memory. It runs once with each of the learning `rates`, and the run with the lowest last loss
    counts. Our rates are those of optim.py.

    steps        tokens, seconds and held-out loss of both, at `checks` places
    rates        {learning rate of nanoGPT: its last loss}
    tokens_over  our tokens a second over nanoGPT's
    time_over    our time to nanoGPT's last loss, over its time (interpolated between two places); None if not reached
    """
    c, device = model.c, stream.device_of(model)
    loader = Loader(books, batch, segments * c.seg)
    wait = wait_for(device)
    cosine = lambda step: min(1, (step + 1) / max(1, steps // 20)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    plain, sides = NanoGPT(c).to(device), [(model, optimizers_of(model), lambda step: schedule(step, steps))]
    for rate in rates:
        other = copy.deepcopy(plain)
        sides.append((other, optimizers_of(other, muon=0, lr=rate), cosine))
    states, spent, checked = [m.init_state(batch) for m, _, _ in sides], np.zeros(len(sides)), []
    for step in range(steps):
        part = stream.scored(loader.next().to(device), model)
        for i, (m, optimizers, part_of_peak) in enumerate(sides):
            wait()
            start = time.perf_counter()
            for optimizer, peak in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * part_of_peak(step)
            state = stream.reset(m, states[i], part.fresh)
            scale = 1 / (part.y >= 0).sum()
            states[i] = stream.bptt(m, stream.make_step(m, dtype), part.x, part.y, state, scale)[1]
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            for optimizer, _ in optimizers:
                optimizer.step()
            m.zero_grad()
            wait()
            spent[i] += time.perf_counter() - start
        if (step + 1) % max(1, steps // checks) == 0 or step + 1 == steps:
            losses = []
            for m, _, _ in sides:
                m.eval()
                held = Loader(held_out, batch, segments * c.seg, once=True)
                parts = [(nll.sum().item(), (y.y >= 0).sum().item())
                         for y, nll, _ in stream.evaluate(m, held, 8, like=[model])]
                losses.append(sum(n for n, _ in parts) / sum(n for _, n in parts))
                m.train()
            checked.append((step + 1, spent.tolist(), losses))
    best = 1 + int(np.nanargmin(losses[1:]))                                       # a rate may diverge
    found = [dict(step=n, tokens=n * batch * segments * c.seg, ours=[times[0], losses[0]],
                  nanogpt=[times[best], losses[best]]) for n, times, losses in checked]
    goal, whole = losses[best], spent[best]
    time_over, before = None, (0.0, math.inf)
    for x in found:
        seconds_, loss = x["ours"]
        if loss <= goal and time_over is None:
            share = (before[1] - goal) / (before[1] - loss) if before[1] < math.inf else 1
            time_over = (before[0] + share * (seconds_ - before[0])) / whole
        before = (seconds_, loss)
    return dict(steps=found, rates={str(rate): loss for rate, loss in zip(rates, losses[1:])},
                tokens_over=whole / spent[0], time_over=time_over)


# ----------------------------------------------------------------------------------------------------------------------
# Replay

def checkpointed(model, step, x, y, state, scale):
    """bptt in which autograd keeps only the inputs of each call of the model, and repeats the call on the way back."""
    repeated = lambda *args: checkpoint(step, *args, use_reentrant=False)
    return stream.bptt(model, repeated, x, y, state, scale)


BACKWARD = dict(bptt=stream.bptt, checkpointed=checkpointed, replay=stream.replay)


def replay(model, through, batch=1, rounds=3):
    """Three ways to the same gradients through K segments, K in `through`: the most bytes alive at once beside weights
    and gradients, and the time, each also as a multiple of what bptt takes. {way: [dict(K, ...), ...]}"""
    device, step, ways = stream.device_of(model), stream.make_step(model), {}
    for K in through:
        x = torch.randint(model.c.vocab, (batch, K * model.c.seg), device=device)
        for way, backward in BACKWARD.items():
            ways[way, K] = lambda f=backward, x=x: f(model, step, x, x, model.init_state(batch), 1 / x.numel())
    ways["bptt", through[0]]()                               # makes the gradients, to which the others add
    peaks = {}
    for key, once in ways.items():
        with LiveBytes() as live:
            once()
        peaks[key] = live.peak
    times = dict(zip(ways, seconds(device, *ways.values(), rounds=rounds)))
    return {way: [dict(K=K, peak=peaks[way, K], ms=1000 * float(np.median(times[way, K])),
                       bytes_over_bptt=peaks[way, K] / peaks["bptt", K],
                       time_over_bptt=float(np.median(times[way, K] / times["bptt", K]))) for K in through]
            for way in BACKWARD}
