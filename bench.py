"""Compare the models: train what is missing, measure, and print one table.

    python bench.py                                       every model, on the embedded book: ten minutes on a laptop
    python bench.py --models=gpt,rmt --tasks=depth,cost    any part of it; what was trained before is used again
    python bench.py --models=rmt:mem=1,rmt:segments=8      models with other settings, their own or train.py's
    python bench.py --models=gca,gca/topk=8                and with some that hold only after training, when it is tested
    python bench.py --data=data/pg19 --steps=5000 ...     the same on shards
    python bench.py --suite=night --data=data/pg19        everything, at 30M parameters: a night on one GPU
    python bench.py --plot                                also draws the curves (needs matplotlib)

    depth    loss, bits per byte and word perplexity of the held-out books, by position in the book and in the segment,
             and what memory is worth: how much the loss grows when every segment begins with an empty one
    passage  how much easier a passage is to read when it was read before, some segments of another book ago
    recall   accuracy by the distance to the answer, on a stream of key-value pairs
    planted, mqar, needle, needle1k, hops, retain, noise    the same on other streams: experiments of the papers, with
             their own models
    cost     training speed, time a decoded token, bytes, each as the context read grows
    replay   bytes and time of back-propagation through K segments: plain, with checkpoints, by memory replay
"""
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import traceback
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import nanomem
import train
from nanomem import cli, data, stream
from nanomem.models import bmojo
from nanomem.cli import UserError


@dataclass
class Bench:
    models: str = ""              # which models, MODEL:field=value/tested:field=value, or all (without it the task's own)
    tasks: str = ""              # which, with commas between them (without it depth, recall, cost)
    data: str = ""               # shards for depth; without it the embedded Moby-Dick
    suite: str = ""              # night: other defaults for what follows
    final: bool = False          # read the test books: once, when everything is decided
    upto: int = 0                # tokens that it reads of each (0: all)
    out: str = "out/bench"       # folder for checkpoints and report
    steps: int = 20              # training steps on books
    stream_steps: int = 0        # training steps on a synthetic stream (0: as many as it takes)
    pairs: int = 2               # key-value pairs of the recall stream, up to 64, and all its lengths with them
    batch: int = 8               # rows, on books
    segments: int = 4            # K, segments in a window
    interleave: int = 1          # books that a row reads in turns
    turn: int = 1                # segments that a turn lasts
    layers: int = 2              # of the models that read books
    heads: int = 2               # attention heads
    width: int = 64              # channels
    seg: int = 64                # S, tokens in a segment
    equal: bool = False          # on books as many parameters as gpt, with wider or narrower MLPs
    lr: float = 4e-3             # learning rate on books
    search: str = ""             # multiples of it that each model tries on books for a tenth of the steps: 0.5,1,2
    read: int = 100_000          # tokens to read before the last measurement of cost; the longest text of needle
    seed: int = 1                # of weights, order of books, and streams
    seeds: int = 1               # how many seeds, from that one on: means, and lowest to highest accuracy
    device: str = ""             # cpu, cuda, mps
    jobs: int = 0                # trainings side by side, one thread each (0: on a CPU as many as it has cores, else 1)
    compile: bool = False        # compile both sides of the training speeds
    plot: bool = False           # draw depth.svg and a picture for each stream


@dataclass
class Trial:
    """A synthetic stream as an experiment: how models are trained on it, and how they are asked."""
    about: str        # what the numbers are, over the table
    train: str        # flags of train.py
    steps: int
    segments: int     # K, segments in a window of training
    data: str = ""    # the stream that teaches, if it has knobs
    models: str = ""   # those it was made for; all where it is empty
    test: str = ""    # the stream that asks, if its knobs are other ones
    span: int = 0     # segments that a text lasts in training, if that can be more than a window
    rows: int = 64
    windows: int = 32       # of `rows` texts that a test reads; of longer texts, fewer
    lengths: tuple = (8,)   # of a test window, in its segments; a column each, or with a single one
    edges: tuple = ()       # a column for each range of distances between these, in tokens
    others: str = ""        # settings of the models that it was not made for

    seg = property(lambda t: int(re.search(r"--seg=(\d+)", t.train)[1]))   # S, unless a model has one of its own


TRIALS = dict(
    recall=Trial("by tokens between question and answer, in segments of 8 tokens for each pair, tested on texts twice "
                 "as long as in training",
                 "--batch=48 --lr=5e-3 --cooldown=0.4 --layers=2 --heads=2 --width=64 --seg=16", 240, 4,
                 "recall:mixed=yes", test="recall:asks=2",   # each pair is seen three times: the distances are long
                 edges=tuple(range(0, 129, 16)), windows=8),
    planted=Trial("by tokens since the pair was last seen: pairs in the first 16 tokens, questions from token 64 on; "
                  "trained on texts of 8 segments of 16 tokens, with gradient through `segments` of them, tested on 16",
                  "--batch=32 --lr=5e-3 --layers=2 --heads=2 --width=64 --seg=16", 120, 8, "planted:gap=64",
                  "memformer,memformer:segments=4,memformer:segments=2,memformer:segments=1,rmt,hmt,xl,gpt",
                  span=8, windows=16, lengths=(16,), edges=(0, 16, *range(48, 257, 32))),
    mqar=Trial("by tokens since the pair stood there: 8 pairs, then as many questions, in texts of 64 tokens that are "
               "read in one call, or in segments of 16 where that is said; windows of 16 tokens, so that what is "
               "further back is beyond them",
               "--batch=64 --lr=5e-3 --layers=2 --heads=2 --width=64 --seg=64", 300, 1, lengths=(1,), edges=(0, 16, 64),
               others=":seg=16:segments=4",
               models="mamba:state=8,bmojo:mix=window,hybrid:state=8,bmojo_f:state=8,bmojo:state=8:eidetic=8,"
                     "bmojo:state=8:eidetic=24,bmojo:state=8:eidetic=24:select=random,"
                     "bmojo:state=8:eidetic=24:select=16-48,bmojo:mix=window:window=64"),
    needle=Trial("by the length of the text, 64 tokens as in training and more, up to --read: 2 needles, each asked "
                 "for 3 times, in longer texts 24 times; behind a colon the share of questions whose needle was among "
                 "the 4 chunks of 4 tokens that were found",
                 "--batch=32 --lr=4e-3 --layers=2 --heads=2 --width=32 --seg=64", 900, 1,
                 "needle:pairs=2:asks=3:notice=4", test="needle:pairs=2:asks=24:notice=4", windows=16,
                 lengths=(1, 16, 64, 256, 1024, 16384),
                 models="gca:chunk=4:bypass=no,gca:chunk=4:bypass=no/retrieval=random,"
                       "gca:chunk=4:bypass=no/retrieval=recent,window:window=16,full"),
    needle1k=Trial("by the length of the text: the same, trained on 1,024 tokens with 32 questions for each needle",
                   "--batch=8 --lr=2e-3 --cooldown=0.4 --layers=2 --heads=2 --width=32 --seg=1024", 800, 1,
                   "needle:pairs=2:asks=32:notice=4", test="needle:pairs=2:asks=24:notice=4", rows=16, windows=2,
                   lengths=(1, 4, 16, 64, 256, 1024),
                   models="gca:chunk=4:bypass=no:bank=256:window=-1,"
                         "gca:chunk=4:bypass=no:bank=256:window=-1/retrieval=random,"
                         "gca:chunk=4:bypass=no:bank=256:window=-1/retrieval=recent,window:window=16,full:window=-2"),
    hops=Trial("by the length of the text, with needles that lead from a key to another key and from that to the "
               "value; behind a colon the share of questions for which the place of the value was found",
               "--batch=16 --lr=4e-3 --cooldown=0.3 --layers=3 --heads=2 --width=32 --seg=256", 4000, 1,
               "needle:pairs=2:asks=10:hops=2:notice=8", test="needle:pairs=2:asks=24:hops=2:notice=8", windows=4,
               lengths=(1, 4, 16, 64), models="gca:chunk=4:bypass=no:bank=64,gca:chunk=4:bypass=no:bank=64:groups=2"),
    retain=Trial("by tokens since the fact was told, every 4 tokens a write; pools of 16 that lose 2 a write, stores "
                 "of 64 and 512; trained on texts of 16 writes, tested on 256",
                 "--batch=64 --lr=3e-3 --layers=2 --heads=2 --width=64 --seg=4", 400, 16, lengths=(256,), windows=4,
                 edges=(0, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1024),
                 models="gpt,memoryllm,mplus:ask=self:query=1:store=512,mplus:ask=self:query=1:store=64"),
)
TRIALS["noise"] = replace(
    TRIALS["mqar"], data="mqar:noise=1", about="by tokens since the pair stood there: the same as mqar, but where those "
    "texts are blank there is noise, every token of it as surprising as a pair",
    models="bmojo_f:state=8,bmojo:state=8:eidetic=24,bmojo:state=8:eidetic=24:select=random,bmojo:mix=window:window=64")
TASKS = ("depth", "passage", *TRIALS, "cost", "replay")
SUITES = dict(night=dict(models="all", tasks=",".join(TASKS), layers=8, heads=8, width=512, seg=512, batch=16,
                         steps=5000, seeds=2, equal=True, search="0.25,0.5,1", read=2 ** 20))
QUICK = ("depth", "recall", "cost")   # without --tasks
VOCAB = 4160   # of the models whose cost is measured: gpt2-4k's, rounded up
KEEPS = dict(   # of what lies before the segment: what a model still has exactly, and what fades
    gpt=("nothing", "nothing: it is gone"),
    window=("the last W tokens", "nothing: it is cut off"),
    xl=("the last W tokens", "nothing: it is cut off"),
    full=("the last 8 segments", "nothing: it is cut off"),
    rmt=("a few last tokens", "M vectors, rewritten every segment"),
    hmt=("a few last tokens; a bank of memories, until it is full", "what the search does not weigh"),
    hmt_split=("a few last tokens; a bank of memories, until it is full", "what the search does not weigh"),
    memformer=("nothing", "M slots, rewritten every segment"),
    memoryllm=("what was not dropped", "the rest: (1 - K/N)^t is left after t writes"),
    mplus=("pool and store, until that is full", "what is not found"),
    mamba=("nothing", "all of it, at rates it learns"),
    hybrid=("the last W tokens", "all before, at rates it learns"),
    bmojo_f=("the last W tokens", "all before, at rates it learns"),
    bmojo=("the last W tokens and M others", "the rest, at rates it learns"),
    gca=("all chunks, until the bank is full", "what is not found"))
EDGES = [0, 256, 512, 1024, 4096, 16384, 65536, 1 << 40]   # positions in a book where one column ends


# ----------------------------------------------------------------------------------------------------------------------
# Training what is missing

def trained(argv, out):
    """The checkpoint that train.py makes of these flags: of an earlier run, of the rest of one, or of a new one."""
    argv = [*argv, f"--out={out}"]
    typed, fields = train.flags(argv)
    last = out / "last.pt"
    extra = ["--overwrite"]
    if last.exists():
        with contextlib.suppress(UserError):
            saved = stream.load(last, "checkpoint")
            was = {**asdict(train.Run()), **saved["run"], **saved["config"]}   # a flag it did not know had this value
            same = all(was.get(k) == v for k, v in {**typed, **fields}.items() if k != "out")   # it may have been moved
            if same and saved["step"] == typed["steps"]:
                return saved
            if same:
                extra = ["--resume"]
    with contextlib.redirect_stdout(io.StringIO()):    # its log is in log.csv; the bar stays
        if train.main([*argv, *extra]):
            raise KeyboardInterrupt
    return stream.load(last, "checkpoint")


def parts_of(spec):
    """A model as --models says it, "gca:chunk=16/topk=8:bank=99" -> its name, the settings with which it is trained, and
    those that are changed for the test."""
    trained, _, tested = spec.partition("/")
    return *cli.variant(trained), cli.variant(f"/:{tested}")[1] if tested else {}


def fields_of(spec, tested=False):
    """The fields of the model among its settings; refuses those that neither it nor train.py knows."""
    name, settings, changed = parts_of(spec)
    if tested and searcher(spec):
        changed = {k: v for k, v in changed.items() if k != "retrieval"}
    flags = [f"--{k}={v}" for k, v in (changed if tested else settings).items()]
    return cli.parse(flags, nanomem.model_class(name).Config, *([] if tested else [train.Run]))[0][0]


def searcher(spec, task=""):
    """M+ can be tested with another way to search, which is no field of it: oracle, random, or "" for its own."""
    name, _, changed = parts_of(spec)
    way = changed.get("retrieval", "") if hasattr(nanomem.model_class(name), "score") else ""
    if way not in ("", "oracle", "random"):
        raise UserError(f"{spec}: retrieval is oracle or random, got {way}")
    if way == "oracle" and task not in ("", "retain"):
        raise UserError(f"{spec}: an oracle knows where the answer is in retain, and not in {task}")
    return way


def shape_of(b, spec):
    """The fields of a model that reads books, but for its own."""
    shape = {k: getattr(b, k) for k in ("layers", "heads", "width", "seg")}
    if b.equal and "mlp" not in fields_of(spec):     # parameters grow evenly with the MLPs: a straight line
        name, own = parts_of(spec)[0], {**fields_of(spec), "vocab": VOCAB}
        count = lambda name, **more: sum(p.numel() for p in nanomem.build(name, **{**shape, **more}).parameters())
        few, many = (count(name, **own, mlp=n * b.width) for n in (2, 4))
        shape["mlp"] = round((2 + 2 * (count("gpt", vocab=VOCAB) - few) / (many - few)) * b.width / 8) * 8
    return shape


def searched(b, spec, seed, folder):
    """{learning rate: loss on some held-out windows after a tenth of the steps}, of the multiples of --search."""
    few = [replace(b, steps=max(1, b.steps // 10), lr=b.lr * float(x)) for x in b.search.split(",")]
    return {f"{f.lr:.1e}": trained([*flags_of(f, spec, "depth", seed), "--windows=16"],
                                   folder.with_name(f"{folder.name}-lr{f.lr:.1e}"))["best"] for f in few}


def flags_of(b, spec, task, seed):
    name, settings, _ = parts_of(spec)
    flags = [f"--model={name}", f"--seed={seed}", "--windows=4", *([f"--device={b.device}"] if b.device else [])]
    own = [f"--{k}={v}" for k, v in settings.items()]
    if task == "depth":
        same = ("data", "steps", "batch", "segments", "interleave", "turn", "lr")
        shape = [f"--{k}={v}" for k, v in shape_of(b, spec).items()]
        return [*flags, f"--validate={b.steps}", *[f"--{k}={getattr(b, k)}" for k in same], *shape, *own]
    t = trial_of(b, task)
    K = int(settings.get("segments", t.segments))
    parts = max(1, t.span // K)                  # windows that a text lasts: the more, the more steps for as many texts
    steps = (b.stream_steps or t.steps) * parts
    return [*flags, f"--data={t.data or task}" + f":windows={parts}" * (parts > 1), f"--segments={K}",
            f"--steps={steps}", f"--validate={steps}", *t.train.split(), *own]


# ----------------------------------------------------------------------------------------------------------------------
# depth

def losses_of(model, books, b, change=lambda state: state):
    """The loss of every token of the books, an array for each book, nan where one of the models must not be scored."""
    rows, turns = min(b.batch * 4, len(books) // b.interleave), dict(interleave=b.interleave, turn=b.turn * model.c.seg)
    loader = data.Bookmarks(books, rows, model.c.seg * b.segments, once=True, **turns)
    losses = [np.full(len(t) - 1, np.nan) for t in books.tokens]
    for batch, nll, _ in stream.evaluate(model, loader, like=leaky(b), change=change):
        book = batch.book.view(len(batch.x), -1).expand_as(batch.x)
        book, at, nll, scored = (t.cpu().numpy() for t in (book, batch.at, nll, batch.y >= 0))
        for i in np.unique(book[scored]):
            here = scored & (book == i)
            losses[i][at[here]] = nll[here]
    return losses


def leaky(b):
    """Those of the models that have seen some of their targets: there no model is scored."""
    models = (model_of(b, spec) for spec in models_of(b, "depth") if set(spec) & set(":/"))
    return [model for model in models if not model.scored().all()]


def depth(model, books, b):
    """Loss, bits per byte and word perplexity overall and between EDGES, on every token of the held-out books; the loss
    by place in the segment; and how much it grows when every segment begins with an empty memory."""
    books.tokens = [t[:b.upto + 1 if b.upto else None] for t in books.tokens]
    losses = losses_of(model, books, b)
    fresh = lambda state: model.init_state(len(next(iter(state.values())))) if state else state
    empty = losses_of(model, books, b, fresh)

    def score(lo, hi):
        parts = [x[lo:hi] for x in losses]
        text = [books.enc.decode_bytes(t[1 + lo:1 + hi].tolist()) for t in books.tokens]
        n, loss = sum(map(len, parts)), np.nanmean(np.concatenate(parts))
        return dict(start=lo, end=min(hi, longest), tokens=n, loss=loss,
                    bits_per_byte=loss * n / math.log(2) / sum(map(len, text)),
                    word_perplexity=math.exp(loss * n / sum(len(t.split()) for t in text)),
                    memory=np.nanmean(np.concatenate([x[lo:hi] for x in empty])) - loss,
                    by_book=[[np.nansum(x), np.isfinite(x).sum()] for x in parts])
    longest, S = max(map(len, losses)), model.c.seg
    places = [0, *(2 ** i for i in range(S.bit_length()) if 2 ** i < S), S]
    by_place = [np.nanmean(np.concatenate([x[i::S] for x in losses for i in range(lo, hi)]))
                for lo, hi in zip(places, places[1:])]
    plain = nanomem.build("gpt", **{k: getattr(model.c, k) for k in ("layers", "heads", "width", "seg", "vocab")})
    size = sum(p.numel() for p in model.parameters())
    more = strangers(model, books, b) if b.interleave > 1 else {}
    if type(model).__name__ == "Memformer":
        more["writing"] = writing(model, books, b)
    if any(k.endswith(".eps") for k in model.init_state(1)) and min(map(len, losses)) > 8192:
        more["ages"] = ages(model, books, b)
    return dict(more, books=len(books), parameters=size, state_bytes=stream.nbytes(model.init_state(1)),
                extra=size / sum(p.numel() for p in plain.parameters()) - 1, all=score(0, longest),
                by_position=[score(lo, hi) for lo, hi in zip(EDGES, EDGES[1:]) if lo < longest],
                by_place=[dict(start=lo, end=hi, loss=x) for lo, hi, x in zip(places, places[1:], by_place)])


def strangers(model, books, b):
    """On books in turns: the loss when each segment sees the memory of the row beside it (its own last tokens stay),
    and of a search, the share of its weight that goes to memories of the segment's own book, and by chance would."""
    swap = lambda state: {k: v if k == "ids" else v.roll(1, 0) for k, v in state.items()}
    found = dict(stranger=np.nanmean(np.concatenate(losses_of(model, books, b, swap))))
    if type(model).__name__ == "HMT" and model.c.query == "prev":
        shares, place = [], itertools.cycle(range(b.interleave * b.turn))       # in a round of turns

        def look(state):
            w = model.weights(state).mean(1)                                   # (B, N) over the rows of a memory
            age = torch.arange(w.size(1), 0, -1, device=w.device)             # in segments, the newest last
            i = next(place)
            there, own = age <= state["n"][:, None], ((i - age) // b.turn - i // b.turn) % b.interleave == 0
            old = state["n"] >= min(2 * b.interleave * b.turn, w.size(1))       # there is something to choose from
            shares.append(torch.stack([(w * own).sum(1), (there & own).sum(1) / there.sum(1).clamp(min=1)], 1)[old])
            return state
        losses_of(model, books, b, look)
        found.update(zip(("own", "chance"), torch.cat(shares).mean(0).tolist()))
    return found


@torch.no_grad()
def watched(model, books, b, windows):
    """Read the first windows of up to eight books side by side: yields each segment, the state before it and after."""
    loader, state = data.Bookmarks(books, min(8, len(books)), model.c.seg * b.segments, once=True), None
    for batch in (loader.next().to(stream.device_of(model)) for _ in range(windows)):
        state = stream.enter(model, state or model.init_state(len(batch.x)), batch.fresh)
        for x, _ in stream.segments(model, batch.x, batch.y):
            before, state = state, model(x, state)[1]
            yield x, before, state


def writing(model, books, b, windows=16):
    """How Memformer writes, by segments since the book began: the share of slots that retain what they were (more than
    two thirds of the weight on themselves), that are overwritten (less than one), and that mix."""
    kept = [model.weights(x, state)[..., 0].mean(1) for x, state, _ in watched(model, books, b, windows)]   # (B, M)
    return [dict(retain=(w > 2 / 3).float().mean().item(), overwrite=(w < 1 / 3).float().mean().item()) for w in kept]


def ages(model, books, b, edges=(0, 256, 1024, 4096, 1 << 40)):
    """How old the eidetic tokens of B'MOJO are when 8,192 tokens were read: their share between these ages."""
    *_, (_, _, state) = watched(model, books, b, 8192 // (model.c.seg * b.segments))
    age = [(state["n"][:, None] - state[k])[state[k[:-2] + "eps"] >= 0] for k in state if k.endswith(".at")]
    share = np.histogram(torch.cat(age).cpu(), edges)[0] / sum(map(len, age))
    return [dict(start=lo, end=hi, share=x) for lo, hi, x in zip(edges, edges[1:], share)]


@torch.no_grad()
def passages(model, books, n=256, after=(0, 1, 2, 4, 8, 16, 32, 64), rows=64):
    """What is left of a passage, one segment of n held-out texts, after t segments of another book: it is read again,
    and the gain is by how much the loss of its second half, behind its first, is lower than if it had never been read.
    Nats a token, with its 95% interval over passages (M+ 2502.00592, section 4.4, on plain books)."""
    S, rng, device = model.c.seg, np.random.default_rng(0), stream.device_of(model)
    long = [t for t in books.tokens if len(t) > (max(after) + 2) * S]
    if not long:
        raise UserError(f"a passage needs a book of {(max(after) + 2) * S + 1:,} tokens, the longest has "
                        f"{max(map(len, books.tokens)):,}: use a smaller --seg")

    def cut(i, length):
        at = rng.integers(len(long[i % len(long)]) - length)
        return torch.from_numpy(long[i % len(long)][at:at + length].astype(np.int64)).to(device)
    once = torch.stack([cut(i, S + 1) for i in range(n)])                       # (n, S+1)
    others = torch.stack([cut(i + 1, (max(after) + 1) * S) for i in range(n)])  # the next book's, one more than goes by
    gains = []
    for once, others in zip(once.split(rows), others.split(rows)):
        nll = []
        for first in (others[:, :S], once[:, :S]):                              # never read, and read
            state = model(first, model.init_state(len(once)))[1]
            for t, x in enumerate([*others[:, S:].split(S, 1), None]):
                if t in after:
                    logits = model(once[:, :-1], state)[0][:, S // 2:]
                    loss = F.cross_entropy(logits.transpose(1, 2), once[:, S // 2 + 1:], reduction="none")
                    nll.append(loss[:, model.scored()[S // 2:]].mean(1))      # not where the model looked ahead
                state = state if x is None else model(x, state)[1]
        gains.append(torch.stack(nll).unflatten(0, (2, -1)).diff(dim=0)[0].neg())
    gains = torch.cat(gains, 1)                                                 # (times, n)
    half = 1.96 * gains.std(1) / n ** 0.5
    return [dict(after=t, gain=g, interval=h) for t, g, h in zip(after, gains.mean(1).tolist(), half.tolist())]


def interval(ours, theirs, draws=2000):
    """The difference of two losses in nats a token and its 95% interval, from the same books drawn again and again.
    ours and theirs: [nats, tokens] of each book."""
    (x, n), (y, _) = np.transpose(ours), np.transpose(theirs)
    i = np.random.default_rng(0).integers(len(n), size=(draws, len(n)))
    low, high = np.percentile((x - y)[i].sum(1) / np.maximum(n[i].sum(1), 1), [2.5, 97.5])
    return (x - y).sum() / n.sum(), low, high


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic streams

def trial_of(b, task):
    """The trial of that name; with another number of pairs, the recall that has them: everything in proportion, but for
    4,096 tokens a step and more steps."""
    t = TRIALS[task]
    if task == "recall" and b.pairs != 2:
        S = 8 * b.pairs
        flags = t.train.replace("seg=16", f"seg={S}").replace("batch=48", f"batch={128 // b.pairs}")
        t = replace(t, data=f"{t.data}:pairs={b.pairs}", test=f"{t.test}:pairs={b.pairs}", train=flags,
                    steps=1200, edges=tuple(range(0, 8 * S + 1, S)), windows=max(2, 64 // b.pairs))
    return t


def at_random(model):
    """Let M+ find just any vectors of its store."""
    model.score = lambda l, probe, state: torch.rand_like(state["key"][:, l, :, 0])
    return model


def as_oracle(model, batch):
    """Let M+ search its store like one who knows when the answer to each question of a batch was told."""
    S, K, rows, begin = model.c.seg, model.c.K, torch.arange(len(batch.x)), model.init_state(len(batch.x))["step"]
    told = (torch.arange(0, batch.x.size(1), S) - batch.at[:, ::S]) // S                     # (B, segments)

    def oracle(l, probe, state):
        then = told[rows, (state["step"] - begin).cpu()].to(begin.device)
        return (state["old_birth"][:, l] // K - begin[:, None] == then[:, None]).float()
    model.score = oracle


def trial(load, t, task, seed=0, oracle=False, read=math.inf):
    """Accuracy on a synthetic stream by the distance to the answer, or by the length of the text, as far as there are
    50 questions; and if a model searches, the share of questions for which it found the place of the answer.
    load(**fields) is the model, with these fields changed."""
    found = []
    for length in t.lengths:
        model, T = load(), length * t.seg
        name = (t.test if length > t.lengths[0] or len(t.lengths) == 1 else "") or t.data or task
        if len(t.lengths) > 1:
            fields = whole(model, T)
            if fields is None or T > read:
                continue
            model = load(**fields)
        edges = np.array(t.edges or (0, T + 1))
        texts = max(2, t.rows * t.windows * t.lengths[0] // length)
        loader = data.Synthetic(name, min(t.rows, texts), T, seed=(seed, 2))
        sums = np.zeros((3, len(edges) + 1))                   # questions, right answers, places found
        ahead = data.Synthetic(name, loader.B, T, seed=(seed, 2))
        with stream.overheard(model) as heard:
            for _ in range(texts // loader.B):
                if oracle:
                    as_oracle(model, ahead.next())
                batch, _, hit = next(stream.evaluate(model, loader, 1))
                asked = batch.y >= 0
                place = np.digitize(batch.at[asked].cpu().numpy(), edges)
                for row, x in zip(sums, (asked, hit, stream.met(model, batch, heard) if heard else ~asked)):
                    row += np.bincount(place, x[asked].cpu().numpy(), len(edges) + 1)
                heard.clear()
        found += [dict(length=T, start=int(lo), end=int(hi), questions=n, accuracy=r / n, found=m / n)
                  for lo, hi, n, r, m in zip(edges, edges[1:], *sums[:, 1:].tolist()) if n >= 50]
    return found


def whole(model, T):
    """The fields with which a model that is meant to see a whole text does so in one of T tokens; None if that takes too
    long: the time of full attention grows with the square."""
    kind, c = type(model).__name__, model.c
    if kind == "XL" and c.window < -1:
        return dict(window=T) if T <= 8192 else None
    return dict(bank=T // c.m) if kind == "GCA" else {}


# ----------------------------------------------------------------------------------------------------------------------
# cost

class Plain(nn.Module):
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

    def forward(self, tokens, state):
        x = self.token(tokens) + self.position.weight[:tokens.size(1)]
        for b in self.blocks:
            q, k, v = (y.unflatten(2, (self.c.heads, -1)).transpose(1, 2) for y in b["qkv"](b["ln1"](x)).chunk(3, 2))
            x = x + b["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + b["down"](F.gelu(b["up"](b["ln2"](x))))
        return self.head(self.ln(x)), state

    def init_state(self, B):
        return {}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive at once, .peak is the most, of those made inside the `with`. Eager only."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        given = {s._cdata for s in self.storages((args, kwargs))}      # a view of what was there is nothing new
        for storage in self.storages(out):
            key = storage._cdata
            if key not in self.seen and key not in given and storage.nbytes():
                self.seen[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, key)
        return out

    @staticmethod
    def storages(tree):
        return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]

    def drop(self, key):
        self.now -= self.seen.pop(key, 0)


def scan_over_loop(T=2048, H=4, D=32):
    """How many times as fast B'MOJO's scan of T tokens is, forward and backward, as a loop over its one-token step."""
    x, a, dt, b, c = torch.randn(1, T, H, D), -torch.rand(1, T, H), torch.rand(1, T, H), *torch.randn(2, 1, T, D)
    tokens, skip, h = [v.requires_grad_() for v in (x, dt, a, b, c)], torch.ones(H), torch.zeros(1, H, D, D)

    def loop(h):
        y = []
        for token in zip(*(v.split(1, 1) for v in tokens)):
            out, h = bmojo.step(*token, skip, h)
            y.append(out)
        return torch.cat(y, 1)
    fast, slow = seconds(torch.device("cpu"), lambda: bmojo.scan(*tokens, skip, h)[0].sum().backward(),
                         lambda: loop(h).sum().backward(), rounds=3)
    return np.median(slow / fast)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device, *functions, rounds=9, again=False):
    """Seconds of each function, (functions, rounds); timed in turn in every round, so that a slow minute hits them
    alike and ratios within a round can be trusted. `again` runs each twice and times the second, as in a loop that does
    nothing else: memory and caches are as the function leaves them, not as the one before it did."""
    times = np.zeros((len(functions), rounds + 1))
    for r in range(rounds + 1):
        for i, f in enumerate(functions):
            if again:
                f()
            wait(device)
            start = time.perf_counter()
            f()
            wait(device)
            times[i, r] = time.perf_counter() - start
    return times[:, 1:]   # the first round warms up


def training_step(model, rows, K, walk=stream.bptt, compile=False):
    """A step of training as train.py makes it, on random tokens: forward, backward, update."""
    c, device = model.c, stream.device_of(model)
    x, y = torch.randint(c.vocab, (2, rows, K * c.seg), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss = partial(F.cross_entropy, reduction="sum") if isinstance(model, Plain) else stream.summed_loss
    forward, state = stream.step_of(model, compile=compile, loss=loss), model.init_state(rows)

    def step():
        walk(model, forward, x, y, stream.detach(state), 1 / x.numel())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def held(reader):
    """Bytes that a reader keeps between two calls: its state, its page, and the cache of the open segment."""
    return sum(t.nbytes for t in tree_leaves([reader.state, reader.page, reader.cache]) if isinstance(t, torch.Tensor))


def copied(reader):
    """A reader of the same text at the same place, to read on in another way."""
    other = copy.copy(reader)
    other.turn_page({k: v.clone() for k, v in reader.state.items()}, reader.page)
    return other


def cost(model, b):
    """What training and reading cost, and how that grows with what was read."""
    c, device = model.c, stream.device_of(model)
    plain = Plain(c).to(device)
    tokens = b.batch * b.segments * c.seg
    steps = [training_step(m, b.batch, b.segments, compile=b.compile) for m in (model, plain)]
    ours, theirs = seconds(device, *steps, again=True)

    # reading on, and decoding, after a little and after a lot was read: one segment each, in turn
    depths = sorted({d for d in (1024, 16_384, 262_144) if d < b.read} | {b.read})
    book, reader = torch.randint(c.vocab, (1, b.read), device=device), stream.Reader(model.eval())
    readers, kept, peaks = [], [], []
    for d in depths:
        if reader.count < d // c.seg * c.seg:
            reader(book[:, reader.count:d // c.seg * c.seg])
        readers.append(copied(reader))
        with torch.no_grad(), LiveBytes() as live:
            readers[-1](book[:, :c.seg + 1])
        kept.append(held(readers[-1]))
        peaks.append(live.peak)
        readers[-1] = copied(reader)
    read, decode = ([lambda r=r, n=n: [r(x) for x in book[:, :c.seg].split(n, 1)] for r in readers] for n in (c.seg, 1))
    times = seconds(device, *read, *decode).reshape(2, len(depths), -1)
    model.train()
    more = dict(scan=scan_over_loop()) if getattr(c, "mix", "") == "bmojo" and c.M else {}
    return dict(more, training_tokens_per_s=tokens / np.median(ours), speed_over_plain=np.median(theirs / ours),
                state_bytes=stream.nbytes(model.init_state(1)),
                reading=[dict(read=d, read_ms=1000 * t / c.seg, decode_ms=1000 * t1 / c.seg, held=h, peak=p)
                         for d, t, t1, h, p in zip(depths, *np.median(times, 2), kept, peaks)],
                **{k: np.median(t[-1] / t[0]) for k, t in zip(("read_growth", "decode_growth"), times)})


# ----------------------------------------------------------------------------------------------------------------------
# replay

def checkpointed(model, step, x, y, state, scale):
    """Back-propagation in which autograd keeps what enters a call, and walks it once more on the way back."""
    again = lambda *args: torch.utils.checkpoint.checkpoint(step, *args, use_reentrant=False)
    return stream.bptt(model, again, x, y, state, scale)


WALKS = dict(bptt=stream.bptt, checkpoint=checkpointed, replay=stream.replay)


def replay(model, rows=1, through=(2, 4, 8, 16, 32), rounds=3):
    """Three ways to the same gradients through K segments: the most bytes alive at once beside weights and gradients,
    and the time, each also as a multiple of what plain back-propagation takes."""
    device, step, walks = stream.device_of(model), stream.step_of(model), {}
    for K in through:
        x = torch.randint(model.c.vocab, (rows, K * model.c.seg), device=device)
        for way, walk in WALKS.items():
            walks[way, K] = lambda walk=walk, x=x: walk(model, step, x, x, model.init_state(rows), 1 / x.numel())
    walks["bptt", through[0]]()                              # makes the gradients, to which the others add
    peaks = {}
    for key, walk in walks.items():
        with LiveBytes() as live:
            walk()
        peaks[key] = live.peak
    times = dict(zip(walks, seconds(device, *walks.values(), rounds=rounds)))
    return {way: [dict(K=K, peak=peaks[way, K], ms=1000 * np.median(times[way, K]),
                       bytes_over_bptt=peaks[way, K] / peaks["bptt", K],
                       time_over_bptt=np.median(times[way, K] / times["bptt", K])) for K in through] for way in WALKS}


# ----------------------------------------------------------------------------------------------------------------------
# The report

def table(head, rows):
    """A Markdown table whose columns line up."""
    cells = [head, ["-"] * len(head), *[[str(c) for c in row] for row in rows]]
    wide = [max(map(len, column)) for column in zip(*cells)]
    cells[1] = ["-" * wide[0], *["-" * (w - 1) + ":" for w in wide[1:]]]
    rows = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide))] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def size(n):
    """Bytes for people."""
    return f"{n} B" if n < 1024 else f"{n / 1024:.1f} KB" if n < 2 ** 20 else f"{n / 2 ** 20:.1f} MB"


def column(s):
    """The head of a column of a trial: a range of distances, or a length of text."""
    return f"{s['start']}-{s['end'] - 1}" if s["end"] <= s["length"] else f"{s['length']:,}"


def percent(s):
    """The mean accuracy, and of several seeds the lowest and the highest; and behind a colon what was found."""
    ends = f" ({min(s['each']):.0%} to {max(s['each']):.0%})" if len(s["each"]) > 1 else ""
    return f"{s['accuracy']:.0%}{ends}" + f": {s['found']:.0%}" * (s["found"] > 0)


def summary(found):
    """The one table: a line a model, the columns of the tasks that ran; "" if none of them has a column in it."""
    lines = {}
    for name, r in found["models"].items():
        lines[name] = cells = {}
        if "depth" in r:
            d, score = r["depth"], r["depth"]["all"]
            cells.update({"parameters": f"{d['parameters'] / 1e6:.2f}M", "extra": f"{d['extra']:.1%}",
                          "loss": f"{score['loss']:.3f}", "bits/byte": f"{score['bits_per_byte']:.3f}",
                          "word ppl": f"{score['word_perplexity']:.0f}", "memory": f"{score['memory']:.3f}"})
        if "recall" in r:
            cells.update({f"recall {column(s)}": f"{s['accuracy']:.0%}" for s in r["recall"][:4]})
        if "cost" in r:
            c = r["cost"]
            cells.update({"state/row": size(c["state_bytes"]),
                          "train tok/s": f"{c['training_tokens_per_s'] / 1e3:.1f}k",
                          "ms/token": f"{c['reading'][0]['decode_ms']:.2f}",
                          f"after {c['reading'][-1]['read'] // 1000:,}k": f"{c['decode_growth']:.2f}x"})
    head = max(lines.values(), key=len)                      # not every model has been through every task
    rows = [[name, *(cells.get(k, "") for k in head)] for name, cells in lines.items() if cells]
    return table(["model", *head], rows) if rows else ""


def details(found):
    """The curves behind the one table."""
    parts = []

    def part(title, task, columns, cells, last=None):
        rows = {name: r[task] for name, r in found["models"].items() if r.get(task)}
        if rows:
            first = max(rows.values(), key=len)                  # a model may not have gone as far as the others
            lines = [[name, *cells(r)] for name, r in rows.items()] + ([["", *last(first)]] if last else [])
            head = ["model", *columns(first)]
            body = table(head, [line + [""] * (len(head) - len(line)) for line in lines])
            parts.append(f"{title(first)}\n\n{body}")

    def depths(r):
        short = lambda n: f"{n / 1024:.0f}k" if n >= 1024 else str(n)
        return [f"{short(s['start'])}-{short(s['end'])}" for s in r["by_position"]]

    part(lambda r: f"Loss in nats a token by position in the book (held-out books: {r['books']}):", "depth",
         depths, lambda r: [f"{s['loss']:.3f}" for s in r["by_position"]])
    first, base = next(((name, r["depth"]) for name, r in found["models"].items() if "depth" in r), ("", dict(books=0)))
    if base["books"] > 1:
        def against(r):
            for s, t in zip([r["all"], *r["by_position"]], [base["all"], *base["by_position"]]):
                mean, low, high = interval(s["by_book"], t["by_book"])
                yield f"{mean:+.3f} ({low:+.3f} {high:+.3f}){'~' if low <= 0 <= high else ' '}"
        part(lambda r: f"Loss minus that of {first} on the same books, with its 95% interval over books (~: a tie):",
             "depth", lambda r: ["all", *depths(r)], against)
    part(lambda r: "What a model remembers of the text before its segment:", "depth",
         lambda r: ["parameters", "more than gpt", "bytes a row", "exactly", "what fades"],
         lambda r: [f"{r['parameters']:,}", f"{r['extra']:.1%}", size(r["state_bytes"]), *r["keeps"]])
    part(lambda r: "What memory is worth: by how much the loss grows when every segment begins with an empty one:",
         "depth", depths, lambda r: [f"{s['memory']:.3f}" for s in r["by_position"]])
    if found["settings"]["interleave"] > 1:
        part(lambda r: "Books in turns: the loss, and the loss with the memory of another row; how much of a search's "
                       "weight lies on memories of the segment's own book, and their share in the bank:", "depth",
             lambda r: ["loss", "a stranger's memory", "weight on own book", "chance"],
             lambda r: [f"{r['all']['loss']:.3f}", f"{r['stranger']:.3f}",
                        *(f"{r[k]:.1%}" if k in r else "" for k in ("own", "chance"))])
    for name, r in found["models"].items():
        w = r.get("depth", {}).get("writing", [])
        at = [i for i in (0, 1, 3, 7, 15, 31, 63) if i < len(w)]
        if w:
            rows = [[k, *(f"{w[i][k]:.0%}" for i in at)] for k in ("retain", "overwrite")]
            parts.append(f"Slots of {name} that keep two thirds of themselves, or lose two thirds, when a book's n-th "
                         f"segment is written:\n\n{table(['n', *(str(i + 1) for i in at)], rows)}")
    part(lambda r: "Loss on held-out windows after a tenth of the steps, by learning rate; the lowest one was taken:",
         "search", lambda r: list(r), lambda r: [f"{x:.3f}" for x in r.values()])
    part(lambda r: "Eidetic tokens by their age in tokens, after 8,192 were read:", "ages",
         lambda r: [f"{s['start']}-{s['end'] - 1}" if s["end"] < 1 << 40 else f"{s['start']}-" for s in r],
         lambda r: [f"{s['share']:.0%}" for s in r])
    part(lambda r: "By how much the second half of a passage, a segment, is easier to read when the passage was read "
                   "before, so many segments of another book ago, in nats a token with a 95% interval over passages:",
         "passage", lambda r: [str(s["after"]) for s in r],
         lambda r: [f"{s['gain']:.3f} ±{s['interval']:.3f}" for s in r])
    part(lambda r: "Loss by place in the segment:", "depth",
         lambda r: [f"{s['start']}-{s['end'] - 1}" for s in r["by_place"]],
         lambda r: [f"{s['loss']:.3f}" for s in r["by_place"]])
    for task, t in TRIALS.items():
        part(lambda r: f"Accuracy on {task}, {t.about} (chance {1 / data.VALUES:.0%}; the number of questions in the "
                       "last line):", task, lambda r: list(map(column, r)), lambda r: list(map(percent, r)),
             lambda r: [f"{s['questions']:,.0f}" for s in r])
    part(lambda r: "After so many tokens were read: ms a token to read on in whole segments, ms a token to write, "
                   "bytes held, peak bytes of reading on:", "cost",
         lambda r: [f"{x['read']:,}" for x in r["reading"]],
         lambda r: [f"{x['read_ms']:.2f} ms, {x['decode_ms']:.2f} ms, {size(x['held'])}, {size(x['peak'])}"
                    for x in r["reading"]])
    parts += replay_table({name: r["replay"] for name, r in found["models"].items() if "replay" in r}) + claims(found)
    scans = [r["cost"]["scan"] for r in found["models"].values() if "scan" in r.get("cost", {})]
    if scans:
        parts.append("B'MOJO's scan of 2,048 tokens, forward and backward, over a loop of its one-token step: "
                     f"{np.median(scans):.0f} times as fast")
    gpt = found["models"].get("gpt", {}).get("cost")
    if gpt:
        parts.append(f"Training speed of gpt over that of nanoGPT's model, same shape, in plain PyTorch, both "
                     f"{'compiled' if found['settings']['compile'] else 'eager'}: {gpt['speed_over_plain']:.2f}x")
    return "\n\n".join(parts)


def claims(found):
    """What the papers say and what we found, as far as it was measured, and whether that holds."""
    models, rows = found["models"], []

    def columns(name, task):
        """Those of the first model whose name begins so and that was not changed for the test; None: not measured."""
        return next((r[task] for n, r in models.items() if n.startswith(name) and "/" not in n and r.get(task)), None)

    def claim(paper, says, needs, text, holds):
        if None not in needs:
            rows.append([paper, says, text(*needs), "holds" if holds(*needs) else "does not hold here"])
    if found["settings"]["interleave"] > 1 and all("depth" in models.get(n, {}) for n in ("rmt", "hmt")):
        mean, low, high = interval(*(models[n]["depth"]["all"]["by_book"] for n in ("hmt", "rmt")))
        claim("HMT", "on texts in turns a search beats the newest memory (RMT)", [mean, low, high],
              lambda mean, low, high: f"{mean:+.3f} nats ({low:+.3f} to {high:+.3f})", lambda _, low, high: high < 0)
    for r in models.values():
        if "replay" in r:
            few, many = r["replay"]["replay"][1], r["replay"]["replay"][-1]
            claim("Memformer", "memory replay needs the memory of one segment, at little more time", [few, many],
                  lambda few, many: f"{many['peak'] / few['peak']:.2f}x the bytes at K={many['K']} as at K={few['K']}, "
                  f"{many['time_over_bptt']:.2f}x the time", lambda few, many: many["peak"] < 1.05 * few["peak"])
    far = [half(columns(name, "retain")) for name in ("memoryllm", "mplus")]
    claim("M+", "keeps 8 times longer than MemoryLLM (160k tokens, not 20k)", far,
          lambda a, b: f"accuracy halves after {a:.0f} and {b:.0f} tokens", lambda a, b: b >= 8 * a)
    claim("B'MOJO", "recalls more than Mamba, hybrid and its own fading memory",
          [columns(n, "mqar") for n in ("mamba", "hybrid", "bmojo_f", "bmojo:state=8:eidetic=24")],
          lambda *found: f"{', '.join(f'{overall(r):.0%}' for r in found)} of all questions; beyond the window "
          + ", ".join(f"{r[-1]['accuracy']:.0%}" for r in found),
          lambda *found: sorted(found, key=overall) == list(found))
    needle = columns("gca", "needle")
    claim("GCA", "finds a needle in 1,000 times the length of training",
          [needle[-1] if needle and needle[-1]["length"] >= 64_000 else None],
          lambda s: f"{s['accuracy']:.0%} right, {s['found']:.0%} found in {s['length']:,} tokens",
          lambda s: s["accuracy"] > 0.95)
    return [f"What the papers say:\n\n{table(['paper', 'says', 'found', ''], rows)}"] if rows else []


def overall(columns):
    """Accuracy of a trial over the questions of all its columns."""
    return np.average([s["accuracy"] for s in columns], weights=[s["questions"] for s in columns])


def half(columns):
    """Tokens at which the accuracy of a trial is below half of that in its first column, inf if it never is."""
    return columns and next((s["start"] for s in columns if s["accuracy"] < columns[0]["accuracy"] / 2), math.inf)


def replay_table(models):
    """[] or [the table of `replay`, a line for each model and way, with Memformer's own table 3 below]."""
    if not models:
        return []
    columns = [f"K={x['K']}" for x in next(iter(models.values()))["bptt"]]
    lines = [[name, way, *[f"{size(x['peak'])}, {x['ms']:.0f} ms" for x in r[way]],
              *[f"{x['bytes_over_bptt']:.2f}x, {x['time_over_bptt']:.2f}x" for x in (r[way][1], r[way][-1])],
              f"{r[way][-1]['peak'] / r[way][1]['peak']:.2f}x"] for name, r in models.items() for way in WALKS]
    for way, megabytes, speed in zip(WALKS, (16177, 9885, 7229), (1.00, 0.48, 0.90)):
        there = dict.fromkeys(columns, "") | {"K=4": f"{megabytes:,} MB"}
        lines.append(["the paper", way, *there.values(), f"{megabytes / 16177:.2f}x, {1 / speed:.2f}x", "", ""])
    return ["Peak bytes and time of forward and backward through K segments, beside weights and gradients; both over "
            f"those of bptt; and the bytes at {columns[-1]} over those at {columns[1]}. The paper's are from table 3 "
            "of 2010.06891: 12 layers of width 512, all that the GPU held:\n\n"
            + table(["model", "way", *columns, f"{columns[1]} over bptt", f"{columns[-1]} over bptt", "grows"], lines)]


def draw(found, out):
    """depth.svg, the loss minus that of the first model on the same tokens, and a picture for each stream; returns the
    names drawn."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    drawn = []
    for task in ("depth", *TRIALS):
        models = {name: r[task] for name, r in found["models"].items() if task in r}
        if not models:
            continue
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        axes.set_prop_cycle(color=plt.cm.tab20.colors)
        first = next(iter(models))
        for name, r in models.items():
            if task == "depth":
                x = [s["end"] for s in r["by_position"]]
                y = [s["loss"] - base["loss"] for s, base in zip(r["by_position"], models[first]["by_position"])]
            else:
                x = [s["start"] if TRIALS[task].edges else s["length"] for s in r]
                y = [s["accuracy"] for s in r]
            axes.plot(x, y, marker=".", label=name)
        if task == "retain":
            axes.plot(x, [(1 - 2 / 16) ** (d / 4) for d in x], ":k", label="$(1-K/N)^t$")
        if task == "depth":
            axes.set(xlabel="position in the book, tokens", ylabel=f"loss minus {first}'s, nats a token", xscale="log")
        else:
            far = "distance to the answer, tokens" if TRIALS[task].edges else "length of the text, tokens"
            axes.set(xlabel=far, ylabel="accuracy", ylim=(0, 1.02), xscale="log" if max(x) > 1000 else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(out / f"{task}.svg")
        plt.close(figure)
        drawn.append(f"{task}.svg")
    return drawn + [draw_writing(name, r["depth"]["writing"], out) for name, r in found["models"].items()
                    if "writing" in r.get("depth", {})]


def draw_writing(name, rows, out):
    """writing-NAME.svg: what Memformer's slots do, segment by segment."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    retain, overwrite = (np.array([r[k] for r in rows]) for k in ("retain", "overwrite"))
    shares = dict(retain=retain, mix=1 - retain - overwrite, overwrite=overwrite)
    axes.stackplot(range(1, len(rows) + 1), *shares.values(), labels=list(shares))
    axes.set(xlabel="segments since the book began", ylabel="share of slots", xlim=(1, len(rows)), ylim=(0, 1))
    figure.legend(loc="outside right upper", frameon=False)
    path = out / f"writing-{name.replace(':', '-').replace('=', '')}.svg"
    figure.savefig(path)
    plt.close(figure)
    return path.name


# ----------------------------------------------------------------------------------------------------------------------
# The run

def source(task, spec):
    """What a measurement needs to be trained: the task that trains, and the model without what is changed for tests."""
    return "depth" if task == "passage" else task, spec.partition("/")[0]


def work(b, jobs, seed):
    """Train a model unless that was done before, and measure all that jobs [(task, spec)] want of it."""
    torch.manual_seed(seed)
    task, spec = source(*jobs[0])
    folder = Path(b.out) / f"{task}-{spec}-{seed}".replace(":", "-").replace("=", "")
    device, tried = train.machine(train.Run(device=b.device))[0], {}
    if task == "depth" and b.search and "lr" not in parts_of(spec)[1]:
        tried = searched(b, spec, seed, folder)
        b = replace(b, lr=float(min(tried, key=tried.get)))
    checkpoint = trained(flags_of(b, spec, task, seed), folder)

    def measured(task, spec):
        changed = fields_of(spec, tested=True)
        way = searcher(spec, task)

        def load(**more):
            model = nanomem.load(folder / "last.pt", **changed | more)[0].to(device).eval()
            return at_random(model) if way == "random" else model
        if task in TRIALS:
            return trial(load, trial_of(b, task), task, b.seed, way == "oracle", b.read)
        books = data.open_books(b.data, "test" if b.final else "validation", checkpoint["run"]["tokenizer"])
        if task == "passage":
            return passages(load(), books)
        return dict(depth(load(), books, b), search=tried, keeps=KEEPS.get(parts_of(spec)[0], ("", "")))
    return [measured(*job) for job in jobs]


def or_error(function, *args):
    """What the function returns, or a UserError in its place: one job that fails, because memory ran out or because of
    a bug in a model, must not cost the others."""
    try:
        return function(*args)
    except UserError as error:
        return error
    except Exception as error:
        return UserError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def threads_of(device):
    return torch.get_num_threads() if device.type == "cpu" else 1


def alone():
    """A process for one training among others: one thread, no bar; Ctrl-C is for train.py, which saves first."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def side_by_side(function, calls, n):
    """Yield (call, function(*call), or the UserError that it raised), n of them at work at a time: small models use one
    thread better than several."""
    if n == 1 or len(calls) < 2:
        yield from ((call, or_error(function, *call)) for call in calls)
        return
    pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), alone)
    try:
        futures = [(call, pool.submit(or_error, function, *call)) for call in calls]
        yield from ((call, or_error(future.result)) for call, future in futures)   # its process may be gone
    finally:
        pool.shutdown(cancel_futures=True)


def merged(runs):
    """The same results of several seeds: the mean of each number, and of accuracies also each."""
    one = runs[0]
    if isinstance(one, dict):
        each = dict(each=[r["accuracy"] for r in runs]) if "accuracy" in one else {}
        return {**{k: merged([r[k] for r in runs]) for k in one}, **each}
    if isinstance(one, list):
        return [merged(rows) for rows in zip(*runs)]
    return one if all(r == one for r in runs) else sum(runs) / len(runs)


def models_of(b, task):
    """The models of a task, all unless it has its own, after making sure that each can be built."""
    names = lambda text: [w.strip() for w in text.split(",") if w.strip()]
    own = names(TRIALS[task].models if task in TRIALS else "memformer" * (task == "replay"))
    t = trial_of(b, task) if task in TRIALS else None
    every = own + [name + (t.others if t else "") for name in nanomem.MODELS
                   if name not in {parts_of(spec)[0] for spec in own}]
    specs = [spec for word in names(b.models) for spec in (every if word == "all" else [word])] or own or every
    for spec in specs:
        name, _, _ = parts_of(spec)
        if name not in nanomem.MODELS:
            raise UserError(f"--models={name} is none of them: {cli.nearest(name, list(nanomem.MODELS))}")
        fields, T = {**fields_of(spec), **fields_of(spec, tested=True)}, t and t.lengths[0] * t.seg
        if t and T % fields.get("seg", t.seg):
            raise UserError(f"{spec}: texts of {T} tokens are no whole number of segments of {fields['seg']}")
        searcher(spec, task)
    return specs


def model_of(b, spec):
    """An untrained model of the size that reads books."""
    shape = {**shape_of(b, spec), "vocab": VOCAB}
    return nanomem.build(parts_of(spec)[0], **{**shape, **fields_of(spec), **fields_of(spec, tested=True)})


def expense(b, device, task, spec):
    """[What `cost` or `replay` measures of an untrained model]."""
    torch.manual_seed(b.seed)
    model = model_of(b, spec).to(device)
    return [cost(model, b) if task == "cost" else replay(model)]


def main(argv):
    (typed,), words = cli.parse(argv, Bench)
    if words:
        raise UserError(f"bench.py takes only flags, got {words[0]}")
    suite = typed.get("suite", "")
    if suite and suite not in SUITES:
        raise UserError(f"--suite={suite} is none of them: {cli.nearest(suite, list(SUITES))}")
    b = Bench(**{**SUITES.get(suite, {}), **typed})
    tasks = [w.strip() for w in b.tasks.split(",") if w.strip()] or QUICK
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks={task} is none of them: {cli.nearest(task, TASKS)}")
    seeds = range(b.seed, b.seed + b.seeds)
    jobs = [(task, spec) for task in TASKS if task in tasks for spec in models_of(b, task)]
    same = {}                                              # what one training serves
    for job in jobs:
        same.setdefault(source(*job), []).append(job)
    trainings = [(b, served, seed) for (task, _), served in same.items() if task not in ("cost", "replay")
                 for seed in seeds]
    costs = [(task, spec) for task, spec in jobs if task in ("cost", "replay")]
    if b.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if b.read < 2048:
        raise UserError(f"--read={b.read} is too little to compare with the cost after 1,024 tokens: at least 2048")
    out, start = Path(b.out), time.perf_counter()
    device = train.machine(train.Run(device=b.device))[0]
    chip = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    found = dict(command=" ".join(["python bench.py", *argv]), machine=f"{chip}, torch {torch.__version__}",
                 settings=asdict(b), models={spec: {} for _, spec in jobs})
    runs, failed = {job: [] for job in jobs}, []
    with tqdm(total=len(trainings) + len(costs), unit="job") as bar:
        def done(jobs, results):
            name = "{} of {}".format(*jobs[-1])
            if isinstance(results, UserError):
                failed.append(f"{name}: {str(results).splitlines()[0]}")
                bar.write(f"warning: {name}: {results}", sys.stderr)
                results = []
            for job, result in zip(jobs, results):
                runs[job].append(result)
            bar.set_description(name)
            bar.update()
        for (_, served, _), results in side_by_side(work, trainings, b.jobs or threads_of(device)):
            done(served, results)
        for job in costs:                                  # alone on the machine
            done([job], or_error(expense, b, device, *job))
    if failed and not any(runs.values()):
        raise UserError(failed[0])
    for (task, spec), results in runs.items():
        if results:
            found["models"][spec][task] = merged(results)
        for part in ("ages", "search"):
            found["models"][spec][part] = found["models"][spec].get("depth", {}).get(part)
    found["minutes"] = (time.perf_counter() - start) / 60
    tokens = b.batch * b.segments * b.seg
    report = (f"{found['command']}\n{found['machine']}; {found['minutes']:.1f} minutes; {b.steps} steps of {tokens:,} "
              f"tokens on {b.data or 'Moby-Dick'}; seed {', '.join(map(str, seeds))}")
    tables = "\n\n".join(filter(None, [summary(found), details(found)]))
    print(f"\n{report}\n\n{tables}\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(found, indent=1, default=float))
    (out / "report.md").write_text(f"```\n{report}\n```\n\n{tables}\n")
    print(f"written to {out}:", ", ".join(["report.md", "report.json", *(draw(found, out) if b.plot else [])]))
    if failed:
        raise UserError(f"not all of it could be measured: {'; '.join(failed)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
