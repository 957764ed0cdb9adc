"""Books by name, and their tokens in batches for training.

    python -m nanomem.data one.txt two.txt --out=data/mine      any text files in UTF-8, each file is a book

Every script then takes --data=data/mine. The synthetic tasks are in tasks.py, the download of PG-19 is in pg19.py.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .cli import UserError, nearest, parse, run
from .shards import AGAIN, check_free, open_shards, write_shards
from .text import HERE, from_texts, hold_out, read_text, tokenizer


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
    distance: torch.Tensor   # (B, T) tasks: tokens since the pair that answers stood there; 0 in books
    book: torch.Tensor       # (B,) the number of the book, -1 for none; (B, T) where books are interleaved

    def to(self, device):
        """On a device. To CUDA from pinned memory: the copy waits for nothing, so a training loop that does not wait
        either makes this batch while the device still works on the one before. Elsewhere the copy is waited for."""
        cuda = torch.device(device).type == "cuda"
        return Batch(*((t.pin_memory() if cuda else t).to(device, non_blocking=cuda) for t in self))

    def elements(self, i, j):
        """Batch elements i to j - 1."""
        return Batch(*(t[i:j] for t in self))


class Loader:
    """Reads books in order, T tokens of each in a batch. Each of B batch elements has a cursor in its book. At the end
    of the book the cursor goes to the next one, in an order that is shuffled anew for every epoch; the rest of the
    batch element is padding, with targets of -1. With `once`, every book is read once, in the order given, and then
    `next` raises StopIteration.

    `piece` cuts the books into pieces of that many tokens, which are read as if they were books. Without it this is
    done where there are fewer books than cursors, but not with `once`: about four pieces for each cursor.

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
        x = np.full((N, share), self.books.enc.eot_token, np.int64)
        y, position = np.full_like(x, -1), np.zeros_like(x)
        fresh, book = np.zeros(N, bool), np.full(N, -1, np.int64)
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
    overwrite: bool = False      # replace the shards that are in this folder already


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
    real = [Path(path).resolve() for path in files]
    twice = [path for path in files if real.count(Path(path).resolve()) > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice: it would be training and validation at once")
    check_free(options.out, options.overwrite)
    splits = hold_out([(Path(path).stem, read_text(path)) for path in files])
    print_totals(options.out, write_shards(options.out, tokenizer(options.tokenizer), splits))


if __name__ == "__main__":
    run(main)
