"""Synthetic tasks: texts that hide a few facts and ask for them later. They come in the same batches as books.

Each generator makes B texts of T tokens and returns three arrays (B, T): inputs x; targets y, -1 where nothing is
scored; and distances, from a question back to the pair that answers it, in tokens from key to key, 0 elsewhere.
In the examples, letters are keys, digits are values, dots are filler, and _ means that nothing is scored.

Settings may follow the name of a task: --data=recall:pairs=8
"""
import inspect

import numpy as np
import torch

from .cli import UserError, nearest, value, variant
from .data import Batch

# Token numbers: 0 to 15 are noise, 16 to 47 are values, and from 48 on there are up to 64 keys.
NOISE, VALUES, KEYS = 16, 32, 64


def draw(rng, B, n, k):
    """For each of B texts, k different numbers below n in random order, all choices equally likely: (B, k)."""
    return rng.permuted(np.tile(np.arange(n), (B, 1)), axis=1)[:, :k]


def draw_keys(rng, B, n):
    """n different keys for each text (B, n), of the first 16 if that is enough, since fewer keys are learned sooner."""
    return NOISE + VALUES + draw(rng, B, max(16, n), n)


def filler(rng, B, T):
    """Noise and values that belong to no key: that a value was seen says nothing."""
    return rng.integers(NOISE + VALUES, size=(B, T))


def put_pairs(rng, x, y, distances, pairs, asks, mixed=False):
    """Put key-value pairs into x, as `recall` describes. Returns each pair's key, value and last place, (B, pairs)."""
    B, T = x.shape
    if not 0 < pairs <= KEYS or asks < 1 or pairs * (asks + 1) > T // 2:
        raise UserError(f"{pairs} pairs that are asked for {asks} times do not fit into {KEYS} keys and {T} tokens")
    n = pairs * (asks + 1)
    places = 2 * np.sort(draw(rng, B, T // 2, n), 1)                     # (B, n) from left to right
    pair = draw(rng, B, n, n) % pairs                                    # (B, n) which pair stands there
    if mixed:
        pair = pair % (1 + rng.integers(pairs, size=(B, 1)))             # only this many different ones
    texts, last = np.arange(B), np.full((B, pairs), -1)                  # the last place of each pair so far
    before = np.zeros_like(places)                                       # (B, n) the last place of that pair, or -1
    for i in range(n):                                                   # through all B texts together
        before[:, i] = last[texts, pair[:, i]]
        last[texts, pair[:, i]] = places[:, i]
    key, answer = draw_keys(rng, B, pairs), NOISE + rng.integers(VALUES, size=(B, pairs))
    texts = texts[:, None]
    x[texts, places], x[texts, places + 1] = key[texts, pair], answer[texts, pair]
    y[texts, places] = np.where(before >= 0, answer[texts, pair], -1)    # the first time, the value cannot be known
    distances[texts, places] = np.where(before >= 0, places - before, 0)
    return key, answer, last


def recall(rng, B, T, pairs=2, asks=0, mixed=False):
    """Key-value pairs lie in filler. Each key comes back `asks` times and asks for its value, which follows again.

        inputs    . . A 3 B 7 . . A 3 . . B 7 . .
        targets   _ _ _ _ _ _ _ _ 3 _ _ _ 7 _ _ _
        distance                  6       8           tokens since the pair was last seen

    The pairs stand at even places. All choices of places are equally likely, and so are all orders of the pairs: some
    questions are near their answer, some are far. With asks=0, the pairs fill about half of the text. With `mixed`,
    each text draws how many different pairs it has, from 1 to `pairs`, all equally likely (fewer pairs come back more
    often): many are learned after few.
    """
    asks = asks or T // (4 * max(1, pairs)) - 1
    x = filler(rng, B, T)
    y, distances = np.full_like(x, -1), np.zeros_like(x)
    put_pairs(rng, x, y, distances, pairs, asks, mixed)
    return x, y, distances


def needle(rng, B, T, distance=0, pairs=1, asks=1, hops=1, notice=0):
    """Pairs (needles) lie in noise. Each key comes back `asks` times, alone, and asks for its value.

        inputs    . . A 3 . . . . . . . A . A . .
        targets   _ _ _ _ _ _ _ _ _ _ _ 3 _ 3 _ _
        distance                        9   11        tokens since the needle

    hops=2: A is followed by another key, B, and further on B is followed by 3. A still asks for 3, and the distance
    counts from the last of these needles.
    notice=n: the key of a question also stands n tokens before it, for models that need a while to fetch the answer.
    distance=d: the only question is the last token, and its needle stands d tokens before.

    The text is divided into slots of width notice + 2. Needles and questions take one slot each. All choices of slots
    are equally likely; of the slots for one key, the first are its needles, in order, and the others are its questions.
    """
    width = notice + 2
    if min(pairs, asks, hops, notice + 1) < 1 or pairs * hops > KEYS or pairs * (hops + asks) > T // width:
        raise UserError(f"{pairs} needles (hops={hops}, notice={notice}) that are asked for {asks} times do not fit "
                        f"into {KEYS} keys and {T} tokens")
    if distance and not (2 <= distance < T and pairs == asks == hops == 1 and notice == 0):
        raise UserError(f"a needle at distance {distance} does not fit into {T} tokens, or is not the only one")
    x = rng.integers(NOISE, size=(B, T))
    y, distances = np.full_like(x, -1), np.zeros_like(x)
    texts = np.arange(B)[:, None]
    slots = draw(rng, B, T // width, pairs * (hops + asks)).reshape(B, pairs, hops + asks)
    slots = width * np.sort(slots, 2)                                                    # where they begin
    keys = draw_keys(rng, B, pairs * hops).reshape(B, pairs, hops)
    for pair in range(pairs):
        needles, questions = slots[:, pair, :hops], slots[:, pair, hops:] + width - 1    # (B, hops) and (B, asks)
        needles = needles + 2 * rng.integers(width // 2, size=(B, hops))     # at an even distance from its beginning
        if distance:
            needles, questions = np.full((B, 1), T - 1 - distance), np.full((B, 1), T - 1)
        key, answer = keys[:, pair], NOISE + rng.integers(VALUES, size=(B, 1))           # (B, hops) and (B, 1)
        x[texts, needles] = key
        x[texts, needles + 1] = np.concatenate([key[:, 1:], answer], 1)
        x[texts, questions] = x[texts, questions - notice] = key[:, :1]
        y[texts, questions], distances[texts, questions] = answer, questions - needles[:, -1:]
    return x, y, distances


def delayed(rng, B, T, pairs=1, start=16, gap=64, every=4):
    """Delayed recall. The first `start` tokens are pairs, as in `recall`. Noise follows, in which from token `gap` on
    one of `every` tokens is a key that asks again. No answer follows it, so that only the beginning helps.
    Here start=8, gap=12, every=4:

        inputs    A 3 B 7 B 7 A 3 . . . . . A . . B . . .
        targets   _ _ _ _ 7 _ 3 _ _ _ _ _ _ 3 _ _ 7 _ _ _
        distance          2   6             7     12      tokens since the pair was last seen

    Each question takes any of its `every` places and asks for any pair, all equally likely.
    """
    if not 0 < start <= gap <= T - every or every < 1:
        raise UserError(f"pairs in {start} tokens and questions every {every} from {gap} on do not fit into {T} tokens")
    x = rng.integers(NOISE, size=(B, T))
    y, distances = np.full_like(x, -1), np.zeros_like(x)
    x[:, :start] = filler(rng, B, start)
    asks = start // (2 * max(1, pairs)) - 1
    key, answer, last = put_pairs(rng, x[:, :start], y[:, :start], distances[:, :start], pairs, asks)
    questions = np.arange(gap, T - every + 1, every)
    questions = questions + rng.integers(every, size=(B, len(questions)))                # (B, n) places
    texts, pair = np.arange(B)[:, None], rng.integers(pairs, size=questions.shape)       # and what they ask for
    x[texts, questions], y[texts, questions] = key[texts, pair], answer[texts, pair]
    distances[texts, questions] = questions - last[texts, pair]
    return x, y, distances


def mqar(rng, B, T, pairs=0, power=0.01, noise=False):
    """Multi-query associative recall (Zoology 2312.04927). All pairs stand at the beginning. Later each key comes once
    more, alone, and asks for its value. The rest is blank (token 0), or filler with `noise`.

        inputs    A 3 B 7 . . B . A . . . . . . .
        targets   _ _ _ _ _ _ 7 _ 3 _ _ _ _ _ _ _
        distance              4   8                   tokens since the pair

    Keys differ, and so do values. With pairs=0 there is a pair for every 8 tokens, 16 at most. The questions take every
    second place behind the pairs. They are drawn one after the other; place g of those still free is drawn with a
    probability in proportion to g^(power - 1), where g = 1, 2, ... counts from the first, so that most come soon.
    """
    pairs = pairs or min(16, T // 8)
    if not 0 < pairs <= VALUES or 4 * pairs > T:
        raise UserError(f"{pairs} pairs and their questions do not fit into {VALUES} values and {T} tokens")
    if not 0 <= power <= 1:
        raise UserError(f"power lies between 0 (most questions come soon) and 1 (all places alike), got {power}")
    x = filler(rng, B, T) if noise else np.zeros((B, T), np.int64)
    y, distances = np.full_like(x, -1), np.zeros_like(x)
    key, answer = draw_keys(rng, B, pairs), NOISE + draw(rng, B, VALUES, pairs)          # (B, pairs)
    stood = np.arange(0, 2 * pairs, 2)                                                   # (pairs,) where the keys stand
    x[:, stood], x[:, stood + 1] = key, answer
    places = np.arange(2 * pairs, T - 1, 2)
    p = np.arange(1.0, len(places) + 1) ** (power - 1)
    p = p / p.sum()
    questions = np.stack([rng.choice(places, pairs, replace=False, p=p) for _ in range(B)])
    texts = np.arange(B)[:, None]
    x[texts, questions], y[texts, questions], distances[texts, questions] = key, answer, questions - stood
    return x, y, distances


def retain(rng, B, T, facts=0, chunk=4):
    """A text in chunks, one for each segment of a model. Some chunks tell a fact, a key and its value. Some begin with
    the key of an earlier fact and ask for its value. The rest is filler. Here chunk=4 and facts=2:

        inputs    . A 3 .|. . . .|. . B 7|A . . .|. . . .|B . . .
        targets   _ _ _ _|_ _ _ _|_ _ _ _|3 _ _ _|_ _ _ _|7 _ _ _
        distance                          11              10      divided by chunk, rounded down: chunks in between

    Each fact is asked for once. All choices of chunks are equally likely; of two that belong together, the first tells.
    With facts=0 there are 16 facts, or as many as fit.
    """
    chunks = T // chunk if chunk > 0 else 0
    facts = facts or min(16, chunks // 2)
    if not 0 < facts <= min(KEYS, chunks // 2) or chunk < 4:
        raise UserError(f"{facts} facts and their questions do not fit into {KEYS} keys and {chunks} chunks of {chunk}")
    x = filler(rng, B, T)
    y, distances = np.full_like(x, -1), np.zeros_like(x)
    two = draw(rng, B, chunks, 2 * facts).reshape(B, facts, 2)                           # two chunks for each fact
    told = two.min(2) * chunk + rng.integers(1, chunk - 1, size=(B, facts))              # (B, facts) places
    asked = two.max(2) * chunk
    key, answer = draw_keys(rng, B, facts), NOISE + rng.integers(VALUES, size=(B, facts))
    texts = np.arange(B)[:, None]
    x[texts, told], x[texts, told + 1], x[texts, asked] = key, answer, key
    y[texts, asked], distances[texts, asked] = answer, asked - told
    return x, y, distances


TASKS = {"recall": recall, "needle": needle, "delayed": delayed, "mqar": mqar, "retain": retain}


def is_task(name):
    """Whether --data=name means a synthetic task, with or without settings."""
    return name.partition(":")[0] in TASKS


def settings_of(name):
    """"recall:pairs=8" -> (recall, {all its settings}). Raises UserError for an unknown setting or a bad value."""
    name, typed = variant(name)
    parameters = inspect.signature(TASKS[name]).parameters
    settings = {k: p.default for k, p in parameters.items() if k not in ("rng", "B", "T")}
    settings["bptt_windows"] = 1
    for k, text in typed.items():
        if k not in settings:
            raise UserError(f"{name} has no setting {k}: {nearest(k, list(settings))}")
        settings[k] = value(f"data={name}:{k}", text, type(settings[k]))
    return TASKS[name], settings


def vocab_of(name):
    """The size of the vocabulary of a task with its settings: noise, values, and 16 keys or as many as it needs."""
    settings = settings_of(name)[1]
    keys = settings["facts"] if "facts" in settings else settings["pairs"] * settings.get("hops", 1)
    return NOISE + VALUES + max(16, keys)


class TaskLoader:
    """Batches of a task, with the methods of data.Loader. Batch i depends only on the seed and on i. Settings follow
    the name or are arguments, which win. With bptt_windows=n, a text is n batches long: memory must carry its
    facts from one BPTT window to the next, and back-propagation stays in one."""

    def __init__(self, name, B, T, seed=0, **settings):
        self.make, self.settings = settings_of(name)
        self.settings.update(settings)
        self.bptt_windows = self.settings.pop("bptt_windows")
        if self.bptt_windows < 1:
            raise UserError(f"a text lasts for one BPTT window at least, got bptt_windows={self.bptt_windows}")
        self.B, self.T, self.seed, self.i = B, T, seed, 0

    def next(self):
        text, part = divmod(self.i, self.bptt_windows)
        self.i += 1
        rng = np.random.default_rng((self.seed, text))
        arrays = self.make(rng, self.B, self.T * self.bptt_windows, **self.settings)     # the whole text
        begin, end = part * self.T, (part + 1) * self.T
        x, y, distances = (torch.from_numpy(a[:, begin:end]) for a in arrays)
        return Batch(x, y, fresh=torch.full((self.B,), part == 0), distance=distances,
                     position=torch.arange(begin, end).expand(self.B, self.T),
                     book=torch.arange(text * self.B, (text + 1) * self.B))

    def state_dict(self):
        return dict(i=self.i)

    def load_state_dict(self, state):
        assert state["i"] >= 0, "a position before the first text"
        self.i = int(state["i"])
