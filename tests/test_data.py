"""Tokenizers, shards, PG-19, bookmarks and synthetic streams; and what they say to bad input."""
import base64
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from nanomem import data
from nanomem.cli import UserError

TEXTS = [("one", "It was a dark night.\n\nAnd a long one: naïve, 42 times.\n"), ("two", "Call me Ishmael. " * 40),
         ("three", "Whale!")]


@pytest.fixture
def shards(tmp_path):
    data.write_shards(tmp_path, data.tokenizer("bytes"), dict(train=TEXTS, validation=TEXTS[:1]), limit=100)
    return tmp_path


# tokenizers

@pytest.mark.parametrize("name, eot", [("gpt2-4k", 4096), ("bytes", 256)])
def test_a_tokenizer_gives_back_any_text(name, eot):
    enc = data.tokenizer(name)
    text = "Naïve whales — 1,000 of them!\n\n\t<|endoftext|> 鯨 " + "".join(map(chr, range(32, 300)))
    ids = enc.encode_ordinary(text)
    assert enc.decode(ids) == text and max(ids) < eot == enc.eot_token and enc.n_vocab == eot + 1


def test_gpt2_4k_is_the_head_of_gpt2():
    text = data.read_text(data.HERE / "books" / "moby-dick.txt")[:20_000]
    small = data.tokenizer("gpt2-4k")
    assert len(text.encode()) / len(small.encode_ordinary(text)) > 3
    try:
        gpt2 = data.tokenizer("gpt2")
    except UserError as refusal:
        assert "gpt2-4k" in str(refusal)      # no network: the way out is named
    else:
        assert all(gpt2.decode_single_token_bytes(i) == small.decode_single_token_bytes(i) for i in range(4096))


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="did you mean gpt2-4k"):
        data.tokenizer("gpt2-4x")


# shards

def test_shards_hold_every_book_whole(shards):
    enc, books = data.tokenizer("bytes"), data.open_shards(shards, "train")
    assert books.names == [n for n, _ in TEXTS] and len(list(shards.glob("train_*.bin"))) == 2
    for i, (_, text) in enumerate(TEXTS):
        assert books.tokens[i][0] == enc.eot_token and enc.decode(books.tokens[i][1:].tolist()) == text
        assert books.words[i] == len(text.split()) and books.sizes[i] == len(text.encode())
    header = np.fromfile(shards / "train_00000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, sum(len(t) for t in books.tokens[:2])]


def header(path, field, value):
    raw = bytearray(path.read_bytes())
    raw[4 * field:4 * field + 4] = np.array(value, "<i4").tobytes()
    path.write_bytes(raw)


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def index(path, other):
    np.save(path, other(np.load(path)))


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("name, breakage, why", [
    ("train_00000.bin", lambda p: cut(p, 100), "truncated header, 100 bytes"),
    ("train_00000.bin", lambda p: cut(p, 0), "truncated header, 0 bytes"),
    ("train_00000.bin", lambda p: cut(p, -20), "the file has model for"),
    ("train_00000.bin", lambda p: header(p, 0, 7), "magic 7, expected 20240520"),
    ("train_00000.bin", lambda p: header(p, 1, 9), "shard version 9, this code reads 1"),
    ("train_00000.bin", lambda p: header(p, 5, 50257), "a vocabulary of 50257"),
    ("train_00001.bin", lambda p: p.unlink(), "cannot read .*train_00001.bin"),
    ("train_00000.idx.npy", lambda p: cut(p, 5), "not an index file"),
    ("train_00000.idx.npy", lambda p: p.unlink(), "cannot read .*idx.npy"),
    ("train_00000.idx.npy", lambda p: index(p, lambda i: i[:1]), "disagree"),
    ("train_00000.idx.npy", lambda p: index(p, lambda i: i + [[1, 0, 0, 0]]), "disagree"),
    ("train_00000.idx.npy", lambda p: index(p, lambda i: i.astype(float)), "disagree"),
    ("meta.json", lambda p: cut(p, 50), "damaged or not ours"),
    ("meta.json", lambda p: p.unlink(), "no shards in"),
    ("meta.json", lambda p: edit(p, '"two",', ""), "names 2 books"),
    ("meta.json", lambda p: edit(p, '"ranks": "', '"ranks": "0'), "another bytes vocabulary")])
def test_a_damaged_folder_is_refused_in_one_sentence(shards, name, breakage, why):
    breakage(shards / name)
    with pytest.raises(UserError, match=why):
        data.open_shards(shards, "train")


def test_an_unknown_split_is_refused(shards):
    with pytest.raises(UserError, match="no split valid: did you mean validation"):
        data.open_shards(shards, "valid")


def test_text_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    refusals = {"latin.txt": "not UTF-8 text .byte 2 is 0xef", "empty.txt": "holds no text", "none.txt": "cannot read"}
    for name, why in refusals.items():
        with pytest.raises(UserError, match=why):
            data.read_text(tmp_path / name)


def test_line_ends_become_lf(tmp_path):
    (tmp_path / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    assert data.read_text(tmp_path / "crlf.txt") == "one\ntwo\n"


# bookmarks

def books(*lengths):
    """Books of 1 + n tokens in which token i of book b is 1000 b + i."""
    tokens = [1000 * b + np.arange(n + 1).astype("<u2") for b, n in enumerate(lengths)]
    ones = [1] * len(lengths)
    return data.Books(data.tokenizer("bytes"), [str(b) for b in range(len(lengths))], tokens, ones, ones)


def read(loader, n):
    return [loader.next() for _ in range(n)]


def test_every_token_is_a_target_once_in_an_epoch_and_in_order():
    loader = data.Bookmarks(books(50, 7, 33, 20, 1), rows=2, T=8, once=True)
    seen = []
    with pytest.raises(StopIteration):
        while True:
            batch = loader.next()
            scored = batch.y >= 0
            assert (batch.y[scored] == batch.x[scored] + 1).all()
            assert (batch.at[scored] == batch.y[scored] % 1000 - 1).all()
            assert (batch.book[:, None].expand_as(batch.y)[scored] == batch.y[scored] // 1000).all()
            seen += batch.y[scored].tolist()
    assert sorted(seen) == sorted(1000 * b + i for b, n in enumerate((50, 7, 33, 20, 1)) for i in range(1, n + 1))


def test_a_row_reads_on_until_its_book_ends_and_then_says_fresh():
    loader = data.Bookmarks(books(40, 24, 30), rows=2, T=8, seed=3)
    last = None
    for batch in read(loader, 40):
        for row in range(2):
            if batch.fresh[row]:
                assert batch.x[row, 0] % 1000 == 0                              # a book begins with end-of-text
            else:
                assert batch.x[row, 0] == last[row] + 1
        last = batch.x[:, -1]


def test_a_book_shorter_than_a_window_is_padded_not_dropped():
    batch = data.Bookmarks(books(5, 6), rows=2, T=8, once=True).next()
    assert (batch.y >= 0).sum(1).tolist() == [5, 6] and batch.x.shape == (2, 8)


def test_fewer_books_than_rows_are_cut_into_pieces_and_nothing_is_lost():
    loader = data.Bookmarks(books(400), rows=4, T=8)
    assert len(loader.pieces) == 17 and (loader.next().book == 0).all()        # 16 of 24 tokens and the rest
    assert sorted(i for _, start, end in loader.pieces for i in range(start, end)) == list(range(1, 401))


def test_epochs_are_shuffled_differently_and_the_seed_decides():
    def order(seed):
        return [b.book[0].item() for b in read(data.Bookmarks(books(*[4] * 12), rows=1, T=4, seed=seed), 24)]
    assert sorted(order(1)[:12]) == sorted(order(1)[12:]) == list(range(12))
    assert order(1) == order(1) and order(1)[:12] != order(1)[12:] and order(1) != order(2)


@pytest.mark.parametrize("turns", [2, 3])
def test_a_row_takes_turns_between_its_books_and_every_target_stays_in_its_own(turns):
    """The same law as above, segment by segment; a book goes on after its turn where it was before."""
    lengths, S = (50, 7, 33, 20, 1, 64, 12, 29), 4
    loader = data.Bookmarks(books(*lengths), rows=2, T=2 * turns * S, once=True, interleave=turns, turn=S)
    seen = []
    with pytest.raises(StopIteration):
        while True:
            batch = loader.next()
            for row in range(2):
                begins = False
                for s in range(2 * turns):
                    here = slice(s * S, (s + 1) * S)
                    x, y, at, book = (t[row, here] for t in (batch.x, batch.y, batch.at, batch.book))
                    n = (y >= 0).sum()
                    assert (book == book[0]).all() and (y[:n] == x[:n] + 1).all() and (y[n:] == -1).all()
                    assert (y[:n] // 1000 == book[0]).all() and (at[:n] == y[:n] % 1000 - 1).all()
                    assert s < turns or book[0] == batch.book[row, (s - turns) * S]
                    begins |= bool(n) and at[0].item() == 0
                    seen += y[:n].tolist()
                assert begins == batch.fresh[row]
                own = batch.book[row, :turns * S:S]
                assert len(set(own[own >= 0].tolist())) == (own >= 0).sum(), "a book takes turns with itself"
    assert sorted(seen) == sorted(1000 * b + i for b, n in enumerate(lengths) for i in range(1, n + 1))
    for b in range(len(lengths)):
        assert [t for t in seen if t // 1000 == b] == sorted(t for t in seen if t // 1000 == b)


def test_turns_that_do_not_come_out_even_are_refused():
    with pytest.raises(UserError, match="3 books do not take even turns of 16 tokens in a window of 64"):
        data.Bookmarks(books(50, 50, 50), 1, 64, interleave=3, turn=16)


@pytest.mark.parametrize("make", [lambda: data.Bookmarks(books(50, 7, 33, 20), rows=2, T=8),
                                  lambda: data.Bookmarks(books(50, 7, 33, 20), rows=1, T=8, interleave=2, turn=2),
                                  lambda: data.Synthetic("recall", 2, 64)], ids=["books", "interleaved", "recall"])
def test_a_saved_position_goes_on_with_the_same_batches(make):
    loader, again = make(), make()
    read(loader, 5)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for a, b in zip(read(loader, 9), read(again, 9)):
        assert all(s.equal(t) for s, t in zip(a, b))


def test_a_position_of_another_batch_size_is_refused():
    with pytest.raises(UserError, match="in 2 rows were read, here are 3 in 3"):
        data.Bookmarks(books(50, 50, 50), 3, 8).load_state_dict(data.Bookmarks(books(50, 50, 50), 2, 8).state_dict())


# synthetic streams

@pytest.mark.parametrize("name", [*data.STREAMS, "recall:pairs=8:mixed=yes"])
def test_the_answer_stands_where_the_distance_says(name):
    batch = data.Synthetic(name, 16, 128, seed=1).next()
    rows, t = (batch.y >= 0).nonzero(as_tuple=True)
    assert len(rows) and batch.fresh.all() and batch.x.max() < data.SYMBOLS
    back = t - batch.at[rows, t]
    assert (batch.x[rows, t] == batch.x[rows, back]).all()                      # the same key stood there
    assert (batch.y[rows, t] == batch.x[rows, back + 1]).all()                  # and its value behind it
    for r, q, p in zip(rows, t, back):                                          # and nowhere in between
        assert not ((batch.x[r, p + 1:q] == batch.x[r, q]) & (batch.x[r, p + 2:q + 1] == batch.y[r, q])).any()
    assert not data.Synthetic(name, 16, 128, seed=2).next().x.equal(batch.x)


def test_mixed_texts_have_any_number_of_pairs():
    x, y, _ = data.recall(np.random.default_rng(0), 200, 64, pairs=4, mixed=True)
    count = [len(set(x[y >= 0])) for x, y in zip(x, y)]
    assert (y >= 0).sum(1).max() == 16 - 1 and all(count.count(n) > 25 for n in (1, 2, 3, 4))


def test_every_question_of_mqar_has_its_pair_at_the_beginning():
    x, y, at = data.mqar(np.random.default_rng(0), 50, 65, pairs=7)
    for x, y, at in zip(x, y, at):
        pairs = dict(zip(x[:14:2], x[1:14:2]))
        keys, values = set(pairs), set(pairs.values())
        assert len(keys) == len(values) == 7, "keys, or values, that are twice there"
        asked = np.flatnonzero(y >= 0)
        assert asked.min() >= 14 and (asked % 2 == 0).all() and sorted(x[asked]) == sorted(keys)
        assert all(y[t] == pairs[x[t]] and x[t - at[t]] == x[t] and t - at[t] < 14 for t in asked)
        rest = np.delete(x, [*range(14), *asked])
        assert (rest == 0).all() and (np.delete(at, asked) == 0).all()
    noisy = data.mqar(np.random.default_rng(0), 50, 65, pairs=7, noise=True)[0]
    assert not set(noisy[:, 14:].ravel()) <= set(x) and noisy.max() < data.SYMBOLS


def test_questions_of_mqar_come_soon_as_if_drawn_one_by_one():
    """The places against numpy's own draws without replacement."""
    rng = np.random.default_rng(0)
    _, y, _ = data.mqar(rng, 4000, 40, pairs=5, power=0.3)
    p = np.arange(1, 16) ** (0.3 - 1)
    slow = np.stack([np.bincount(rng.choice(15, 5, replace=False, p=p / p.sum()), minlength=15) for _ in range(4000)])
    assert np.abs((y[:, 10:40:2] >= 0).mean(0) - slow.mean(0)).max() < 0.03
    even = (data.mqar(rng, 4000, 40, pairs=5, power=1)[1][:, 10:40:2] >= 0).mean(0)
    assert np.abs(even - 1 / 3).max() < 0.03


@pytest.mark.parametrize("pairs, asks, hops, notice", [(1, 1, 1, 0), (3, 2, 1, 0), (4, 3, 1, 8), (2, 2, 3, 16)])
def test_needles_are_followed_through_their_hops(pairs, asks, hops, notice):
    """From every question: find its key in the text, go on with what stands behind it, and so on to the value."""
    batch = data.Synthetic(f"needle:pairs={pairs}:asks={asks}:hops={hops}:notice={notice}", 8, 256).next()
    for x, y, at in zip(batch.x, batch.y, batch.at):
        questions = (y >= 0).nonzero()[:, 0].tolist()
        assert sorted(x[questions].bincount().tolist())[-pairs:] == [asks] * pairs
        assert (x >= data.NOISE).sum() == pairs * (2 * hops + asks * (1 + (notice > 0))), "values and keys only there"
        for t in questions:
            assert x[t - notice] == x[t]
            key = x[t]
            for hop in range(hops):
                place = (x == key).nonzero()[min(hop, 1), 0].item()   # one that was led to stood there first
                key = x[place + 1]
            assert key == y[t] and place == t - at[t]


def test_a_needle_lies_at_the_distance_asked_for():
    assert (data.Synthetic("needle", 4, 64, distance=50).next().at[:, -1] == 50).all()
    for make, why in [(lambda: data.Synthetic("needle", 4, 64, distance=64), "distance 64 does not fit into 64"),
                      (lambda: data.Synthetic("recall", 4, 64, pairs=65), "65 pairs that are asked for"),
                      (lambda: data.Synthetic("recall", 4, 8), "2 pairs that are asked for 0 times"),
                      (lambda: data.Synthetic("recall:pair=3", 4, 64), "recall has no knob pair: did you mean pairs"),
                      (lambda: data.Synthetic("recall:pairs=x", 4, 64), "takes a whole number"),
                      (lambda: data.Synthetic("mqar", 4, 64, pairs=17), "17 pairs and their questions do not fit"),
                      (lambda: data.Synthetic("retain", 4, 64, facts=9), "9 facts .* into 64 keys and 16 chunks of 4")]:
        with pytest.raises(UserError, match=why):
            make().next()


def test_planted_pairs_are_asked_for_behind_a_gap_and_nobody_answers():
    batch = data.Synthetic("planted:pairs=2:gap=40", 8, 96).next()
    rows, t = (batch.y >= 0).nonzero(as_tuple=True)
    late = t >= 16
    assert late.any() and t[late].min() >= 40
    after = t[late] + 1 < 96
    assert (batch.x[rows[late][after], t[late][after] + 1] != batch.y[rows[late][after], t[late][after]]).all()
    with pytest.raises(UserError, match="from 96 on do not fit into 96 tokens"):
        data.Synthetic("planted:gap=96", 8, 96).next()


def test_a_row_that_lasts_for_several_windows_is_one_text():
    whole, parts = data.Synthetic("planted", 4, 96), read(data.Synthetic("planted:windows=3", 4, 32), 6)
    for i, batch in enumerate(read(whole, 2)):
        three = parts[3 * i:3 * i + 3]
        assert all(torch.cat([getattr(p, k) for p in three], 1).equal(getattr(batch, k)) for k in ("x", "y", "at"))
        assert [p.fresh.tolist() for p in three] == [[True] * 4, [False] * 4, [False] * 4]
        assert all(p.book.equal(batch.book) for p in three)


def test_knobs_may_stand_behind_the_name():
    one, two = data.Synthetic("needle:distance=50", 4, 64, seed=3), data.Synthetic("needle", 4, 64, seed=3, distance=50)
    assert one.next().x.equal(two.next().x) and (one.next().at[:, -1] == 50).all()
    assert (data.Synthetic("needle:distance=50", 4, 64, distance=9).next().at[:, -1] == 9).all()


def test_retain_asks_once_for_each_fact_at_the_beginning_of_a_later_chunk():
    for T, facts in (64, 8), (64, 3), (2048, 16):
        batch = data.Synthetic("retain", 32, T, facts=facts if facts == 3 else 0).next()
        rows, t = (batch.y >= 0).nonzero(as_tuple=True)
        told = t - batch.at[rows, t]
        assert (t % 4 == 0).all() and (told % 4 > 0).all() and (batch.at[rows, t] // 4 == t // 4 - told // 4 - 1).all()
        assert rows.bincount().tolist() == [facts] * 32
        assert all(len(set(batch.x[r, t[rows == r]].tolist())) == facts for r in range(32)), "a key is asked for twice"


def test_a_single_book_holds_out_its_own_end():
    text = "A line of it.\n\n" * 100
    split = data.hold_out([("book", text)])
    (_, begin), (_, end) = split["train"][0], split["validation"][0]
    assert begin + end == text and 0.85 < len(begin) / len(text) < 0.91 and begin.endswith("\n")
    with pytest.raises(UserError, match="too short to train on: 6 characters"):
        data.hold_out([("book", "Whale!")])


# PG-19, from a server with the bucket's layout

class Bucket(BaseHTTPRequestHandler):
    files, faults, asked = {}, {}, []

    def do_GET(self):
        body, fault = self.files.get(self.path), self.faults.pop(self.path, None)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append((self.path, start))
        if body is None:
            return self.send_error(404)
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", "text/html" if fault == "login" else "text/plain")
        self.send_header("x-goog-hash", "md5=" + base64.b64encode(hashlib.md5(body).digest()).decode())
        self.end_headers()
        body = body[start:]
        self.wfile.write(body[:len(body) // 2] if fault == "drop" else b"?" * len(body) if fault == "wrong" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch):
    ids = ["7", "8", "9", "1022", "10146"]
    Bucket.files = {f"/{split}/{i}.txt": (f"Book {i}.\r\n" * 50).encode()
                    for i in ids for split in [dict(zip(("1022", "10146"), ("validation", "test"))).get(i, "train")]}
    Bucket.files["/metadata.csv"] = "".join(f'{i},"A book, by X",1900,http://x/{i}\n' for i in ids).encode()
    Bucket.faults, Bucket.asked = {}, []
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pg19_is_downloaded_and_becomes_shards(bucket, tmp_path):
    meta = data.pg19(tmp_path, data.tokenizer("bytes"), url=bucket)
    assert {s: sorted(m["names"]) for s, m in meta["splits"].items()} == \
        dict(train=["7", "8", "9"], validation=["1022"], test=["10146"])
    books = data.open_shards(tmp_path, "test")
    assert bytes(books.tokens[0][1:].astype(np.uint8)) == b"Book 10146.\n" * 50   # line ends are LF
    n = len(Bucket.asked)
    data.pg19(tmp_path, data.tokenizer("bytes"), url=bucket)
    assert len(Bucket.asked) == n, "what is there was asked for again"


def test_a_dropped_connection_goes_on_from_where_it_stopped(bucket, tmp_path):
    Bucket.faults["/train/7.txt"] = "drop"
    data.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    size = len(Bucket.files["/train/7.txt"])
    assert (tmp_path / "7.txt").read_bytes() == Bucket.files["/train/7.txt"]
    assert Bucket.asked == [("/train/7.txt", 0), ("/train/7.txt", size // 2)]


def test_a_download_goes_on_in_a_later_run(bucket, tmp_path):
    (tmp_path / "7.txt.part").write_bytes(Bucket.files["/train/7.txt"][:100])
    data.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    assert Bucket.asked == [("/train/7.txt", 100)] and (tmp_path / "7.txt").read_bytes() == Bucket.files["/train/7.txt"]


@pytest.mark.parametrize("left", [b"x" * 100, b"x" * 5000], ids=["another beginning", "too long"])
def test_a_wrong_file_is_thrown_away_and_fetched_again(bucket, tmp_path, left):
    Bucket.faults["/train/7.txt"] = "wrong"
    (tmp_path / "7.txt.part").write_bytes(left)
    data.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    assert (tmp_path / "7.txt").read_bytes() == Bucket.files["/train/7.txt"]


def test_what_cannot_be_fetched_is_refused_and_keeps_what_came(bucket, tmp_path):
    with pytest.raises(UserError, match="404"):
        data.fetch(f"{bucket}/train/5.txt", tmp_path / "5.txt")
    Bucket.faults["/train/7.txt"] = "login"
    with pytest.raises(UserError, match="web page"):
        data.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    with pytest.raises(UserError, match="gave up after 2 tries .*the same command goes on"):
        data.fetch("http://127.0.0.1:9/x.txt", tmp_path / "x.txt", tries=2)
    assert not (tmp_path / "7.txt").exists()


# the command line

def command(*argv):
    return subprocess.run([sys.executable, "-m", "nanomem.data", *map(str, argv)], capture_output=True, text=True,
                          cwd=data.HERE.parent)


def test_the_command_makes_shards_of_text_files(tmp_path):
    for name, text in TEXTS:
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    done = command("text", *sorted(tmp_path.glob("*.txt")), f"--out={tmp_path / 'shards'}", "--tokenizer=bytes")
    assert done.returncode == 0 and "is ready" in done.stdout, done.stderr
    assert [len(data.open_shards(tmp_path / "shards", split)) for split in ("train", "validation")] == [2, 1]


def test_the_command_reads_a_folder_in_the_layout_of_pg19(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.txt").write_text("A book.\n" * 9)
    assert command("pg19", f"--folder={tmp_path}", f"--out={tmp_path}/shards").returncode == 0
    assert data.open_shards(tmp_path / "shards", "validation").words == [18]


@pytest.mark.parametrize("argv, why", [
    (["pg20"], "say what to read"), (["text", "--out=x"], "text needs files"), (["pg19"], "--out=DIR is missing"),
    (["text", "none.txt", "--out=x"], "cannot read none.txt"),
    (["pg19", "--ot=x"], "unknown flag --ot: did you mean out"),
    (["pg19", "--folder=none", "--out=x"], "none is not in PG-19's layout")])
def test_the_command_refuses_in_one_line_with_exit_code_2(argv, why):
    done = command(*argv)
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1
