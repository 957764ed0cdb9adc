"""PG-19 from a server with the layout of the official bucket, and from a folder."""
import base64
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from nanomem import data, pg19
from nanomem.cli import UserError


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
    monkeypatch.setattr(pg19.time, "sleep", lambda _: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pg19_is_downloaded_and_becomes_shards(bucket, tmp_path):
    meta = pg19.make_shards(tmp_path, data.tokenizer("bytes"), url=bucket)
    assert {s: sorted(m["names"]) for s, m in meta["splits"].items()} == \
        dict(train=["7", "8", "9"], validation=["1022"], test=["10146"])
    books = data.open_shards(tmp_path, "test")
    assert bytes(books.tokens[0][1:].astype(np.uint8)) == b"Book 10146.\n" * 50   # line ends are LF
    n = len(Bucket.asked)
    pg19.make_shards(tmp_path, data.tokenizer("bytes"), url=bucket)
    assert len(Bucket.asked) == n, "what is there was asked for again"


def test_one_missing_book_does_not_cost_the_others(bucket, tmp_path, capsys):
    del Bucket.files["/train/8.txt"]
    meta = pg19.make_shards(tmp_path, data.tokenizer("bytes"), url=bucket)
    assert sorted(meta["splits"]["train"]["names"]) == ["7", "9"]
    assert "1 of 5 books are not on the server and are left out: 8" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no address"):
        pg19.fetch("htp:/x", tmp_path / "x", tries=1)


def test_a_dropped_connection_goes_on_from_where_it_stopped(bucket, tmp_path):
    Bucket.faults["/train/7.txt"] = "drop"
    pg19.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    size = len(Bucket.files["/train/7.txt"])
    assert (tmp_path / "7.txt").read_bytes() == Bucket.files["/train/7.txt"]
    assert Bucket.asked == [("/train/7.txt", 0), ("/train/7.txt", size // 2)]


def test_a_download_goes_on_in_a_later_run(bucket, tmp_path):
    (tmp_path / "7.txt.part").write_bytes(Bucket.files["/train/7.txt"][:100])
    pg19.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    assert Bucket.asked == [("/train/7.txt", 100)] and (tmp_path / "7.txt").read_bytes() == Bucket.files["/train/7.txt"]


@pytest.mark.parametrize("left", [b"x" * 100, b"x" * 5000], ids=["another beginning", "too long"])
def test_a_wrong_file_is_thrown_away_and_fetched_again(bucket, tmp_path, left):
    Bucket.faults["/train/7.txt"] = "wrong"
    (tmp_path / "7.txt.part").write_bytes(left)
    pg19.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    assert (tmp_path / "7.txt").read_bytes() == Bucket.files["/train/7.txt"]


def test_what_cannot_be_fetched_is_refused_and_keeps_what_came(bucket, tmp_path):
    with pytest.raises(UserError, match="404"):
        pg19.fetch(f"{bucket}/train/5.txt", tmp_path / "5.txt")
    Bucket.faults["/train/7.txt"] = "login"
    with pytest.raises(UserError, match="web page"):
        pg19.fetch(f"{bucket}/train/7.txt", tmp_path / "7.txt")
    with pytest.raises(UserError, match="gave up after 2 tries .*the same command goes on"):
        pg19.fetch("http://127.0.0.1:9/x.txt", tmp_path / "x.txt", tries=2)
    assert not (tmp_path / "7.txt").exists()


# the command line

def command(*argv):
    return subprocess.run([sys.executable, "-m", "nanomem.pg19", *map(str, argv)], capture_output=True, text=True,
                          cwd=data.HERE.parent)


def test_the_command_reads_a_folder_in_the_layout_of_pg19(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.txt").write_text("A book.\n" * 9)
    assert command(f"--folder={tmp_path}", f"--out={tmp_path}/shards").returncode == 0
    meta = json.loads((tmp_path / "shards" / "meta.json").read_text())
    assert meta["splits"]["validation"]["words"] == 18


def test_shards_are_replaced_only_when_asked(tmp_path):
    data.write_shards(tmp_path, data.tokenizer("bytes"), dict(train=[("mine", "text " * 9)]))
    done = command("--folder=none", f"--out={tmp_path}")
    assert done.returncode == 2 and "holds shards already: add --overwrite" in done.stderr


def test_a_sample_of_a_folder_is_that_of_the_download_and_a_larger_one_holds_it(tmp_path):
    names = [str(i) for i in range(8, 40)]
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / f"{name}.txt").write_text("A book.\n")
    sample = lambda n: [path.stem for path in pg19.find(tmp_path, n)["train"]]
    assert sample(9) == pg19.shuffled(names)[:9] == sample(20)[:9] != names[:9]
    assert sorted(sample(0)) == sorted(names) and len(pg19.find(tmp_path, 2)["validation"]) == len(names)


@pytest.mark.parametrize("argv, why", [
    ([], "--out=DIR is missing"), (["books", "--out=x"], "did you mean --folder=books"),
    (["--ot=x"], "unknown flag --ot: did you mean out"),
    (["--folder=none", "--out=x"], "none is not in PG-19's layout")])
def test_the_command_refuses_in_one_line_with_exit_code_2(argv, why):
    done = command(*argv)
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1


def test_help_names_every_flag_and_what_it_does():
    done = command("--help")
    flags = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert done.returncode == 0 and len(flags) == 6 and all(line[33:].strip() for line in flags), "a flag without help"
