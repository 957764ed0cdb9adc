"""What bench.py measures. Each function takes a model and returns plain numbers, in lists and dicts.

No model is known here by name.
"""
import copy
import math
import platform
import re
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from . import stream
from .cli import UserError
from .data import Loader
from .footprint import LiveBytes
from .optim import optimizers_of, schedule
from .tasks import TaskLoader


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Books

def token_losses(model, books, batch, segments, interleave=1, interleave_len=1, like=(), change=lambda state: state):
    """The loss of each token in nats, an array for each book, nan where nothing is scored: where this model or one of
    the models `like` has seen the target. `batch` books are read side by side, as in training, and the other arguments
    are those of train.py. `change` maps the state before each segment to the one that the segment sees."""
    S = model.c.seg
    loader = Loader(books, batch, segments * S, once=True, interleave=interleave, interleave_len=interleave_len * S)
    losses = [np.full(len(tokens) - 1, np.nan) for tokens in books.tokens]
    for part, nll, _ in stream.evaluate(model, loader, like=like, change=change):
        book = part.book.view(len(part.x), -1).expand_as(part.x)               # (B, T)
        book, position, nll, scored = (t.cpu().numpy() for t in (book, part.position, nll, part.y >= 0))
        for i in np.unique(book[scored]):
            here = scored & (book == i)
            losses[i][position[here]] = nll[here]
    return losses


WORDS_BACK = (1, 64, 256, 1024, 4096, 1 << 40)   # tokens since a rare word was last seen: a column ends at each
WORD = re.compile(rb"[A-Za-z\x80-\xff]+")      # letters of ASCII, and all bytes of other characters


def count_words(books):
    """How often each word stands in these books."""
    counts = Counter()
    for tokens in books.tokens:
        counts.update(WORD.findall(books.enc.decode_bytes(tokens[1:].tolist())))
    return counts


def rare_words(books, counts, rare=1e-6):
    """The words of each book that are rare in training: of which at most the part `rare` of all words counted there
    are. They are names, mostly, and a second time only a memory can know them. For each book an array (words, 3): the
    first target and the one behind the last (a target is a place in token_losses), and the tokens since this word was
    last seen in this book, 0 the first time.

    Zoology (2312.04927) takes pairs of tokens in place of words; but two bytes are no fact.
    """
    most, size = rare * counts.total(), [len(books.enc.decode_single_token_bytes(i)) for i in range(books.enc.n_vocab)]
    found = []
    for tokens in books.tokens:
        ends = np.cumsum(np.array(size)[tokens[1:]])                           # where each token ends, in bytes
        seen, here = {}, []
        for word in WORD.finditer(books.enc.decode_bytes(tokens[1:].tolist())):
            if counts[word[0]] <= most:
                start, end = np.searchsorted(ends, [word.start(), word.end() - 1], "right")
                here.append((start, end + 1, start - seen.get(word[0], start)))
                seen[word[0]] = start
        found.append(np.array(here, int).reshape(-1, 3))
    return found


def loss_of_words(losses, words, edges):
    """The loss of rare words in nats a word, by the tokens since they were last seen: the first time, and between two
    edges. losses: {name: loss of each token, of each book}; the others are given as their difference to "loss"."""
    nats = {name: [np.array([x[i:j].sum() for i, j, _ in w]) for x, w in zip(each, words)]
            for name, each in losses.items()}
    found = []
    for start, end in [(0, 1), *zip(edges, edges[1:])]:
        chosen = [(w[:, 2] >= start) & (w[:, 2] < end) & np.isfinite(x) for x, w in zip(nats["loss"], words)]
        part = {name: [x[here] for x, here in zip(each, chosen)] for name, each in nats.items()}
        n, mean = sum(map(len, part["loss"])), mean_of(part["loss"])
        if n:
            found.append(dict(start=start, end=end, words=n, loss=mean,
                              by_book=[[float(x.sum()), len(x)] for x in part["loss"]],
                              **{name: mean_of(each) - mean for name, each in part.items() if name != "loss"}))
    return found


def loss_by_position(model, books, edges, batch, upto=0, interleave=1, training=None, **reading):
    """The loss on held-out books: of all tokens, of those between two edges of the position in the book, and by the
    position in the segment. Of each book the first `upto` tokens are scored, or all. With the `training` books, also
    of words that are rare there. `reading`: see token_losses.

    start, end        positions in the book
    tokens            number of them, in all books
    loss              nats a token
    bits_per_byte     the same, whatever the tokenizer
    word_perplexity   the same for words, which are what stands between white space
    by_book           [sum of the loss, number of scored tokens] of each book, for intervals
    empty             how much the loss increases when each segment begins with an empty memory
    another           how much it increases with another book's memory: before each segment, batch element b gets the
                      state of element b - 1, so that what the last B - 1 segments wrote is not of its book. Only
                      where there are several books
    words             the same for rare words, in nats a word, by the tokens since the word was last seen, start to end
    """
    books = replace(books, tokens=[tokens[:upto + 1 if upto else None] for tokens in books.tokens])
    B = max(1, min(batch, len(books) // interleave))
    losses = lambda change: token_losses(model, books, B, interleave=interleave, change=change, **reading)
    loss = losses(lambda state: state)
    controls = dict(empty=losses(lambda state: model.init_state(B)))
    if B > 1:
        controls["another"] = losses(lambda state: {k: v.roll(1, 0) for k, v in state.items()})
    longest, S = max(map(len, loss)), model.c.seg
    words = rare_words(books, count_words(training)) if training else []

    def part(start, end):
        cut = lambda losses: [x[start:end] for x in losses]
        if mean_of(cut(loss)) is None:
            return None
        text = [books.enc.decode_bytes(tokens[1 + start:1 + end].tolist()) for tokens in books.tokens]
        n, mean = sum(map(len, cut(loss))), mean_of(cut(loss))
        return dict(start=start, end=min(end, longest), tokens=n, loss=mean,
                    bits_per_byte=mean * n / math.log(2) / sum(map(len, text)),
                    word_perplexity=math.exp(mean * n / sum(len(t.split()) for t in text)),
                    by_book=[[float(np.nansum(x)), int(np.isfinite(x).sum())] for x in cut(loss)],
                    **{name: mean_of(cut(x)) - mean for name, x in controls.items()})

    steps = [0, *(2 ** i for i in range(S.bit_length()) if 2 ** i < S), S]
    in_segment = [dict(start=start, end=end, loss=mean_of([x[i::S] for x in loss for i in range(start, end)]))
                  for start, end in zip(steps, steps[1:])]
    return dict(books=len(books), interleave=interleave, parameters=parameters(model),
                state_bytes=stream.nbytes(model.init_state(1)), all=part(0, longest),
                by_position=list(filter(None, map(part, edges, edges[1:]))),
                in_segment=[x for x in in_segment if x["loss"] is not None],
                words=loss_of_words(dict(controls, loss=loss), words, WORDS_BACK) if training else [])


def mean_of(losses):
    """The mean over all scored tokens of some books, None if there are none."""
    losses = np.concatenate(losses)
    return float(np.nanmean(losses)) if np.isfinite(losses).any() else None


@torch.no_grad()
def passage(model, books, n=256, after=(0, 1, 2, 4, 8, 16, 32, 64), batch=64):
    """How much easier a passage is when it was read before (as M+ 2502.00592, section 4.4, but with plain books).

    There are n passages, each a segment. The model reads a passage, then `after` segments of another book, then the
    passage again. gain: how much lower the loss of its second half is, in nats a token, than if it had not been read
    before. interval: half of the 95% interval over passages.
    """
    S, rng, device = model.c.seg, np.random.default_rng(0), stream.device_of(model)
    long = [tokens for tokens in books.tokens if len(tokens) > (max(after) + 2) * S]
    if not long:
        raise UserError(f"a passage needs a book of {(max(after) + 2) * S + 1:,} tokens, the longest has "
                        f"{max(map(len, books.tokens)):,}: use a smaller --seg")

    def cut(i, length):
        tokens = long[i % len(long)]
        start = rng.integers(len(tokens) - length)
        return torch.from_numpy(tokens[start:start + length].astype(np.int64)).to(device)
    passages = torch.stack([cut(i, S + 1) for i in range(n)])                          # (n, S+1)
    others = torch.stack([cut(i + 1, (max(after) + 1) * S) for i in range(n)])         # (n, segments S), another book
    gains = []
    for text, other in zip(passages.split(batch), others.split(batch)):
        losses = []
        for first in (other[:, :S], text[:, :S]):                                      # without and with the passage
            state = model(first, model.init_state(len(text)))[1]
            for gone, x in enumerate([*other[:, S:].split(S, 1), None]):
                if gone in after:
                    logits = model(text[:, :-1], state)[0][:, S // 2:]
                    loss = F.cross_entropy(logits.transpose(1, 2), text[:, S // 2 + 1:], reduction="none")
                    losses.append(loss[:, model.scored()[S // 2:]].mean(1))            # (B,)
                state = state if x is None else model(x, state)[1]
        without, with_passage = torch.stack(losses).unflatten(0, (2, -1))              # (after, B) each
        gains.append(without - with_passage)
    gains = torch.cat(gains, 1)                                                        # (after, n)
    half = 1.96 * gains.std(1) / n ** 0.5
    return [dict(after=a, gain=g, interval=h) for a, g, h in zip(after, gains.mean(1).tolist(), half.tolist())]


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic tasks

@torch.no_grad()
def answer(model, batch):
    """Run over whole texts -> correct (B, T): the likeliest token is the target; and for a model that retrieves, hits
    (B, T): one of the spans of text that the token retrieved holds the position of its answer; else None."""
    state, correct, hits = model.init_state(len(batch.x)), [], []
    places = (batch.position - batch.distance)[..., None]                              # (B, T, 1) of the answers
    for (x, y), place in zip(stream.segments(model, batch.x, batch.y), places.split(model.c.seg, 1)):
        logits, cache = model.extend(x, model.read(state))
        state = model.write(cache, state)
        correct.append(logits.argmax(-1) == y)
        found = model.retrieved(cache)
        if found:
            start, end = found[0].unbind(-1)                                           # (B, S, n); -1 where none
            hits.append(((start <= place) & (place < end)).any(-1))
    return torch.cat(correct, 1), torch.cat(hits, 1) if hits else None


def accuracy(model, task, T, texts, batch=64, edges=(), seed=0, least=50):
    """The share of right answers of a model in eval mode, on texts of T tokens of a task. With edges, a dict for each
    range of distances to the answer, else one for all questions; none for fewer than `least` questions.

    length       T
    start, end   of the range of distances, in tokens
    questions    number of them
    accuracy     share of right answers
    hits         share of retrieval hits, if the model retrieves
    """
    texts = max(2, texts)
    loader, device = TaskLoader(task, min(batch, texts), T, seed=(seed, 2)), stream.device_of(model)
    bounds = np.array(edges or (0, T + 1))
    sums = np.zeros((3, len(bounds) + 1))                                              # questions, correct, hits
    retrieves = False
    for _ in range(texts // loader.B):
        part = stream.scored(loader.next().to(device), model)
        correct, hits = answer(model, part)
        retrieves, asked = hits is not None, part.y >= 0
        column = np.digitize(part.distance[asked].cpu().numpy(), bounds)
        for counts, true in zip(sums, (asked, correct, hits if retrieves else ~asked)):
            counts += np.bincount(column, true[asked].cpu().numpy(), len(bounds) + 1)
    found = []
    for start, end, n, right, hit in zip(bounds.tolist(), bounds[1:].tolist(), *sums[:, 1:].tolist()):
        if n >= least:
            found.append(dict(length=T, **(dict(start=start, end=end) if edges else {}), questions=int(n),
                              accuracy=right / n, **(dict(hits=hit / n) if retrieves else {})))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Instruments

def seconds(device, *functions, rounds=9, warm=False):
    """Seconds of each function, (functions, rounds). They are timed in turn in every round, so that a slow minute hits
    them alike and their ratio within a round can be trusted. `warm`: call each once more before it is timed, so that
    memory and caches are as it leaves them itself."""
    times = np.zeros((len(functions), rounds + 1))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
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
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


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
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    parallel = 1

    def scored(self):
        return torch.ones(self.c.seg, dtype=torch.bool)

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
    ours, theirs = seconds(device, *steps, rounds=5, warm=True)
    eager = compile and device.type != "cuda"                # where tensors are counted, the compiler's are not seen
    training_peak = peak_bytes(device, training_step(model, batch, segments, dtype=dtype) if eager else steps[0])

    book, reader = torch.randint(c.vocab, (1, max(after)), device=device), stream.Reader(model.eval())
    readers, held, peaks = [], [], []
    for n in after:
        n = n // c.seg * c.seg
        if reader.count < n:
            reader(book[:, reader.count:n])
        with torch.no_grad(), LiveBytes() as live:
            ahead = copy_of(reader)
            ahead(book[:, :c.seg + 1])
        held.append(held_bytes(ahead))
        peaks.append(live.peak)
        readers.append(copy_of(reader))
    # one segment each, in one call or a token at a time; readers go on, which changes nothing in the cost
    read, decode = ([lambda r=r, T=T: [r(x) for x in book[:, :c.seg].split(T, 1)] for r in readers] for T in (c.seg, 1))
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


def race(model, books, held_out, steps, batch, segments, lr=4e-3, checks=20, dtype=None):
    """This model with our recipe against nanoGPT's model with its own (AdamW, warm-up, cosine to a tenth), on the same
    books, tokens and shapes, step by step in turn, so that both have the same machine. nanoGPT's segments are batch
    elements, as it has no memory. `lr` is nanoGPT's; ours is that of optim.py.

    steps        tokens, seconds and held-out loss of both, at `checks` places
    tokens_over  our tokens a second over nanoGPT's
    time_over    our time to nanoGPT's last loss, over its time (interpolated between two places); None if not reached
    """
    c, device = model.c, stream.device_of(model)
    loader = Loader(books, batch, segments * c.seg)
    plain = NanoGPT(c).to(device)
    cosine = lambda step: min(1, (step + 1) / max(1, steps // 20)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    sides = [(model, optimizers_of(model), lambda step: schedule(step, steps)),
             (plain, optimizers_of(plain, muon=0, lr=lr), cosine)]
    states, spent, found = [m.init_state(batch) for m, _, _ in sides], np.zeros(2), []
    for step in range(steps):
        part = loader.next().to(device)
        for i, (m, optimizers, part_of_peak) in enumerate(sides):
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
            spent[i] += time.perf_counter() - start
        if (step + 1) % max(1, steps // checks) == 0 or step + 1 == steps:
            losses = []
            for m, _, _ in sides:
                m.eval()
                held = Loader(held_out, batch, segments * c.seg, once=True)
                parts = [(nll.sum().item(), (y.y >= 0).sum().item()) for y, nll, _ in stream.evaluate(m, held, 8)]
                losses.append(sum(n for n, _ in parts) / sum(n for _, n in parts))
                m.train()
            found.append(dict(step=step + 1, tokens=(step + 1) * batch * segments * c.seg,
                              ours=[spent[0], losses[0]], nanogpt=[spent[1], losses[1]]))
    goal = found[-1]["nanogpt"][1]
    time_over, before = None, (0.0, math.inf)
    for x in found:
        seconds_, loss = x["ours"]
        if loss <= goal and time_over is None:
            share = (before[1] - goal) / (before[1] - loss) if before[1] < math.inf else 1
            time_over = (before[0] + share * (seconds_ - before[0])) / spent[1]
        before = (seconds_, loss)
    return dict(steps=found, tokens_over=spent[1] / spent[0], time_over=time_over)


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
