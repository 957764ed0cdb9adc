"""look.py: the page says of a text what the model says, text stays text, and no file of another kind is lost."""
import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import sample
import train
from nanomem import data, look, measure
from nanomem.cli import UserError

from conftest import tiny

BYTES, S = data.tokenizer("bytes"), 16
TEXT = "It was a dark night, and the whale was white. " * 3


def model(name, **fields):
    return tiny(name, vocab=320, seg=S, **fields).eval()


def array(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def page_of(tmp_path, text, name="rmt", enc=BYTES):
    """The page of a text as it is written, and what it says, as a browser would find it."""
    look.write(tmp_path / "look.html", model(name), name, enc, text, "book.txt")
    page = (tmp_path / "look.html").read_text(encoding="utf-8")
    script = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S).group(1)
    return page, json.loads(script)


# what the model says

@pytest.mark.parametrize("name", ["rmt", "xl"])
def test_the_losses_are_those_of_the_evaluation_with_and_without_memory(name):
    m, books = model(name), data.from_texts(BYTES, [("a", TEXT)])
    found = look.content(m, BYTES, BYTES.encode_ordinary(TEXT))
    expected = [measure.token_losses(m, books, 1, 1, change=change)[0]
                for change in (lambda state: state, lambda state: m.init_state(1))]
    assert np.abs(array(found["losses"], "<u2").reshape(2, -1) / 1000 - expected).max() < 1e-3
    assert abs(found["loss"] - expected[0].mean()) < 1e-4 and abs(found["loss_empty"] - expected[1].mean()) < 1e-4
    gain = np.where(np.arange(len(TEXT)) % S < S // 2, 0, expected[1] - expected[0])
    assert sorted(found["best"]) == sorted((-gain).argsort()[:20].tolist()) and gain[found["best"][0]] == gain.max()


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_the_logits():
    m = model("rmt")
    found = look.content(m, BYTES, BYTES.encode_ordinary(TEXT))
    ids, state = torch.tensor([[BYTES.eot_token, *TEXT.encode()]]), m.init_state(1)
    for x in ids[:, :2 * S].split(S, 1):
        logits, state = m(x, state)
    p = logits[0, 3].softmax(0)
    tokens = p[:BYTES.n_vocab].topk(3)[1]
    names = [found["names"][i] for i in array(found["likeliest"], "<u2").reshape(2, -1, 3)[0, S + 3]]
    assert names == [look.name_of(BYTES, token) for token in tokens.tolist()]
    chances = array(found["chances"], "u1").reshape(2, -1, 3)[0, S + 3] / 255
    assert np.abs(chances - p[tokens].numpy()).max() < 0.003


def test_every_model_can_be_looked_at_and_only_memory_gains(name):
    found = look.content(model(name), BYTES, list(TEXT.encode()))
    assert found["text"] == TEXT and found["tokens"] == len(TEXT) and found["segment"] == S
    assert (found["loss"] == found["loss_empty"]) == (name == "gpt")
    if name == "gpt":
        assert found["state_bytes"] == 0 and found["best"] == [] and len(set(array(found["losses"], "<u2"))) > 9
        losses = array(found["losses"], "<u2").reshape(2, -1)
        assert (losses[0] == losses[1]).all()
    chooses = name in ("hmt", "hmt_split", "mplus", "bmojo", "gca", "landmark")
    assert bool(found["places"]) == chooses
    if chooses:
        places = {k: array(v, "u1" if k == "share" else "<u2" if k == "length" else "<u4")
                  for k, v in found["places"].items() if k != "weighted"}
        end = places["first"].astype(int) + places["length"]
        assert len(places["set"]) == len(TEXT) and places["ends"][-1] == len(end) == len(places["share"])
        assert found["places"]["weighted"] == (name not in ("mplus", "bmojo"))
        for t in (S, 3 * S, len(TEXT) - 1):             # what token t looked at lies before it
            n = places["set"][t]
            here = slice(places["ends"][n - 1] if n else 0, places["ends"][n])
            assert (end[here] <= t).all() and (places["first"][here] < end[here]).all()


def test_the_same_place_of_several_heads_is_one_and_neighbours_without_weights_too():
    span = np.array([[-1, -1], [9, 12], [5, 7], [9, 12], [0, 1]])
    spans, shares = look.Places.summary(span, np.array([0.5, 0.1, 0.15, 0.2, 0.05]))
    assert spans.tolist() == [[8, 11], [4, 6]] and np.allclose(shares, [0.3, 0.15])     # the text begins at 0, not at 1
    spans, shares = look.Places.summary(np.array([[7, 8], [3, 4], [8, 9], [9, 10]]), np.full(4, np.nan))
    assert spans.tolist() == [[2, 3], [6, 9]] and np.isnan(shares).all()
    assert look.Places.summary(np.full((3, 2), -1), np.zeros(3))[0].shape == (0, 2)


# the page

def test_a_text_full_of_tags_is_shown_as_text(tmp_path):
    text = '</script><script>alert(1)</script><!-- {{data}} {{title}} &lt; "\\u003c" \u2028 <b>'
    page, found = page_of(tmp_path, text)
    assert found["text"] == text and page.count("<script") == 2 and "alert(1)</script>" not in page
    assert page.startswith("<!doctype html><!-- a look page of nanomem -->") and page.rstrip().endswith("</html>")


def test_a_page_loads_nothing(tmp_path):
    page, found = page_of(tmp_path, TEXT)
    assert not re.search(r"https?://|src=|@import|url\(|<link", page) and "default-src 'none'" in page
    assert found["model"] == "rmt" and found["source"] == "book.txt" and found["state_bytes"] > 0
    assert "<title>rmt reads book.txt</title>" in page


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2-4k"])
def test_characters_are_whole_however_many_tokens_they_take(tmp_path, tokenizer):
    text, enc = "a鯨é \U0001f40b. naïve", data.tokenizer(tokenizer)
    texts, counts = look.pieces(enc, enc.encode_ordinary(text))
    assert "".join(texts) == text and counts.sum() == len(enc.encode_ordinary(text)) and "鯨" in texts
    m = tiny("rmt", vocab=enc.n_vocab + 7, seg=S).eval()
    look.write(tmp_path / "look.html", m, "rmt", enc, text, "x")
    found = look.content(m, enc, enc.encode_ordinary(text))
    assert array(found["characters"], "<u2").sum() == len(text) + 1            # one of them counts as two in JavaScript
    if tokenizer == "bytes":
        assert texts == list(text) and counts.tolist() == [len(c.encode()) for c in text]
        assert {look.name_of(enc, i) for i in (97, 0xE9, enc.eot_token)} == {"a", "byte E9", "end of text"}
        nats = measure.token_losses(m, data.from_texts(enc, [("x", text)]), 1, 1)[0]
        assert abs(array(found["losses"], "<u2")[1] / 1000 - nats[1:4].sum()) < 1e-3


def test_a_text_of_one_token_and_none(tmp_path):
    page, found = page_of(tmp_path, "a", "gca")
    assert found["tokens"] == 1 and found["best"] == [] and found["loss"] > 0
    with pytest.raises(UserError, match="no text to look at"):
        page_of(tmp_path, "")


def test_weights_that_are_damaged_are_one_sentence(tmp_path):
    m = model("rmt")
    m.head.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="no numbers"):
        look.write(tmp_path / "look.html", m, "rmt", BYTES, "abc", "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_of_the_page_is_correct_javascript(tmp_path):
    page, _ = page_of(tmp_path, TEXT)
    (tmp_path / "page.js").write_text(re.search(r"<script>(.*?)</script>", page, re.S).group(1))
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# the command

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rmt")
    train.main(["--model=rmt", f"--out={folder}", "--tokenizer=bytes", "--layers=1", "--heads=1", "--width=16",
                f"--seg={S}", "--batch=2", "--segments=2", "--steps=1", "--eval_batches=1"])
    return str(folder)


def test_the_command_writes_a_page_and_no_text(out, tmp_path, capsys):
    book, page = tmp_path / "book.txt", tmp_path / "new" / "folder" / "look.html"
    book.write_text(TEXT)
    capsys.readouterr()
    for _ in range(2):                                   # an earlier page is replaced
        assert sample.main([out, f"--file={book}", f"--look={page}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{len(TEXT)} tokens: ") and str(page) in said and said.count("\n") == 2
    assert '"source":"book.txt"' in page.read_text() and [p.name for p in page.parent.iterdir()] == ["look.html"]


def test_a_file_that_is_no_page_is_never_replaced(out, tmp_path):
    template = (look.HERE / "look.html").read_text()
    for name, content in dict(mine="my notes", empty="", template=template).items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="is no look page, so it will not be replaced"):
            sample.main([out, "--prompt=abc", f"--look={tmp_path / name}"])
        assert (tmp_path / name).read_text() == content
    with pytest.raises(UserError, match="not a regular file"):
        sample.main([out, "--prompt=abc", f"--look={tmp_path}"])
    with pytest.raises(UserError, match="cannot write"):
        sample.main([out, "--prompt=abc", f"--look={tmp_path / 'mine' / 'look.html'}"])
    with pytest.raises(UserError, match="leave --load-memory and --save-memory out"):
        sample.main([out, "--prompt=abc", f"--look={tmp_path / 'a.html'}", f"--save-memory={tmp_path / 'm.pt'}"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "mine", "template"]
