"""Text to tokens, tokens to shards on disk, and shards to batches for training.

    python -m nanomem.data one.txt two.txt --out=data/mine      any text files in UTF-8, each file is a book

Every script then takes --data=data/mine. The synthetic tasks are in tasks.py, the download of PG-19 is in pg19.py.
"""
import base64
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from .cli import UserError, nearest, parse, run

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


def vocabulary_hash(enc):
    """SHA-256 of the bytes of all tokens in order: it tells whether shards were made with this very vocabulary."""
    return hashlib.sha256(b"".join(enc.decode_single_token_bytes(i) for i in range(enc.eot_token))).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Books from text

@dataclass
class Books:
    """The books of one split. Lists have an entry for each book."""
    enc: tiktoken.Encoding
    names: list
    tokens: list    # uint16 arrays: end-of-text, so that the first token has a prediction too, then the text
    words: list     # words of the text, between white space
    sizes: list     # its bytes in UTF-8

    def __len__(self):
        return len(self.tokens)

    def fingerprint(self):
        """SHA-256 of tokenizer, names, lengths and the ends of the texts: it tells whether these are the same books."""
        digest = hashlib.sha256(vocabulary_hash(self.enc).encode())
        for name, tokens in zip(self.names, self.tokens):
            digest.update(f"{name} {len(tokens)} {tokens[:64].tolist()} {tokens[-64:].tolist()}".encode())
        return digest.hexdigest()


def read_text(path):
    """A text file with its line ends made LF. Raises UserError if it is not there, empty or not UTF-8."""
    if any(c in str(path) for c in "*?") and not Path(path).exists():
        raise UserError(f"no file is like {path}: the shell has found none")
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
    """Books held in memory, from a list of (name, text)."""
    names, texts = zip(*texts)
    return Books(enc, list(names), [encode(enc, t) for t in texts], [len(t.split()) for t in texts],
                 [len(t.encode()) for t in texts])


def hold_out(texts):
    """Split a list of (name, text): the last tenth of the books is for validation. Of a single book, its last tenth."""
    if len(texts) > 1:
        n = max(1, len(texts) // 10)
        return dict(train=texts[:-n], validation=texts[-n:])
    name, text = texts[0]
    if len(text) < 100:
        raise UserError(f"{name} is too short to train on: {len(text)} characters")
    cut = len(text) * 9 // 10
    if "\n\n" in text[:cut]:
        cut = text.rindex("\n\n", 0, cut) + 1      # at the end of a paragraph
    return dict(train=[(name, text[:cut])], validation=[(name + ", the end", text[cut:])])


# ----------------------------------------------------------------------------------------------------------------------
# Shards: books as files of tokens

MAGIC, VERSION = 20240520, 1   # of the .bin files of llm.c
ENDS = (".bin", ".idx.npy")
AGAIN = "make the shards again with python -m nanomem.data, or nanomem.pg19"


def write_shards(out, enc, splits, limit=2 ** 25):
    """Write the books of `splits`, {split: iterable of (name, text)}, to `out`, in shards of at least `limit`
    tokens. Earlier shards of nanomem in this folder are replaced when all new ones are written, and no other file ever
    is. Returns the content of meta.json.

    <split>_00000.bin       as in llm.c: 256 int32 (magic, version, tokens, and ours: books, end-of-text, vocabulary),
                            then the tokens in uint16
    <split>_00000.idx.npy   int64 (books, 4): first token, tokens, words, bytes. A book lies in one shard
    meta.json               tokenizer, totals and names. Written last: a folder without it is unfinished
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {out}: {e.strerror}") from None
    ours = files_of(out)
    meta = dict(format="nanomem shards", version=VERSION, tokenizer=enc.name, vocab=enc.n_vocab,
                ranks=vocabulary_hash(enc), newlines="LF", splits={})
    for split, texts in splits.items():
        files, names, total = [], [], np.zeros(3, np.int64)
        books, index, n = [], [], 0                               # of the open shard; n tokens so far
        bar = tqdm(texts, desc=split, unit="book", smoothing=0.05)
        for name, text in bar:
            tokens = encode(enc, text)
            counts = len(tokens), len(text.split()), len(text.encode())
            names.append(name)
            books.append(tokens)
            index.append((n, *counts))
            n += len(tokens)
            total += counts
            bar.set_postfix_str(f"{total[0] / 1e6:.1f}M tokens")
            if n >= limit:
                files.append(write_shard(out, f"{split}_{len(files):05d}", enc, books, index, ours))
                books, index, n = [], [], 0
        if books:
            files.append(write_shard(out, f"{split}_{len(files):05d}", enc, books, index, ours))
        meta["splits"][split] = dict(zip(("tokens", "words", "bytes"), total.tolist()), files=files, names=names)
    (out / "meta.json.new").write_text(json.dumps(meta, indent=1))
    (out / "meta.json").unlink(missing_ok=True)                   # from here on the folder is unfinished, for a moment
    new = {f"{name}{end}" for s in meta["splits"].values() for name in s["files"] for end in ENDS}
    for name in new:
        os.replace(out / f"{name}.new", out / name)
    for name in ours - new:
        (out / name).unlink(missing_ok=True)
    os.replace(out / "meta.json.new", out / "meta.json")
    return meta


def files_of(out):
    """The names of the shard files in a folder that nanomem has written, from its meta.json."""
    try:
        splits = json.loads((out / "meta.json").read_text())["splits"]
        return {f"{Path(name).name}{end}" for s in splits.values() for name in s["files"] for end in ENDS}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()


def write_shard(out, name, enc, books, index, ours):
    """Write one shard under scratch names. Raises UserError where a file that is not ours would be replaced."""
    tokens = np.concatenate(books)
    header = np.zeros(256, "<i4")
    header[:6] = MAGIC, VERSION, len(tokens), len(books), enc.eot_token, enc.n_vocab
    for end in ENDS:
        if (out / f"{name}{end}").exists() and f"{name}{end}" not in ours:
            raise UserError(f"{out / name}{end} is there and was not made by nanomem: choose another --out")
    (out / f"{name}.bin.new").write_bytes(header.tobytes() + tokens.tobytes())
    with open(out / f"{name}.idx.npy.new", "wb") as f:
        np.save(f, np.array(index, np.int64))
    return name


def open_shards(folder, split):
    """The Books of a folder that `write_shards` made, memory-mapped. Raises UserError for whatever is wrong with it."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder of shards: make one with python -m nanomem.data {folder} --out=DIR")
    if any(folder.glob("*.bin")) and not (folder / "meta.json").exists() and not any(folder.glob("*.idx.npy")):
        return open_llm_c(folder, split)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["format"] == "nanomem shards" and meta["version"] == VERSION
        enc, splits, ranks = tokenizer(meta["tokenizer"]), meta["splits"], meta["ranks"]
        for s in splits.values():
            assert all(isinstance(name, str) and Path(name).name == name for name in [*s["files"]])
            assert len({*s["files"]}) == len(s["files"]) and all(isinstance(name, str) for name in [*s["names"]])
    except FileNotFoundError:
        raise UserError(f"no shards in {folder} (it has no meta.json): see python -m nanomem.data --help") from None
    except (OSError, AssertionError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{folder / 'meta.json'} is damaged or not ours: {AGAIN}") from None
    if split not in splits:
        raise UserError(f"{folder} has no split {split}: {nearest(split, list(splits))}")
    if ranks != vocabulary_hash(enc):
        raise UserError(f"{folder} was made with another {enc.name} vocabulary than the one here: {AGAIN}")
    books = Books(enc, splits[split]["names"], [], [], [])
    for name in splits[split]["files"]:
        tokens, index = open_shard(folder / f"{name}.bin", folder / f"{name}.idx.npy", enc)
        for start, n, words, size in index.tolist():
            books.tokens.append(tokens[start:start + n])
            books.words.append(words)
            books.sizes.append(size)
    if len(books) != len(books.names):
        raise UserError(f"{folder}: meta.json names {len(books.names)} books of {split}, the shards hold {len(books)}: "
                        + AGAIN)
    return books


def open_llm_c(folder, split):
    """The Books of shards of llm.c, which have no index: a document begins at each end-of-text token of GPT-2. Their
    words and bytes are not counted (0)."""
    enc, books = tokenizer("gpt2"), Books(tokenizer("gpt2"), [], [], [], [])
    for path in sorted(folder.glob(f"*{dict(validation='val').get(split, split)}*.bin")):
        header = np.fromfile(path, "<i4", 256)
        if len(header) < 256 or header[0] != MAGIC or path.stat().st_size != 1024 + 2 * header[2]:
            raise UserError(f"{path} is neither a shard of nanomem nor of llm.c")
        tokens = np.memmap(path, "<u2", "r", offset=1024)
        starts = np.flatnonzero(tokens == enc.eot_token)
        books.tokens += [part for part in np.split(tokens, starts) if len(part) > 1 and part[0] == enc.eot_token]
        books.names += [f"{path.stem}:{i}" for i in range(len(books.tokens) - len(books.names))]
    if not books.tokens:
        raise UserError(f"{folder} has no meta.json and no shards of llm.c for {split} (*.bin)")
    books.words, books.sizes = [0] * len(books), [0] * len(books)
    return books


def open_shard(path, index_path, enc):
    """One shard's tokens (a memory map) and its index (books, 4), each checked against the other."""
    def refuse(why):
        raise UserError(f"{path}: {why}: {AGAIN}")
    try:
        header = np.fromfile(path, "<i4", 256)
        index = np.load(index_path, allow_pickle=False)
    except OSError as e:
        raise UserError(f"cannot read {e.filename or index_path}: {e.strerror or 'not an index file'}") from None
    except Exception:                              # numpy's reader fails in many ways on a damaged header
        raise UserError(f"{index_path} is not an index file: {AGAIN}") from None
    if len(header) < 256:
        refuse(f"truncated header, {path.stat().st_size} bytes of 1024")
    magic, version, n, books, eot, vocab = header[:6].tolist()
    if magic != MAGIC:
        refuse(f"not a token shard (magic {magic}, expected {MAGIC})")
    if version != VERSION:
        refuse(f"shard version {version}, this code reads {VERSION}")
    if path.stat().st_size != 1024 + 2 * n:
        refuse(f"the header promises {n:,} tokens, the file holds {(path.stat().st_size - 1024) / 2:,.0f}")
    if (eot, vocab) != (enc.eot_token, enc.n_vocab):
        refuse(f"written for a vocabulary of {vocab}, {enc.name} has {enc.n_vocab}")
    tokens = np.memmap(path, "<u2", "r", offset=1024, shape=(n,))
    disagree = f"index and tokens disagree ({index_path.name})"
    if books == 0 or index.shape != (books, 4) or index.dtype != np.int64:
        refuse(disagree)
    start, length, end = index[:, 0], index[:, 1], index[:, 1].cumsum()
    if (length < 2).any() or end[-1] != n or (start != end - length).any() or (tokens[start] != eot).any():
        refuse(disagree)
    return tokens, index


def moby_dick(split, name):
    """The embedded book, with the tokenizer of that name. The last tenth of the text is for validation."""
    splits = hold_out([("Moby-Dick", read_text(HERE / "books" / "moby-dick.txt"))])
    if split not in splits:
        raise UserError(f"the embedded book has no split {split}: {nearest(split, list(splits))}")
    return from_texts(tokenizer(name), splits[split])


def open_books(data, split, tokenizer="gpt2-4k"):
    """The Books of a folder of shards, which says its tokenizer itself; with data="" those of the embedded book."""
    return open_shards(data, split) if data else moby_dick(split, tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Batches

class Batch(NamedTuple):
    """The next T tokens of B texts, which are books or texts of a synthetic task."""
    x: torch.Tensor          # (B, T) input tokens
    y: torch.Tensor          # (B, T) target tokens, -1 where nothing is scored
    fresh: torch.Tensor      # (B,) bool: this batch element begins a new book
    position: torch.Tensor   # (B, T) of each target in its book, 0 for the first
    distance: torch.Tensor   # (B, T) tasks: tokens since the answer stood in the text; 0 in books
    book: torch.Tensor       # (B,) the number of the book, -1 for none; (B, T) where books are interleaved

    def to(self, device):
        """On a device. To CUDA from pinned memory: the copy waits for nothing, so a training loop that does not wait
        either makes this batch while the device still works on the one before."""
        pinned = (t.pin_memory() if torch.device(device).type == "cuda" else t for t in self)
        return Batch(*(t.to(device, non_blocking=True) for t in pinned))

    def elements(self, i, j):
        """Batch elements i to j - 1."""
        return Batch(*(t[i:j] for t in self))


class Loader:
    """Reads books in order, T tokens of each in a batch. Each of B batch elements has a cursor in its book. At the end
    of the book the cursor goes to the next one, in an order that is shuffled anew for every epoch; the rest of the
    batch element is padding, with targets of -1. With `once`, every book is read once, in the order given, and then
    `next` raises StopIteration.

    `piece` cuts the books into pieces of that many tokens, which are read as if they were books. Without it this is
    done where there are fewer books than cursors: about four pieces for each cursor.

    With `interleave`, a batch element has several cursors, which take turns: `interleave_len` tokens each. Targets stay
    in their own book. With two cursors, in books a and b, and interleave_len=2:

        x   a0 a1 b0 b1 a2 a3 b2 b3
        y   a1 a2 b1 b2 a3 a4 b3 b4

    The batch element is fresh when one of them begins a book.
    """

    def __init__(self, books, B, T, seed=0, once=False, piece=None, interleave=1, interleave_len=1):
        if min(interleave, interleave_len) < 1 or T % (interleave * interleave_len):
            raise UserError(f"{T} tokens cannot be shared by {interleave} books in turns of {interleave_len} tokens")
        self.books, self.B, self.T, self.seed, self.once = books, B, T, seed, once
        self.interleave, self.interleave_len = interleave, interleave_len
        cursors, share = B * interleave, T // interleave
        if piece is None and len(books) < cursors and not once:
            total = sum(len(tokens) - 1 for tokens in books.tokens)
            piece = max(share, total // (4 * cursors) // share * share)
        self.pieces = []                  # (book, start, end): the targets are tokens[start:end] of the book
        for book, tokens in enumerate(books.tokens):
            n = piece or len(tokens)
            self.pieces += [(book, i, min(i + n, len(tokens))) for i in range(1, len(tokens), n)]
        self.begun = 0                    # pieces that were begun so far, over all epochs
        self.order = -1, None             # an epoch, and its order of the pieces
        self.cursors = [None] * cursors   # (piece, next target); None where there is nothing to read

    def next_piece(self):
        """A cursor at the beginning of the next piece, or None if `once` is set and none is left."""
        epoch, i = divmod(self.begun, len(self.pieces))
        if self.once and epoch > 0:
            return None
        self.begun += 1
        if not self.once:
            if epoch != self.order[0]:    # once an epoch: there may be millions of pieces
                self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.pieces))
            i = int(self.order[1][i])
        return i, self.pieces[i][1]

    def next(self):
        N, share = len(self.cursors), self.T // self.interleave
        x = np.full((N, share), self.books.enc.eot_token)
        y, position = np.full_like(x, -1), np.zeros_like(x)
        fresh, book = np.zeros(N, bool), np.full(N, -1)
        for c in range(N):
            cursor = self.cursors[c]
            if cursor is None or cursor[1] == self.pieces[cursor[0]][2]:
                cursor = self.next_piece()
                fresh[c] = cursor is not None
            if cursor is not None:
                piece, i = cursor
                book[c], start, end = self.pieces[piece]
                n = min(share, end - i)
                tokens = self.books.tokens[book[c]][i - 1:i + n]
                if tokens.max() >= self.books.enc.n_vocab:
                    raise UserError(f"{self.books.names[book[c]]} holds token {tokens.max()}, and the tokenizer "
                                    f"{self.books.enc.name} has {self.books.enc.n_vocab}: {AGAIN}")
                x[c, :n], y[c, :n], position[c, :n] = tokens[:-1], tokens[1:], np.arange(i, i + n) - start
                cursor = piece, i + n
            self.cursors[c] = cursor
        if (book < 0).all():
            raise StopIteration
        if self.interleave > 1:
            book = book[:, None].repeat(share, 1)
            x, y, position, book = map(self.join, (x, y, position, book))
        fresh = fresh.reshape(self.interleave, self.B).any(0)
        x, y, fresh, position, book = map(torch.from_numpy, (x, y, fresh, position, book))
        return Batch(x, y, fresh, position, torch.zeros_like(x[:1, :1]).expand_as(x), book)

    def join(self, a):
        """From the tokens of each cursor (interleave * B, T / interleave) to batch elements (B, T): element b has
        cursors b, B + b, 2B + b, ..."""
        a = a.reshape(self.interleave, self.B, -1, self.interleave_len)      # (cursor, B, turn, token)
        return a.transpose(1, 2, 0, 3).reshape(self.B, self.T)               # (B, turn, cursor, token)

    def state_dict(self):
        return dict(begun=self.begun, cursors=list(self.cursors), pieces=len(self.pieces))

    def load_state_dict(self, state):
        saved, here = (state["pieces"], len(state["cursors"])), (len(self.pieces), len(self.cursors))
        if saved != here:
            raise UserError("the saved position does not fit: it has {1} cursors in {0} pieces of text, here are {3} "
                            "in {2}".format(*saved, *here))
        for cursor in state["cursors"]:
            if cursor is not None:
                _, start, end = self.pieces[cursor[0]]
                assert start <= cursor[1] <= end and cursor[0] >= 0, "a cursor outside of its text"
        assert state["begun"] >= 0, "a position before the first text"
        self.begun, self.cursors = int(state["begun"]), list(state["cursors"])


# ----------------------------------------------------------------------------------------------------------------------
# The command

@dataclass
class Options:
    out: str = ""                # folder for the shards
    tokenizer: str = "gpt2-4k"   # gpt2-4k, gpt2 or bytes


def print_totals(out, meta):
    for split, s in meta["splits"].items():
        print(f"{split:12s} {len(s['names']):6,d} books  {s['tokens']:13,d} tokens  {s['words']:13,d} words  "
              f"{s['bytes']:14,d} bytes")
    print(f"--data={out} is ready for train.py and bench.py")


def main(argv):
    (flags,), files = parse(argv, Options)
    options = Options(**flags)
    if not files or not options.out:
        raise UserError("name text files and a folder for the shards: python -m nanomem.data FILE... --out=DIR")
    twice = [path for path in files if files.count(path) > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice: it would be training and validation at once")
    splits = hold_out([(Path(path).stem, read_text(path)) for path in files])
    print_totals(options.out, write_shards(options.out, tokenizer(options.tokenizer), splits))


if __name__ == "__main__":
    run(main)
