"""PG-19 (1911.05507): books from Project Gutenberg, published before 1919. Downloads them and makes shards.

    python -m nanomem.pg19 --out=data/pg19 --books=500     download; 500 of its 28,602 books for training
    python -m nanomem.pg19 --out=data/pg19 --folder=DIR    or use DIR/{train,validation,test}/ID.txt

Every script then takes --data=data/pg19.
"""
import base64
import csv
import hashlib
import http.client
import os
import random
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .cli import UserError, parse, run
from .data import print_totals
from .shards import check_free, write_shards
from .text import read_text, tokenizer

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


class NotThere(UserError):
    """The server does not have a file."""


# ----------------------------------------------------------------------------------------------------------------------
# One file

def fetch(url, path, tries=5, pause=1.0):
    """Download url to path, unless it is there already. What arrives goes to path.part; after a dropped connection, or
    when called again, the download goes on from its end. The file gets its name only when it is complete. Waits `pause`
    seconds before the second try and twice as long before each further one. Raises UserError after `tries`."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(tries):
        if attempt > 0:
            time.sleep(pause * 2 ** (attempt - 1))
        problem = receive(url, part)
        if not problem:
            os.replace(part, path)
            return
    raise UserError(f"{url}: gave up after {tries} tries ({problem}); the same command goes on from where it stopped")


def receive(url, part):
    """Try once to complete the file `part`. Returns what went wrong, or "" if its size, and its MD5 where the server
    states one, are right. Raises UserError where another try cannot help."""
    have = part.stat().st_size if part.exists() else 0
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address of the web: --url takes something like {BUCKET}")
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise UserError(f"{url} answers with a web page, not the file: is there a log-in page in between?")
            if not answer.headers["Content-Length"]:
                raise UserError(f"{url} comes without its size: an incomplete download could not be noticed")
            if answer.status != 206:     # not the rest but the whole file
                have = 0
            size = have + int(answer.headers["Content-Length"])
            hashes = ",".join(answer.headers.get_all("x-goog-hash", [])).split(",")
            md5 = [h.strip()[4:] for h in hashes if h.strip().startswith("md5=")]
            with open(part, "ab" if have else "wb") as f:
                while block := answer.read(1 << 16):
                    f.write(block)
    except urllib.error.HTTPError as e:
        if e.code == 404:
            raise NotThere(f"{url} is not there (404): is --url right?") from None
        if e.code == 416:                # we have as much as the server or more, but it was not accepted as complete
            part.unlink()
        return f"HTTP {e.code}"
    except (ValueError, http.client.InvalidURL):
        raise UserError(f"{url} is no address of the web: --url takes something like {BUCKET}") from None
    except (OSError, http.client.HTTPException) as e:   # no server, a dropped connection, no answer in time
        return str(getattr(e, "reason", e)) or type(e).__name__
    got = part.stat().st_size
    if got < size:
        return f"the connection dropped at {got:,} of {size:,} bytes"
    if got > size:
        part.unlink()
        return f"{got:,} bytes came instead of {size:,}"
    if md5 and base64.b64encode(hashlib.md5(part.read_bytes()).digest()).decode() != md5[0]:
        part.unlink()
        return "the MD5 is wrong"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# All books

def shuffled(ids):
    """The books in an order by chance that is always the same: a sample of 500 is part of the sample of 1,000."""
    ids = sorted(ids, key=lambda i: (len(i), i))
    random.Random(0).shuffle(ids)
    return ids


def download(folder, url=BUCKET, books=0):
    """Download validation, test, and all training books or a sample of `books`. Returns {split: paths}."""
    fetch(f"{url}/metadata.csv", folder / "metadata.csv")
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as f:
        ids = {row[0] for row in csv.reader(f) if row}
    if not all(i.isdigit() for i in ids):
        raise UserError(f"{folder / 'metadata.csv'} is not PG-19's list of books: delete it and try again")
    held_out = {split: [i for i in HELD_OUT[split] if i in ids] for split in HELD_OUT}
    train = shuffled(ids.difference(*held_out.values()))
    splits = dict(train=train[:books or None], **held_out)
    paths = {split: [folder / split / f"{i}.txt" for i in names] for split, names in splits.items()}
    files = [path for split in paths.values() for path in split]
    missing = []
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(fetch, f"{url}/{path.parent.name}/{path.name}", path) for path in files]
        try:
            for path, job in zip(files, tqdm(jobs, desc="download", unit="book")):
                try:
                    job.result()
                except NotThere:         # one book less is no reason to lose the others
                    missing.append(path)
        except BaseException:            # Ctrl-C included: begin no further book
            pool.shutdown(cancel_futures=True)
            raise
    if len(missing) == len(files):
        raise UserError(f"the server has none of the {len(files):,} books: is --url right?")
    if missing:
        print(f"{len(missing):,} of {len(files):,} books are not on the server and are left out: "
              + ", ".join(path.stem for path in missing[:20]), file=sys.stderr)
    return {split: [path for path in files if path not in missing] for split, files in paths.items()}


def find(folder, books=0):
    """{split: paths} of books that are on this computer already, in the layout of the official bucket."""
    paths = {split: sorted((Path(folder) / split).glob("*.txt")) for split in ("train", "validation", "test")}
    if not paths["train"] or not paths["validation"]:
        raise UserError(f"{folder} is not in PG-19's layout: it needs train/*.txt and validation/*.txt")
    if books:
        train = {path.stem: path for path in paths["train"]}
        paths["train"] = [train[name] for name in shuffled(train)[:books]]
    return paths


class TextFiles:
    """(name, text) of each file. They are read one by one, since all books together are 11 GB."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __iter__(self):
        return ((path.stem, read_text(path)) for path in self.paths)


def make_shards(out, enc, folder="", url=BUCKET, books=0):
    """Write the shards of PG-19 to `out`, from a folder or else from the bucket. Returns the content of meta.json."""
    paths = find(folder, books) if folder else download(Path(out) / "text", url, books)
    return write_shards(out, enc, {split: TextFiles(p) for split, p in paths.items() if p})


# ----------------------------------------------------------------------------------------------------------------------
# The command

@dataclass
class Options:
    out: str = ""                # folder for the shards
    books: int = 0               # so many books for training, of 28,602 (0: all, 11 GB)
    folder: str = ""             # use the books in DIR/{train,validation,test}/ID.txt and download nothing
    tokenizer: str = "gpt2-4k"   # gpt2-4k, gpt2 or bytes
    url: str = BUCKET            # where the books are
    overwrite: bool = False      # replace the shards that are in this folder already


def main(argv):
    (flags,), words = parse(argv, Options)
    o = Options(**flags)
    if words:
        raise UserError(f"pg19 takes flags only, got {words[0]}: did you mean --folder={words[0]}?")
    if o.books < 0:
        raise UserError(f"--books={o.books} must not be negative: 0 takes all")
    if not o.out:
        raise UserError("--out=DIR is missing: it names the folder for the shards")
    check_free(o.out, o.overwrite)
    print_totals(o.out, make_shards(o.out, tokenizer(o.tokenizer), o.folder, o.url, o.books))


if __name__ == "__main__":
    run(main)
