"""Text to tokens, tokens to shards, shards to windows; and the synthetic streams, which come as the same windows.

    python -m nanomem.data pg19 --out=data/pg19 --books=500   download PG-19 (500 of its books for training)
    python -m nanomem.data pg19 --out=data/pg19 --folder=DIR  the same from DIR/{train,validation,test}/ID.txt
    python -m nanomem.data text a.txt b.txt --out=data/mine   any text files, one book each

Every script then takes --data=data/pg19.
"""
import base64
import csv
import hashlib
import http.client
import inspect
import itertools
import json
import os
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from .cli import UserError, nearest, parse, run, value, variant

HERE = Path(__file__).parent

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""   # GPT-2's own splits
TOKENIZERS = ("gpt2-4k", "gpt2", "bytes")


def tokenizer(name):
    """A tiktoken.Encoding: `gpt2`, `gpt2-4k` (the first 4,096 merges of GPT-2, 3.4 bytes a token) or `bytes`."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise UserError(f"the gpt2 vocabulary could not be downloaded ({type(e).__name__}): point "
                            "TIKTOKEN_CACHE_DIR at a folder that has it, or use gpt2-4k, which needs none") from None
    if name == "gpt2-4k":
        lines = (HERE / "gpt2-4k.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    elif name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
    else:
        raise UserError(f"no tokenizer is called {name}: {nearest(name, TOKENIZERS)}")
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


def fingerprint(enc):
    return hashlib.sha256(b"".join(enc.decode_single_token_bytes(i) for i in range(enc.eot_token))).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Books: from text, from shards

@dataclass
class Books:
    """The books of one split. tokens[i] is uint16: end-of-text, then book i, so that every token of the book has a
    prediction; words[i] (between white space) and sizes[i] (UTF-8 bytes) measure its text."""
    enc: tiktoken.Encoding
    names: list
    tokens: list
    words: list
    sizes: list

    def __len__(self):
        return len(self.tokens)


def read_text(path):
    """A text file with its line ends made LF. Raises UserError if it is not there, empty or not UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start} is {e.object[e.start]:#x}): convert it") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not text.strip():
        raise UserError(f"{path} holds no text")
    return text


def encode(enc, text):
    return np.array([enc.eot_token, *enc.encode_ordinary(text)], dtype="<u2")


def from_texts(enc, texts):
    """Books held in memory, from (name, text) pairs."""
    names, texts = zip(*texts)
    return Books(enc, list(names), [encode(enc, t) for t in texts], [len(t.split()) for t in texts],
                 [len(t.encode()) for t in texts])


def hold_out(texts):
    """Split (name, text) pairs: the last tenth of the books is for validation, of a single book its own last tenth."""
    if len(texts) > 1:
        n = max(1, len(texts) // 10)
        return dict(train=texts[:-n], validation=texts[-n:])
    name, text = texts[0]
    if len(text) < 100:
        raise UserError(f"{name} is too short to train on: {len(text)} characters")
    cut = text.rfind("\n\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
    return dict(train=[(name, text[:cut])], validation=[(name + ", the end", text[cut:])])


MAGIC, VERSION = 20240520, 1   # of llm.c's .bin files
AGAIN = "make the shards again with python -m nanomem.data"


def write_shards(out, enc, splits, limit=2 ** 25):
    """Write {split: (name, text) pairs, sized if a bar shall know its end} as shards of at least `limit` tokens.

    <split>_00000.bin       llm.c's: 256 int32 (magic, version, tokens, and ours: books, eot, vocabulary), then uint16
    <split>_00000.idx.npy   int64 (books, 4): first token, tokens, words, bytes. A book never straddles two files
    meta.json               tokenizer, totals and names; written last, so that a folder without it is unfinished
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    meta = dict(format="nanomem shards", version=VERSION, tokenizer=enc.name, vocab=enc.n_vocab,
                ranks=fingerprint(enc), newlines="LF", splits={})
    for split, texts in splits.items():
        for old in out.glob(f"{split}_*"):
            old.unlink()
        files, names, book, index = [], [], [], []
        total = np.zeros(3, np.int64)

        def close():
            name = f"{split}_{len(files):05d}"
            tokens = np.concatenate(book)
            header = np.zeros(256, "<i4")
            header[:6] = MAGIC, VERSION, len(tokens), len(book), enc.eot_token, enc.n_vocab
            with open(out / f"{name}.bin", "wb") as f:
                f.write(header.tobytes() + tokens.tobytes())
            np.save(out / f"{name}.idx.npy", np.array(index, np.int64))
            files.append(name)
            book.clear(), index.clear()

        bar = tqdm(texts, desc=split, unit="book", smoothing=0.05)
        for name, text in bar:
            ids = encode(enc, text)
            row = len(ids), len(text.split()), len(text.encode())
            index.append((sum(map(len, book)), *row))
            book.append(ids)
            names.append(name)
            total += row
            bar.set_postfix_str(f"{total[0] / 1e6:.1f}M tokens")
            if index[-1][0] + len(ids) >= limit:
                close()
        if book:
            close()
        meta["splits"][split] = dict(zip(("tokens", "words", "bytes"), total.tolist()), files=files, names=names)
    scratch = out / "meta.json.tmp"
    scratch.write_text(json.dumps(meta, indent=1))
    os.replace(scratch, out / "meta.json")
    return meta


def open_shards(folder, split):
    """The Books of a folder that `write_shards` made, memory-mapped. Raises UserError for whatever is wrong with it."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["format"] == "nanomem shards" and meta["version"] == VERSION
        enc, splits, ranks = tokenizer(meta["tokenizer"]), meta["splits"], meta["ranks"]
    except FileNotFoundError:
        raise UserError(f"no shards in {folder} (it has no meta.json): make them with python -m nanomem.data") from None
    except (AssertionError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder / 'meta.json'} is damaged or not ours: {AGAIN}") from None
    if split not in splits:
        raise UserError(f"{folder} has no split {split}: {nearest(split, list(splits))}")
    if ranks != fingerprint(enc):
        raise UserError(f"{folder} was made with another {enc.name} vocabulary than the one here: {AGAIN}")
    books = Books(enc, splits[split]["names"], [], [], [])
    for name in splits[split]["files"]:
        tokens, index = open_shard(folder / f"{name}.bin", folder / f"{name}.idx.npy", enc)
        books.tokens += [tokens[start:start + n] for start, n in index[:, :2]]
        books.words += index[:, 2].tolist()
        books.sizes += index[:, 3].tolist()
    if len(books) != len(books.names):
        raise UserError(f"{folder}: meta.json names {len(books.names)} books of {split}, the shards hold {len(books)}: "
                        + AGAIN)
    return books


def open_shard(path, index_path, enc):
    """One shard's tokens (a memory map) and index, each checked against the other."""
    def refuse(why):
        raise UserError(f"{path}: {why}: {AGAIN}")
    try:
        header = np.fromfile(path, "<i4", 256)
        index = np.load(index_path, allow_pickle=False)
    except OSError as e:
        raise UserError(f"cannot read {e.filename or index_path}: {e.strerror or 'not an index file'}") from None
    except (ValueError, EOFError):
        raise UserError(f"{index_path} is not an index file: {AGAIN}") from None
    if len(header) < 256:
        refuse(f"truncated header, {path.stat().st_size} bytes of 1024")
    magic, version, n, docs, eot, vocab = header[:6].tolist()
    if magic != MAGIC:
        refuse(f"not a token shard (magic {magic}, expected {MAGIC})")
    if version != VERSION:
        refuse(f"shard version {version}, this code reads {VERSION}")
    if path.stat().st_size != 1024 + 2 * n:
        refuse(f"the header promises {n:,} tokens, the file has model for {(path.stat().st_size - 1024) / 2:,.0f}")
    if (eot, vocab) != (enc.eot_token, enc.n_vocab):
        refuse(f"written for a vocabulary of {vocab}, {enc.name} has {enc.n_vocab}")
    tokens = np.memmap(path, "<u2", "r", offset=1024, shape=(n,))
    good = index.ndim == 2 and index.shape == (docs, 4) and index.dtype == np.int64
    if not good or docs == 0 or (index[:, 1] < 2).any() or index[0, 0] != 0 or index[-1, :2].sum() != n \
            or (index[1:, 0] != index[:-1, :2].sum(1)).any() or (tokens[index[:, 0]] != eot).any():
        refuse(f"index and tokens disagree ({index_path.name})")
    return tokens, index


def open_books(data, split, name="gpt2-4k"):
    """The Books of a folder of shards, or with data="" of the embedded Moby-Dick (its last tenth is for validation)."""
    if data:
        return open_shards(data, split)
    texts = hold_out([("Moby-Dick", read_text(HERE / "books" / "moby-dick.txt"))])
    if split not in texts:
        raise UserError(f"the embedded book has no split {split}: {nearest(split, list(texts))}")
    return from_texts(tokenizer(name), texts[split])


# ----------------------------------------------------------------------------------------------------------------------
# Windows

class Batch(NamedTuple):
    """One window of B rows: what train, evaluate and bench read, from books and from synthetic streams alike."""
    x: torch.Tensor       # (B, T) tokens
    y: torch.Tensor       # (B, T) the tokens that come next, -1 where nothing is scored
    fresh: torch.Tensor   # (B,) this row opens a new book
    at: torch.Tensor      # (B, T) where a target stands: tokens of its book before it, or since its answer was seen
    book: torch.Tensor    # (B,) which book, -1 for none; (B, T) where a row takes turns between several

    def to(self, device):
        return Batch(*(t.to(device, non_blocking=True) for t in self))

    def rows(self, i, j):
        return Batch(*(t[i:j] for t in self))


class Bookmarks:
    """B bookmarks in B books, read in order, T tokens at a time. A bookmark at the end of its book moves to the next
    book, in an order that is shuffled anew for every epoch; a window lies inside one book, and the last window of a
    book is padded with targets of -1. `once` reads every book once, in the order given, and then raises StopIteration.

    With fewer books than bookmarks, the books are cut into pieces of equal length first, about four for each bookmark;
    `piece` sets that length. Memory starts afresh in each piece.

    `interleave` bookmarks share a row and take turns, `turn` tokens each; a target stays in its own book. The row is
    fresh when any of them opens a book.
    """

    def __init__(self, books, rows, T, seed=0, once=False, piece=None, interleave=1, turn=1):
        if interleave < 1 or T % (interleave * turn):
            raise UserError(f"{interleave} books do not take even turns of {turn} tokens in a window of {T}")
        self.turns, self.turn = interleave, turn
        rows, T = rows * interleave, T // interleave
        self.books, self.B, self.T, self.seed, self.once = books, rows, T, seed, once
        if piece is None and len(books) < rows and not once:
            piece = max(T, sum(len(t) - 1 for t in books.tokens) // (4 * rows) // T * T)
        # (book, first target, end): tokens[i] is the target of tokens[i - 1]
        self.pieces = [(b, i, min(i + (piece or len(t)), len(t)))
                       for b, t in enumerate(books.tokens) for i in range(1, len(t), piece or len(t))]
        self.dealt = 0                    # pieces that were handed out so far, over all epochs
        self.marks = [None] * rows        # (piece, next target), None for a row with nothing to read

    def deal(self):
        epoch, i = divmod(self.dealt, len(self.pieces))
        if self.once and epoch:
            return None
        self.dealt += 1
        if not self.once:
            i = int(np.random.default_rng((self.seed, epoch)).permutation(len(self.pieces))[i])
        return i, self.pieces[i][1]

    def next(self):
        x = np.full((self.B, self.T), self.books.enc.eot_token)
        y, at = np.full_like(x, -1), np.zeros_like(x)
        fresh, book = np.zeros(self.B, bool), np.full(self.B, -1)
        for row in range(self.B):
            mark = self.marks[row]
            if mark is None or mark[1] >= self.pieces[mark[0]][2]:
                mark, fresh[row] = self.deal(), True
            if mark is not None:
                (piece, i), (book[row], start, end) = mark, self.pieces[mark[0]]
                n = min(self.T, end - i)
                window = self.books.tokens[book[row]][i - 1:i + n].astype(np.int64)
                x[row, :n], y[row, :n] = window[:-1], window[1:]
                at[row, :n] = np.arange(i, i + n) - start
                mark = (piece, i + n)
            self.marks[row] = mark
        if (book < 0).all():
            raise StopIteration
        if self.turns > 1:
            fresh = (fresh & (book >= 0)).reshape(self.turns, -1).any(0)   # a bookmark with nothing left to read is not
            x, y, at, book = map(self.take_turns, (x, y, at, np.broadcast_to(book[:, None], x.shape)))
        return Batch(*map(torch.from_numpy, (x, y, fresh, at, book)))

    def take_turns(self, rows):
        """Windows (G*B, T/G) of G*B bookmarks -> (B, T): row b is turn 0 of bookmarks b, B+b, 2B+b, ..., then 1."""
        return rows.reshape(self.turns, -1, self.T // self.turn, self.turn).transpose(1, 2, 0, 3).reshape(
            self.B // self.turns, -1)

    def state_dict(self):
        return dict(dealt=self.dealt, marks=[m and list(m) for m in self.marks], pieces=len(self.pieces))

    def load_state_dict(self, state):
        here = dict(rows=self.B, pieces=len(self.pieces))
        then = dict(rows=len(state["marks"]), pieces=state["pieces"])
        if here != then:
            raise UserError(f"the bookmarks lie in other books: {then['pieces']} pieces in {then['rows']} rows were "
                            f"read, here are {here['pieces']} in {here['rows']}")
        self.dealt, self.marks = state["dealt"], [m and tuple(m) for m in state["marks"]]


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic streams. A generator makes x, y and at (B, T) of Batch; every row is a document of its own.

NOISE, VALUES, KEYS, SYMBOLS = 16, 32, 64, 112   # the vocabulary: 16 symbols of noise, 32 values, up to 64 keys


def filler(rng, B, T):
    """Noise and values that belong to no key, so that having seen a value says nothing."""
    return rng.integers(NOISE + VALUES, size=(B, T))


def keys(rng, B, n):
    """n different keys a row, of the first 16 if that is enough: to know more of them only takes longer to learn."""
    return NOISE + VALUES + rng.permuted(np.tile(np.arange(max(16, n)), (B, 1)), axis=1)[:, :n]


def recall(rng, B, T, pairs=2, asks=0, mixed=False):
    """Key-value pairs strewn over filler; each key comes back `asks` times and asks for its value (0: as often as makes
    the pairs half of the text). All places are drawn uniformly, so that questions near their answer teach what
    questions across segments test; the distance counts from the last time that the pair was seen. Many pairs are
    learned after few: mixed, each text draws how many of its pairs are different."""
    asks = asks or T // (4 * pairs) - 1
    if not 0 < pairs <= KEYS or asks < 1 or pairs * (asks + 1) > T // 2:
        raise UserError(f"{pairs} pairs that are asked for {asks} times do not fit into {KEYS} keys and {T} tokens")
    places = rng.permuted(np.tile(np.arange(0, T - 1, 2), (B, 1)), axis=1)[:, :pairs * (asks + 1)]
    key = keys(rng, B, pairs)
    value = NOISE + rng.integers(VALUES, size=(B, pairs))
    x, rows = filler(rng, B, T), np.arange(B)[:, None]
    y, at = np.full_like(x, -1), np.zeros_like(x)
    pair = np.arange(pairs).repeat(asks + 1) % (1 + rng.integers(pairs, size=(B, 1)) if mixed else pairs)
    pair, places = np.divmod(np.sort(pair * T + places), T)                   # one pair after the other, each in order
    key, value = key[rows, pair], value[rows, pair]
    x[rows, places], x[rows, places + 1] = key, value
    again = np.diff(pair, prepend=-1) == 0                                    # all but the first time
    y[rows, places] = np.where(again, value, -1)
    at[rows, places] = np.where(again, np.diff(places, prepend=0), 0)
    return x, y, at


def needle(rng, B, T, distance=0, pairs=1, asks=1, hops=1, notice=0):
    """Keys with their values (needles) in a haystack of noise; each key comes back `asks` times and asks for its value.
    All places are drawn uniformly; a single question may also stand at the end, `distance` tokens behind its needle.
    With more hops, a key is followed by another key, which stands elsewhere, and only the last one by the value. A
    question can be announced: then its key also stands `notice` tokens before it, for models that need a while to fetch
    the answer."""
    unit = notice + 2                                                # tokens that a needle or a question takes
    if min(pairs, asks, hops) < 1 or pairs * hops > KEYS or pairs * (hops + asks) > T // unit:
        raise UserError(f"{pairs} needles (hops={hops}, notice={notice}) that are asked for {asks} times do not fit "
                        f"into {KEYS} keys and {T} tokens")
    if distance and not (2 <= distance < T and pairs == asks == hops == 1 and notice == 0):
        raise UserError(f"a needle at distance {distance} does not fit into {T} tokens, or is not the only one")
    starts = rng.permuted(np.tile(np.arange(T // unit), (B, 1)), axis=1)[:, :pairs * (hops + asks)]
    starts = unit * np.sort(starts.reshape(B, pairs, hops + asks))   # a pair's needle stands before its questions
    places = starts[..., :hops] + 2 * rng.integers(unit // 2, size=(B, pairs, hops))
    ask = starts[..., hops:] + unit - 1
    if distance:
        places[:], ask[:] = T - 1 - distance, T - 1
    value = NOISE + rng.integers(VALUES, size=(B, pairs, 1))
    chain = np.concatenate([keys(rng, B, pairs * hops).reshape(B, pairs, hops), value], 2)   # key, ..., key, value
    x, rows = rng.integers(NOISE, size=(B, T)), np.arange(B)[:, None, None]
    y, at = np.full_like(x, -1), np.zeros_like(x)
    x[rows, places], x[rows, places + 1] = chain[..., :-1], chain[..., 1:]
    x[rows, ask] = x[rows, ask - notice] = chain[..., :1]
    y[rows, ask], at[rows, ask] = value, ask - places[..., -1:]
    return x, y, at


def planted(rng, B, T, pairs=1, plant=16, gap=64, every=4):
    """The first `plant` tokens are nothing but pairs, as in `recall`; then comes noise, in which from token `gap` on
    one of `every` tokens is one of the keys and asks again. No answer follows, so that nothing nearer helps."""
    if not plant <= gap <= T - every or every < 1:
        raise UserError(f"pairs in {plant} tokens and questions every {every} from {gap} on do not fit into {T} tokens")
    x, rows = rng.integers(NOISE, size=(B, T)), np.arange(B)[:, None]
    y, at = np.full_like(x, -1), np.zeros_like(x)
    x[:, :plant], y[:, :plant], at[:, :plant] = recall(rng, B, plant, pairs, plant // (2 * max(1, pairs)) - 1)
    known = np.nonzero(y >= 0)[1].reshape(B, -1)                         # where a key has come back
    asks = np.arange(gap, T - every + 1, every) + rng.integers(every, size=(B, (T - gap) // every))
    again = np.take_along_axis(known, rng.integers(known.shape[1], size=asks.shape), 1)
    x[rows, asks], y[rows, asks] = x[rows, again], y[rows, again]
    last = ((x[:, None, :plant] == x[rows, asks][..., None]) * np.arange(plant)).max(-1)
    at[rows, asks] = asks - last
    return x, y, at


def mqar(rng, B, T, pairs=0, power=0.01, noise=False):
    """Multi-query associative recall (Zoology 2312.04927). All pairs stand at the beginning (0: one for 8 tokens of the
    text); later each key comes once more, alone, and asks for its value. The question takes the g-th free place with a
    probability that goes like g^(power - 1), so most come soon. The rest is blank, or noise."""
    pairs = pairs or min(16, T // 8)
    if not 0 < pairs <= VALUES or 4 * pairs > T:
        raise UserError(f"{pairs} pairs and their questions do not fit into {VALUES} values and {T} tokens")
    free = np.arange(2 * pairs, T - 1, 2)
    chance = (power - 1) * np.log(np.arange(1, len(free) + 1)) + rng.gumbel(size=(B, len(free)))
    asks = free[np.argsort(-chance, 1)[:, :pairs]]   # the largest: drawn one after the other without replacement
    key = keys(rng, B, pairs)
    value = NOISE + rng.permuted(np.tile(np.arange(VALUES), (B, 1)), axis=1)[:, :pairs]
    x, rows = filler(rng, B, T) * noise, np.arange(B)[:, None]
    y, at = np.full_like(x, -1), np.zeros_like(x)
    x[:, :2 * pairs] = np.stack([key, value], 2).reshape(B, -1)
    x[rows, asks], y[rows, asks], at[rows, asks] = key, value, asks - np.arange(0, 2 * pairs, 2)
    return x, y, at


def retain(rng, B, T, facts=0, chunk=4):
    """A text in chunks, to be read with segments of that length. Some tell a fact, a key and its value; some begin with
    the key of one told before and ask for the value, each once; the rest is filler. With facts=0 there are 16, or as
    many as fit. at // chunk is the number of chunks between fact and question."""
    n = T // chunk
    facts = facts or min(16, n // 2)
    if not 0 < facts <= min(KEYS, n // 2) or chunk < 4:
        raise UserError(f"{facts} facts and their questions do not fit into {KEYS} keys and {n} chunks of {chunk}")
    told, asked = np.sort(rng.permuted(np.tile(np.arange(n), (B, 1)), axis=1)[:, :2 * facts].reshape(B, facts, 2)).T
    places, asked = told.T * chunk + rng.integers(1, chunk - 1, size=(B, facts)), asked.T * chunk
    key = keys(rng, B, facts)
    value = NOISE + rng.integers(VALUES, size=(B, facts))
    x, rows = filler(rng, B, T), np.arange(B)[:, None]
    y, at = np.full_like(x, -1), np.zeros_like(x)
    x[rows, places], x[rows, places + 1], x[rows, asked] = key, value, key
    y[rows, asked], at[rows, asked] = value, asked - places
    return x, y, at


STREAMS = {"recall": recall, "needle": needle, "planted": planted, "mqar": mqar, "retain": retain}


def is_stream(name):
    """Whether --data=name means a synthetic stream, whose knobs may stand behind it."""
    return name.partition(":")[0] in STREAMS


def symbols(name):
    """How many different symbols that stream has: 16 keys are enough unless it asks for more pairs."""
    pairs = variant(name)[1].get("pairs", "")
    return NOISE + VALUES + max(16, int(pairs) if pairs.isdigit() else 0)


class Synthetic:
    """Windows of a generator through the interface of Bookmarks; batch i depends on seed and i alone. Its knobs may
    stand behind its name, "recall:pairs=8", or be given as arguments, which win. With windows=n a row lasts for n
    windows, and back-propagation, which stays in one, reaches a part of it."""

    def __init__(self, name, rows, T, seed=0, **knobs):
        name, typed = variant(name)
        self.make, self.B, self.T, self.seed, self.i = STREAMS[name], rows, T, seed, 0
        known = dict(windows=1, **{k: p.default for k, p in inspect.signature(self.make).parameters.items()})
        known = {k: default for k, default in known.items() if k not in ("rng", "B", "T")}
        for k in typed:
            if k not in known:
                raise UserError(f"{name} has no knob {k}: {nearest(k, list(known))}")
        self.knobs = {**{k: value(f"data={name}:{k}", v, type(known[k])) for k, v in typed.items()}, **knobs}
        self.n = self.knobs.pop("windows", 1)
        if self.n < 1:
            raise UserError(f"a row lasts for one window at least, got windows={self.n}")

    def next(self):
        row, part = divmod(self.i, self.n)
        self.i += 1
        x, y, at = self.make(np.random.default_rng((self.seed, row)), self.B, self.T * self.n, **self.knobs)
        x, y, at = (a[:, part * self.T:(part + 1) * self.T] for a in (x, y, at))
        book = np.arange(row * self.B, (row + 1) * self.B)
        return Batch(*map(torch.from_numpy, (x, y, np.full(self.B, part == 0), at, book)))

    def state_dict(self):
        return dict(i=self.i)

    def load_state_dict(self, state):
        self.i = state["i"]


# ----------------------------------------------------------------------------------------------------------------------
# PG-19 (1911.05507)

BUCKET = "https://storage.googleapis.com/deepmind-gutenberg"
HELD_OUT = dict(   # the official splits; every other book of metadata.csv is for training
    validation="""1022 11155 13089 16959 1925 2383 23956 24360 25066 27688 28213 28776 29981 32629 34016 34056 34100 356
        35816 36402 37833 38214 38403 4024 41074 42067 42142 42306 43423 44896 44912 4533 48089 48461 48677 49091 50355
        51859 5195 5321 53682 54098 555 55658 56719 57843 58093 6404 7510 8545""".split(),
    test="""10146 10321 10356 10762 12204 15562 22424 24553 2544 25646 25773 25830 26183 26239 26493 26618 27454 28444
        28988 29594 29973 30312 30752 30754 30909 30981 31065 3129 31974 3247 32761 3340 33426 33756 34467 35205 35246
        3608 36256 37006 37328 37403 37443 3754 37702 38106 3890 38929 38955 4047 40579 40700 4128 41603 41607 42081
        42655 43536 43845 44099 44557 45313 45881 45888 46915 47068 47558 47581 47676 48693 49078 49529 49596 50287
        51410 53345 5396 54537 54624 55339 55871 56410 5734 5770 57791 58473 58553 58598 5956 5962 6412 6941 7412 7987
        8197 8559 860 8788 9315 9931""".split())


def fetch(url, path, tries=5, pause=1.0):
    """Download url to path, unless it is there already. What arrives goes to path.part; after a dropped connection, or
    when called again, the download goes on from its end. The file gets its name only if its size, and its MD5 where the
    server states one, are right. Raises UserError after `tries`."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    why = ""
    for attempt in range(tries):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as answer:
                if answer.headers.get_content_type() == "text/html":
                    raise UserError(f"{url} answers with a web page, not the file: is there a log-in page in between?")
                if not answer.headers["Content-Length"]:
                    raise UserError(f"{url} comes without a size, so that a broken download could not be told")
                if answer.status != 206:
                    have = 0    # the server sends the whole file again
                size = have + int(answer.headers["Content-Length"])
                hashes = ",".join(answer.headers.get_all("x-goog-hash", [])).split(",")
                md5 = [h.strip()[4:] for h in hashes if h.strip().startswith("md5=")]
                with open(part, "ab" if have else "wb") as f:
                    while block := answer.read(1 << 16):
                        f.write(block)
        except urllib.error.HTTPError as e:
            if e.code == 404:
                raise UserError(f"{url} is not there (404): is --url right?") from None
            if e.code == 416:   # asked to go on behind the end: what we have is not what the server has
                part.unlink()
            why = f"HTTP {e.code}"
            continue
        except (OSError, http.client.HTTPException) as e:   # no server, a reset, a time-out, a broken answer
            why = str(getattr(e, "reason", e)) or type(e).__name__
            continue
        got = part.stat().st_size
        if got < size:
            why = f"the connection dropped at {got:,} of {size:,} bytes"
        elif got > size:
            why = f"{got:,} bytes came instead of {size:,}"
            part.unlink()
        elif md5 and base64.b64encode(hashlib.md5(part.read_bytes()).digest()).decode() != md5[0]:
            why = "the MD5 is wrong"
            part.unlink()
        else:
            os.replace(part, path)
            return
    raise UserError(f"{url}: gave up after {tries} tries ({why}); the same command goes on from where it stopped")


def download(folder, url=BUCKET, books=0):
    """PG-19 to folder/<split>/ID.txt: validation and test, and all training books or a sample of `books`."""
    fetch(f"{url}/metadata.csv", folder / "metadata.csv")
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as f:
        ids = [row[0] for row in csv.reader(f) if row]
    if not all(i.isdigit() for i in ids):
        raise UserError(f"{folder / 'metadata.csv'} is not PG-19's list of books: delete it and try again")
    held_out = set(itertools.chain(*HELD_OUT.values()))
    train = sorted(set(ids) - held_out, key=int)
    random.Random(0).shuffle(train)    # a sample of 500 is part of the sample of 1,000
    splits = dict(train=train[:books or None], **{s: [i for i in HELD_OUT[s] if i in set(ids)] for s in HELD_OUT})
    todo = [(f"{url}/{split}/{i}.txt", folder / split / f"{i}.txt") for split, ids in splits.items() for i in ids]
    with ThreadPoolExecutor(8) as pool:
        try:
            for _ in tqdm(pool.map(lambda job: fetch(*job), todo), total=len(todo), desc="download", unit="book"):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return splits


class Texts:
    """(name, text) of files, read one by one."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __iter__(self):
        return ((path.stem, read_text(path)) for path in self.paths)


def pg19(out, enc, folder="", url=BUCKET, books=0, limit=2 ** 25):
    """Shards of PG-19 in `out`, from a folder in the bucket's layout or else from the bucket itself."""
    if folder:
        folder = Path(folder)
        found = {s: sorted((folder / s).glob("*.txt")) for s in ("train", "validation", "test")}
        if not found["train"] or not found["validation"]:
            raise UserError(f"{folder} is not in PG-19's layout: it needs train/*.txt and validation/*.txt")
        found["train"] = found["train"][:books or None]
    else:
        raw = Path(out) / "text"
        found = {s: [raw / s / f"{i}.txt" for i in ids] for s, ids in download(raw, url, books).items()}
    return write_shards(out, enc, {s: Texts(paths) for s, paths in found.items() if paths}, limit)


@dataclass
class Make:
    out: str = ""                # folder for the shards
    tokenizer: str = "gpt2-4k"   # gpt2-4k, gpt2 or bytes
    folder: str = ""             # pg19: read DIR/{train,validation,test}/ID.txt instead of downloading
    books: int = 0               # pg19: take only so many training books (0: all 28,602, 11 GB)
    url: str = BUCKET            # pg19: where the books are


def main(argv):
    (flags,), words = parse(argv, Make)
    make = Make(**flags)
    if not words or words[0] not in ("pg19", "text"):
        raise UserError("say what to read: python -m nanomem.data pg19 --out=DIR, or text FILE... --out=DIR")
    if not make.out:
        raise UserError("--out=DIR is missing: where shall the shards go?")
    enc = tokenizer(make.tokenizer)
    if words[0] == "pg19":
        if len(words) > 1:
            raise UserError(f"pg19 takes no further words, got {words[1]}: did you mean --folder={words[1]}?")
        meta = pg19(make.out, enc, make.folder, make.url, make.books)
    else:
        if len(words) == 1:
            raise UserError("text needs files: python -m nanomem.data text FILE... --out=DIR")
        meta = write_shards(make.out, enc, hold_out([(Path(p).stem, read_text(p)) for p in words[1:]]))
    for split, s in meta["splits"].items():
        print(f"{split:12s} {len(s['names']):6,d} books  {s['tokens']:13,d} tokens  {s['words']:13,d} words  "
              f"{s['bytes']:14,d} bytes")
    print(f"--data={make.out} is ready for train.py and bench.py")


if __name__ == "__main__":
    run(main)
