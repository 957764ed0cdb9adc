"""Shards: books as files of tokens, and an index that keeps them apart. Shards of llm.c are read too."""
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .cli import UserError, nearest
from .text import Books, encode, tokenizer, vocabulary_hash

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
    if (out / "meta.json").exists() and b'"nanomem shards"' not in (out / "meta.json").read_bytes()[:4096]:
        raise UserError(f"{out / 'meta.json'} is there and was not made by nanomem: choose another --out")
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
    """The names of the shard files in a folder that nanomem has written: llm.c leaves three of their fields at 0."""
    headers = {path.stem: np.fromfile(path, "<i4", 6) for path in out.glob("*.bin") if path.is_file()}
    return {f"{name}{end}" for name, header in headers.items() for end in ENDS
            if len(header) == 6 and header[0] == MAGIC and header[3:].all()}


def check_free(out, overwrite):
    """Raises UserError where a folder holds shards already, which nobody said may be replaced."""
    if (Path(out) / "meta.json").exists() and not overwrite:
        raise UserError(f"{out} holds shards already: add --overwrite to replace them, or choose another --out")


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
    books = Books(enc, splits[split]["names"], [])
    for name in splits[split]["files"]:
        tokens, index = open_shard(folder / f"{name}.bin", folder / f"{name}.idx.npy", enc)
        books.tokens += [tokens[start:start + n] for start, n, *_ in index.tolist()]
    if len(books) != len(books.names):
        raise UserError(f"{folder}: meta.json names {len(books.names)} books of {split}, the shards hold {len(books)}: "
                        + AGAIN)
    return books


def open_llm_c(folder, split):
    """The Books of shards of llm.c, which have no index: a document begins at each end-of-text token of GPT-2."""
    enc = tokenizer("gpt2")
    books = Books(enc, [], [])
    for path in sorted(folder.glob(f"*{dict(validation='val').get(split, split)}*.bin")):
        header = np.fromfile(path, "<i4", 256)
        if len(header) < 256 or header[0] != MAGIC or path.stat().st_size != 1024 + 2 * int(header[2]):
            raise UserError(f"{path} is neither a shard of nanomem nor of llm.c")
        tokens = np.memmap(path, "<u2", "r", offset=1024)
        starts = np.flatnonzero(tokens == enc.eot_token)
        books.tokens += [part for part in np.split(tokens, starts) if len(part) > 1 and part[0] == enc.eot_token]
        books.names += [f"{path.stem}:{i}" for i in range(len(books.tokens) - len(books.names))]
    if not books.tokens:
        raise UserError(f"{folder} has no meta.json and no shards of llm.c for {split} (*.bin, in tokens of GPT-2)")
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
