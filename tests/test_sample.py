"""sample.py: any prompt, any length, the memory kept in a file."""
import io
import signal
import sys
from pathlib import Path

import pytest
import torch

import nanomem
import sample
import train
from nanomem import data, stream
from nanomem.cli import UserError

S = 16


@pytest.fixture(scope="module", params=["gpt", "xl", "rmt"])
def out(request, tmp_path_factory):
    """A model trained for two steps on the embedded book's bytes."""
    folder = tmp_path_factory.mktemp(request.param)
    train.main([f"--model={request.param}", f"--out={folder}", "--tokenizer=bytes", "--layers=2",
                "--heads=2", "--width=32", f"--seg={S}", "--batch=2", "--segments=2", "--steps=2", "--eval_batches=1"])
    return str(folder)


@pytest.fixture
def say(out, capsys):
    def run(*argv):
        sample.main([out, *argv])
        return capsys.readouterr().out
    capsys.readouterr()
    return run


def test_the_seed_decides_and_greedy_needs_none(say):
    a = ["--prompt=The whale", "--tokens=40"]
    assert say(*a) == say(*a) != say(*a, "--seed=1")
    greedy = say(*a, "--temperature=0")
    assert greedy == say(*a, "--temperature=0", "--seed=1") == say(*a, "--top_k=1") == say(*a, "--top_p=1e-9")


@torch.no_grad()
def test_greedy_text_is_what_one_loop_over_all_predicts(say, out):
    prompt = "x" * (2 * S + 5)
    text = say(f"--prompt={prompt}", f"--tokens={S}", "--temperature=0")
    enc, (model, _) = data.tokenizer("bytes"), nanomem.load(out)
    ids = [enc.eot_token, *enc.encode_ordinary(prompt)]
    for _ in range(S):                                        # the slow way: everything again for every token
        pad = ids + [0] * (-len(ids) % S)
        state, logits = model.init_state(1), []
        for x in torch.tensor([pad]).split(S, 1):
            y, state = model(x, state)
            logits.append(y)
        ids.append(torch.cat(logits, 1)[0, len(ids) - 1, :enc.n_vocab].argmax().item())
        if ids[-1] == enc.eot_token:
            ids.pop()
            break
    assert text == enc.decode(ids[1:], errors="replace") + "\n"


def test_what_is_remembered_after_ctrl_c_was_printed(out, tmp_path, capsys, monkeypatch):
    real = stream.Reader.generate

    def generate(self, *args):
        for i, token in enumerate(real(self, *args)):
            if i == 3:
                signal.raise_signal(signal.SIGINT)                                 # while this one is made
            yield token
    monkeypatch.setattr(stream.Reader, "generate", generate)
    monkeypatch.setattr(sample, "picker", lambda *_: lambda logits: torch.full((len(logits), 1), ord("a")))
    capsys.readouterr()
    assert sample.main([out, f"--save-memory={tmp_path / 'm.pt'}"]) == 130
    said = capsys.readouterr()
    assert said.out == "aaaa\n" and said.err.startswith("5 tokens are remembered")    # and the one before every book


@pytest.mark.parametrize("length", [1, S - 2, S - 1, 3 * S + 4])
def test_a_saved_memory_continues_as_if_it_had_never_been_put_away(say, tmp_path, length):
    book = "Call me Ishmael. " * 9
    whole = say(f"--prompt={book[:length]}And then", "--tokens=20", "--temperature=0")
    say(f"--prompt={book[:length]}", "--tokens=0", f"--save-memory={tmp_path / 'm.pt'}")
    on = say(f"--load-memory={tmp_path / 'm.pt'}", "--prompt=And then", "--tokens=20", "--temperature=0")
    assert on == whole[length:]
    assert say(f"--load-memory={tmp_path / 'm.pt'}", "--tokens=5", "--temperature=0")     # and without a prompt


def test_the_prompt_comes_from_a_file_or_from_standard_input(say, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("It was a dark night. " * 9)
    a = say(f"--file={tmp_path / 'book.txt'}", "--tokens=9")
    monkeypatch.setattr(sys, "stdin", io.StringIO("It was a dark night. " * 9))
    assert say("--file=-", "--tokens=9") == a


def test_no_row_behind_the_vocabulary_is_ever_chosen():
    pick = sample.picker(sample.Sample(temperature=5.0), 10, "cpu")
    logits = torch.zeros(1, 64)
    logits[:, 10:] = 9
    assert max(pick(logits).item() for _ in range(50)) < 10


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    settings = lambda **s: (sample.Sample(temperature=2.0, seed=i, **s) for i in range(60))
    chosen = lambda **s: {sample.picker(s, 4, "cpu")(logits).item() for s in settings(**s)}
    assert chosen(top_k=2) == {1, 2} and chosen(top_p=0.6) == {1, 2} and chosen() == {0, 1, 2, 3}


def test_a_character_of_several_bytes_is_written_whole(say, monkeypatch):
    tokens = iter("鯨é".encode())
    monkeypatch.setattr(sample, "picker", lambda *_: lambda logits: torch.tensor([[next(tokens)]]))
    assert say("--prompt=a", "--tokens=5") == "a鯨é\n"


@pytest.mark.parametrize("argv, why", [
    (["--top_p=0"], "--top_p=0.0 is out of range"), (["--file=none.txt"], "cannot read none.txt"),
    (["--promt=x"], "did you mean prompt"), (["--load-memory=none.pt"], "cannot read none.pt"),
    (["another"], "name one checkpoint")])
def test_a_wrong_flag_is_one_sentence(say, argv, why):
    with pytest.raises(UserError, match=why):
        say(*argv)


def test_a_memory_that_is_no_memory_is_refused(say, out, tmp_path):
    with pytest.raises(UserError, match="not a memory of nanomem but a checkpoint"):
        say(f"--load-memory={out}/last.pt")
    say("--prompt=abc", f"--save-memory={tmp_path / 'm.pt'}", "--tokens=1")
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="damaged or not a memory"):
        say(f"--load-memory={tmp_path / 'm.pt'}")
    reader = stream.Reader(nanomem.load(out)[0], 2)
    reader(torch.tensor([[1], [2]]))
    reader.save(tmp_path / "two.pt")
    with pytest.raises(UserError, match="is the memory of 2 texts side by side"):
        say(f"--load-memory={tmp_path / 'two.pt'}")


def test_a_file_that_is_no_memory_is_never_replaced(say, out, tmp_path):
    book, last = tmp_path / "book.txt", Path(out) / "last.pt"
    whole = last.read_bytes()
    book.write_text("Call me Ishmael.")
    for path, why in [(book, "is no memory, so it will not be replaced"), (last, "is no memory"),
                      (book / "m.pt", "book.txt is a file")]:
        with pytest.raises(UserError, match=why):
            say("--prompt=abc", f"--save-memory={path}", "--tokens=1")
    assert book.read_text() == "Call me Ishmael." and last.read_bytes() == whole
    book.write_text("notes on a nanomem memory")
    for path, why in [(book, "is no memory"), (f"{tmp_path}/new/", "is the name of a folder")]:
        with pytest.raises(UserError, match=why):
            say("--prompt=abc", f"--save-memory={path}", "--tokens=1")
    assert book.read_text() == "notes on a nanomem memory"
    for _ in range(2):                                                     # but a memory is
        say("--prompt=abc", f"--save-memory={tmp_path / 'm.pt'}", "--tokens=1")


def test_what_shapes_weights_cannot_be_changed_after_training(out):
    with pytest.raises(UserError, match="weights depend on width, which cannot be changed after training"):
        nanomem.load(out, width=64)


def test_a_model_that_looks_ahead_writes_no_text(tmp_path):
    train.main(["--model=hmt", "--query=paper", "--steps=1", "--batch=1", "--segments=1", "--layers=1", "--heads=2",
                "--width=16", "--seg=16", "--eval_batches=1", f"--out={tmp_path}"])
    with pytest.raises(UserError, match="cannot write text: query=paper looks ahead"):
        sample.main([str(tmp_path), "--prompt=A whale"])


def test_a_model_of_a_task_writes_no_text(tmp_path):
    train.main(["--model=gpt", f"--out={tmp_path}", "--data=needle", "--layers=1", "--heads=1", "--width=16", "--seg=8",
                "--batch=2", "--steps=1", "--eval_batches=1"])
    with pytest.raises(UserError, match="trained on the task needle, which is no text"):
        sample.main([str(tmp_path)])


@torch.no_grad()
def test_a_token_costs_the_same_rows_after_a_line_and_after_a_book(out):
    """Decode work is counted, not timed: positions through the backbone and keys that they see, early and late."""
    model = nanomem.load(out)[0]
    work = []
    model.blocks[0].attention.register_forward_hook(lambda m, a, y: work.append((a[0].size(1), y[1][0].size(2))))
    reader, costs = stream.Reader(model), []
    for _ in range(6):
        work.clear()
        for token in range(S):
            reader(torch.tensor([[token]]))
        costs.append(sorted(work))
    assert costs[1] == costs[-1]
