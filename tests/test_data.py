"""Tokenizers, shards and the loader; and what they say to bad input."""
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from nanomem import data
from nanomem.cli import UserError
from nanomem.text import Books

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
    index = np.concatenate([np.load(path) for path in sorted(shards.glob("train_*.idx.npy"))])
    for i, (_, text) in enumerate(TEXTS):
        assert books.tokens[i][0] == enc.eot_token and enc.decode(books.tokens[i][1:].tolist()) == text
        assert index[i, 2:].tolist() == [len(text.split()), len(text.encode())]
    header = np.fromfile(shards / "train_00000.bin", "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, sum(len(t) for t in books.tokens[:2])]


def test_new_shards_replace_the_old_ones_and_no_other_file(shards):
    (shards / "train_x.txt").write_text("mine")
    data.write_shards(shards, data.tokenizer("bytes"), dict(train=TEXTS, validation=TEXTS[:1]))
    assert sorted(p.name for p in shards.glob("train_*")) == ["train_00000.bin", "train_00000.idx.npy", "train_x.txt"]
    (shards / "meta.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="meta.json is there and was not made by nanomem: choose another --out"):
        data.write_shards(shards, data.tokenizer("bytes"), dict(train=TEXTS, validation=TEXTS[:1]))
    assert (shards / "meta.json").read_text() == '{"mine": 1}'


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
    ("train_00000.bin", lambda p: cut(p, -20), "the file holds"),
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
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfone\n")                  # as some editors save a text
    assert data.read_text(tmp_path / "bom.txt") == "one\n"


def test_a_single_book_holds_out_its_own_end():
    text = "A line of it.\n\n" * 100
    split = data.hold_out([("book", text)])
    (_, begin), (_, end) = split["train"][0], split["validation"][0]
    assert begin + end == text and 0.85 < len(begin) / len(text) < 0.91 and begin.endswith("\n")
    poem = data.hold_out([("poem", "Its title\n\n" + "A line.\n" * 100)])
    assert len(poem["train"][0][1]) > 700                                      # it is not cut after the title
    with pytest.raises(UserError, match="too short to train on: 6 characters"):
        data.hold_out([("book", "Whale!")])


# the loader

def books(*lengths):
    """Books of 1 + n tokens in which token i of book b is 1000 b + i."""
    tokens = [1000 * b + np.arange(n + 1).astype("<u2") for b, n in enumerate(lengths)]
    enc = SimpleNamespace(name="any", n_vocab=2 ** 16, eot_token=256)
    return Books(enc, [str(b) for b in range(len(lengths))], tokens)


def read(loader, n):
    return [loader.next() for _ in range(n)]


def test_every_token_is_a_target_once_in_an_epoch_and_in_order():
    loader = data.Loader(books(50, 7, 33, 20, 1), B=2, T=8, once=True)
    seen = []
    with pytest.raises(StopIteration):
        while True:
            batch = loader.next()
            scored = batch.y >= 0
            assert (batch.y[scored] == batch.x[scored] + 1).all()
            assert (batch.position[scored] == batch.y[scored] % 1000 - 1).all() and not batch.distance.any()
            assert (batch.book[:, None].expand_as(batch.y)[scored] == batch.y[scored] // 1000).all()
            seen += batch.y[scored].tolist()
    assert sorted(seen) == sorted(1000 * b + i for b, n in enumerate((50, 7, 33, 20, 1)) for i in range(1, n + 1))


def test_a_batch_element_goes_on_until_its_book_ends_and_then_is_fresh():
    loader = data.Loader(books(40, 24, 30), B=2, T=8, seed=3)
    last = None
    for batch in read(loader, 40):
        for b in range(2):
            if batch.fresh[b]:
                assert batch.x[b, 0] % 1000 == 0                               # a book begins with end-of-text
            else:
                assert batch.x[b, 0] == last[b] + 1
        last = batch.x[:, -1]


def test_a_book_shorter_than_a_batch_is_padded_not_dropped():
    batch = data.Loader(books(5, 6), B=2, T=8, once=True).next()
    assert (batch.y >= 0).sum(1).tolist() == [5, 6] and batch.x.shape == (2, 8)


def test_when_every_book_was_read_once_no_batch_element_is_fresh_any_more():
    loader = data.Loader(books(5, 20), B=2, T=8, once=True)
    assert [batch.fresh.tolist() for batch in read(loader, 3)] == [[True, True], [False, False], [False, False]]


def test_fewer_books_than_batch_elements_are_cut_into_pieces_and_nothing_is_lost():
    loader = data.Loader(books(400), B=4, T=8)
    assert len(loader.pieces) == 17 and (loader.next().book == 0).all()        # 16 of 24 tokens and the rest
    assert sorted(i for _, start, end in loader.pieces for i in range(start, end)) == list(range(1, 401))


def test_epochs_are_shuffled_differently_and_the_seed_decides():
    def order(seed):
        return [b.book[0].item() for b in read(data.Loader(books(*[4] * 12), B=1, T=4, seed=seed), 24)]
    assert sorted(order(1)[:12]) == sorted(order(1)[12:]) == list(range(12))
    assert order(1) == order(1) and order(1)[:12] != order(1)[12:] and order(1) != order(2)


def test_the_loader_feeds_a_gpu_from_one_core():
    """Above five million tokens a second of CPU time, from long books and from a hundred thousand short ones."""
    for n, length in (40, 200_000), (100_000, 500):
        many = books(length)
        many.tokens *= n
        loader, start = data.Loader(many, 16, 2048), time.process_time()
        tokens = sum(int((batch.y >= 0).sum()) for batch in read(loader, 100))
        assert tokens / (time.process_time() - start) > 5e6


@pytest.mark.parametrize("G", [2, 3])
def test_interleaved_books_take_turns_and_every_target_stays_in_its_own_book(G):
    """The same law as above, turn by turn. After the turns of the other books, a book goes on where it was."""
    lengths, S = (50, 7, 33, 20, 1, 64, 12, 29), 4
    loader = data.Loader(books(*lengths), B=2, T=2 * G * S, once=True, interleave=G, interleave_len=S)
    seen = []
    with pytest.raises(StopIteration):
        while True:
            batch = loader.next()
            for b in range(2):
                begins = False
                for turn in range(2 * G):
                    here = slice(turn * S, (turn + 1) * S)
                    x, y, position, book = (t[b, here] for t in (batch.x, batch.y, batch.position, batch.book))
                    n = (y >= 0).sum()
                    assert (book == book[0]).all() and (y[:n] == x[:n] + 1).all() and (y[n:] == -1).all()
                    assert (y[:n] // 1000 == book[0]).all() and (position[:n] == y[:n] % 1000 - 1).all()
                    assert turn < G or book[0] == batch.book[b, (turn - G) * S]
                    begins |= bool(n) and position[0].item() == 0
                    seen += y[:n].tolist()
                assert begins == batch.fresh[b]
                own = batch.book[b, :G * S:S]
                assert len(set(own[own >= 0].tolist())) == (own >= 0).sum(), "a book takes turns with itself"
    assert sorted(seen) == sorted(1000 * b + i for b, n in enumerate(lengths) for i in range(1, n + 1))
    for b in range(len(lengths)):
        assert [t for t in seen if t // 1000 == b] == sorted(t for t in seen if t // 1000 == b)


def test_interleaved_books_look_as_drawn():
    batch = data.Loader(books(50, 50), B=1, T=8, once=True, interleave=2, interleave_len=2).next()
    assert batch.x.tolist() == [[0, 1, 1000, 1001, 2, 3, 1002, 1003]]
    assert batch.y.tolist() == [[1, 2, 1001, 1002, 3, 4, 1003, 1004]]


def test_books_that_cannot_take_equal_turns_are_refused():
    with pytest.raises(UserError, match="64 tokens cannot be shared by 3 books in turns of 16 tokens"):
        data.Loader(books(50, 50, 50), 1, 64, interleave=3, interleave_len=16)


def test_a_part_of_a_batch_has_the_fields_of_its_elements():
    whole = data.Loader(books(50, 50, 50), 3, 8).next()
    part = whole.elements(1, 3)
    assert all(p.equal(w[1:3]) for p, w in zip(part, whole)) and part.to("cpu").x.equal(part.x)


@pytest.mark.parametrize("make", [lambda: data.Loader(books(50, 7, 33, 20), B=2, T=8),
                                  lambda: data.Loader(books(50, 7, 33, 20), B=1, T=8, interleave=2, interleave_len=2)],
                         ids=["books", "interleaved"])
def test_a_saved_position_goes_on_with_the_same_batches(make):
    loader, again = make(), make()
    read(loader, 5)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for a, b in zip(read(loader, 9), read(again, 9)):
        assert all(s.equal(t) for s, t in zip(a, b))


def test_a_position_of_another_batch_size_is_refused():
    with pytest.raises(UserError, match="2 cursors in 2 pieces of text, here are 3 in 3"):
        data.Loader(books(50, 50, 50), 3, 8).load_state_dict(data.Loader(books(50, 50), 2, 8).state_dict())


# the command line

def command(*argv):
    return subprocess.run([sys.executable, "-m", "nanomem.data", *map(str, argv)], capture_output=True, text=True,
                          cwd=data.HERE.parent)


def test_the_command_makes_shards_of_text_files(tmp_path):
    for name, text in TEXTS:
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    done = command(*sorted(tmp_path.glob("*.txt")), f"--out={tmp_path / 'shards'}", "--tokenizer=bytes")
    assert done.returncode == 0 and "is ready" in done.stdout, done.stderr
    assert [len(data.open_shards(tmp_path / "shards", split)) for split in ("train", "validation")] == [2, 1]


@pytest.mark.parametrize("argv, why", [
    ([], "name text files and a folder"), (["one.txt"], "name text files and a folder"),
    (["none.txt", "--out=x"], "cannot read none.txt"), (["a.txt", "--ot=x"], "unknown flag --ot: did you mean out")])
def test_the_command_refuses_in_one_line_with_exit_code_2(argv, why):
    done = command(*argv)
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1


def test_shards_of_another_text_are_replaced_only_when_asked(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The book {name}.\n" * 50)
    out, vocabulary = f"--out={tmp_path / 'shards'}", "--tokenizer=bytes"
    assert command(tmp_path / "a.txt", out, vocabulary).returncode == 0
    again = command(tmp_path / "b.txt", out, vocabulary)
    assert again.returncode == 2 and "holds shards already: add --overwrite to replace them" in again.stderr
    assert data.open_shards(tmp_path / "shards", "train").names == ["a"]
    assert command(tmp_path / "b.txt", out, vocabulary, "--overwrite").returncode == 0
    assert data.open_shards(tmp_path / "shards", "train").names == ["b"]


def test_help_names_every_flag_and_what_it_does():
    done = command("--help")
    flags = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert done.returncode == 0 and len(flags) == 3 and all(line[33:].strip() for line in flags), "a flag without help"
