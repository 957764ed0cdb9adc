"""Nothing silently wrong, nothing lost, no traceback for a user's mistake: faults of such programs, each with its test.

The last part tries hundreds of odd flags and damaged files. Each must be accepted or refused in one sentence.
"""
import contextlib
import copy
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nanomem
import sample
import train
from nanomem import checkpoint, cli, data, stream, tasks
from nanomem.cli import UserError
from nanomem.models.gpt import rope, rotate
from nanomem.shards import MAGIC

from conftest import S, TINY, V, close, run, text, tiny

ROOT = Path(__file__).parent.parent
SMALL = ["--data=recall", "--layers=1", "--heads=1", "--width=16", "--seg=16", "--batch=2", "--segments=2",
         "--eval_batches=1", "--device=cpu"]
BYTES = ["--data=", "--tokenizer=bytes", *SMALL[1:]]


def go(out, *more, model="rmt"):
    return train.main([f"--model={model}", f"--out={out}", *SMALL, *more])


def last(out):
    return checkpoint.load(Path(out) / "last.pt", "checkpoint")


# silently wrong

@pytest.mark.parametrize("parts", [2, 4])
def test_a_split_of_a_batch_changes_no_gradient(model, parts):
    """Also not that of a loss of the mechanism itself (`aux`)."""
    tokens, found = text(B=4, K=2), []
    model.double()
    for n in (1, parts):
        model.zero_grad()
        for x in tokens.chunk(n):
            state = {k: v.double() if v.is_floating_point() else v for k, v in model.init_state(len(x)).items()}
            stream.bptt(model, stream.make_step(model), x, x.roll(-1, 1), state, 1 / tokens.numel(), share=1 / n)
        found.append([p.grad for p in model.parameters()])
    assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(*found))


@torch.no_grad()
@pytest.mark.parametrize("name", ["window", "xl", "full"])
def test_keys_and_values_that_are_kept_are_not_rounded_again(name):
    """In bfloat16: what a second segment leaves of the first one's keys is their rotation in float32."""
    model = tiny(name, window=3 * S)
    step, x = stream.make_step(model, torch.bfloat16), text(K=2)
    _, one = step(x[:, :S], x[:, :S], model.init_state(2))
    _, two = step(x[:, S:], x[:, S:], one)
    keys, values = one["kv"].unbind(2)
    keys2, values2 = two["kv"].unbind(2)
    moved = rotate(keys[:, :, :, -S:], rope(torch.full((1,), -S), model.c.head_dim))
    assert one["kv"].dtype == torch.float32 and torch.equal(values2[:, :, :, -2 * S:-S], values[:, :, :, -S:])
    assert torch.equal(keys2[:, :, :, -2 * S:-S], moved)


def test_clip_0_means_no_clipping(tmp_path):
    for clip in ("0", "1e9"):
        go(tmp_path / clip, "--steps=3", f"--clip={clip}")
    one, two = (last(tmp_path / clip)["weights"] for clip in ("0", "1e9"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(UserError, match="--clip must not be negative, got -1.0"):
        go(tmp_path / "x", "--clip=-1")


def shards(folder, words="whale "):
    data.write_shards(folder, data.tokenizer("bytes"), dict(train=[("a", words * 200)], validation=[("b", words * 99)]))
    return folder


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    go(tmp_path / "out", f"--data={shards(tmp_path / 'data')}", "--steps=2")
    go(tmp_path / "out", f"--data={tmp_path / 'data'}", "--steps=3", "--resume")
    shards(tmp_path / "data", "wholes ")
    with pytest.raises(UserError, match="is not the data that this run was trained on"):
        go(tmp_path / "out", f"--data={tmp_path / 'data'}", "--steps=4", "--resume")


def test_more_steps_after_the_end_say_what_they_do_to_the_learning_rate(tmp_path, capsys):
    go(tmp_path, "--steps=4")
    capsys.readouterr()
    train.main([f"--out={tmp_path}", "--resume", "--steps=8"])
    assert "note: with 8 steps the learning rate is now 77% of its peak; with 4 it was" in capsys.readouterr().out


def test_a_tokenizer_that_contradicts_the_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match="was made with the tokenizer bytes: leave --tokenizer out"):
        go(tmp_path / "out", f"--data={shards(tmp_path / 'data')}", "--tokenizer=gpt2-4k")


def test_the_same_file_is_not_training_and_validation_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("whale " * 99)
    with pytest.raises(UserError, match="is named twice"):
        data.main([str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), f"--out={tmp_path / 'out'}"])


def test_a_token_beyond_the_vocabulary_is_refused_before_it_is_trained_on(tmp_path):
    books = data.open_shards(shards(tmp_path), "train")
    books.tokens[0] = np.array(books.tokens[0])
    books.tokens[0][5] = 300
    with pytest.raises(UserError, match="a holds token 300, and the tokenizer bytes has 257"):
        data.Loader(books, 1, 16).next()


def test_a_shard_that_is_named_twice_is_refused(tmp_path):
    meta = json.loads((shards(tmp_path) / "meta.json").read_text())
    meta["splits"]["train"]["files"] *= 2
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="damaged or not ours"):
        data.open_shards(tmp_path, "train")


def test_a_changed_bit_in_a_checkpoint_is_noticed(tmp_path):
    go(tmp_path, "--steps=1")
    whole, rng = (tmp_path / "last.pt").read_bytes(), np.random.default_rng(0)
    content = checkpoint.checksum(last(tmp_path))
    for place in rng.integers(len(whole), size=60):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "last.pt").write_bytes(changed)
        with contextlib.suppress(UserError):               # a bit that carries nothing may change
            assert checkpoint.checksum(last(tmp_path)) == content


def test_a_file_of_the_format_before_is_refused_in_one_sentence(tmp_path):
    torch.save(dict(format="nanomem checkpoint", version=1, step=3), tmp_path / "last.pt")
    with pytest.raises(UserError, match="was written in format 1, this code reads format 2: train again"):
        go(tmp_path, "--resume", "--steps=9")


def test_what_a_kill_between_best_and_last_leaves_is_made_good_at_resume(tmp_path, monkeypatch):
    """At each save, the last one too."""
    go(tmp_path / "whole", "--steps=6", "--eval_interval=2")
    for when in range(1, 4):
        out, real, saved = tmp_path / str(when), os.replace, []

        def replace(a, b):
            real(a, b)
            saved.append(b)
            if sum(Path(f).name == "best.pt" for f in saved) == when and Path(b).name == "best.pt":
                raise KeyboardInterrupt
        monkeypatch.setattr(os, "replace", replace)
        with contextlib.suppress(KeyboardInterrupt):
            go(out, "--steps=6", "--eval_interval=2")
        monkeypatch.undo()
        if not (out / "last.pt").exists():
            go(out, "--steps=6", "--eval_interval=2", "--overwrite")
        elif last(out)["step"] < 6:
            train.main([f"--out={out}", "--resume"])
        one, two = (checkpoint.load(d / "best.pt", "checkpoint") for d in (tmp_path / "whole", out))
        assert one["step"] == two["step"]
        assert all(torch.equal(one["weights"][k], two["weights"][k]) for k in one["weights"])


# loses work

def test_shards_replace_no_file_that_nanomem_did_not_write(tmp_path):
    (tmp_path / "train_notes.txt").write_text("mine")
    shards(tmp_path)
    shards(tmp_path)                                       # its own it does replace
    assert (tmp_path / "train_notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train_00000.bin").write_text("mine")
    with pytest.raises(UserError, match="train_00000.bin is there and was not made by nanomem"):
        shards(tmp_path / "other")
    assert (tmp_path / "other" / "train_00000.bin").read_text() == "mine"


def test_old_shards_stay_until_all_new_ones_are_written(tmp_path):
    shards(tmp_path)
    def texts():
        yield "a", "new " * 99
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_shards(tmp_path, data.tokenizer("bytes"), dict(train=texts(), validation=[("b", "x" * 99)]), 10)
    assert bytes(data.open_shards(tmp_path, "train").tokens[0][1:6].astype(np.uint8)) == b"whale"


def test_overwrite_keeps_the_old_run_until_the_new_one_begins_its_log(tmp_path, monkeypatch):
    go(tmp_path, "--steps=2")
    kept = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(stream, "bptt", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, "--steps=2", "--overwrite", "--seed=2")
    assert (tmp_path / "last.pt").read_bytes() == kept and (tmp_path / "best.pt").exists()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: 1 / 0)     # then an old checkpoint would have a new log
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, "--steps=2", "--overwrite", "--seed=2", "--log_interval=1")
    assert not [*tmp_path.glob("*.pt")]


def test_a_users_own_log_is_not_replaced(tmp_path):
    (tmp_path / "log.csv").write_text("day,weight\n")
    with pytest.raises(UserError, match="log.csv is there and is no log of a run, so it will not be replaced"):
        go(tmp_path, "--steps=1")
    assert (tmp_path / "log.csv").read_text() == "day,weight\n"


def test_a_reader_that_leaves_the_pipe_ends_the_run_and_loses_nothing(tmp_path, out):
    """As in: train.py ... | head."""
    training = ["train.py", "--model=gpt", f"--out={tmp_path / 'run'}", *SMALL, "--steps=100000", "--log_interval=1"]
    writing = ["sample.py", str(out), "--prompt=A whale", "--tokens=100000", "--temperature=0",
               f"--save-memory={tmp_path / 'm.pt'}"]
    for argv in (training, writing):
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(120) == 141
    assert 0 < last(tmp_path / "run")["step"] < 100_000 and checkpoint.load(tmp_path / "m.pt", "memory")["count"] > 7


@pytest.mark.parametrize("damage", ["meta.json is cut off", "meta.json is gone"])
def test_shards_without_their_list_can_be_made_again(tmp_path, damage):
    meta = shards(tmp_path) / "meta.json"
    meta.write_bytes(meta.read_bytes()[:99]) if "cut" in damage else meta.unlink()
    (tmp_path / "a.txt").write_text("whale " * 99)
    data.main([str(tmp_path / "a.txt"), f"--out={tmp_path}", "--tokenizer=bytes", "--overwrite"])
    assert data.open_shards(tmp_path, "train").names == ["a"]


@pytest.mark.parametrize("name, before", [("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL),
                                          ("SIGHUP", signal.SIG_IGN)])
def test_the_end_of_a_job_saves_and_nohup_goes_on(tmp_path, monkeypatch, name, before):
    real, made, number = tasks.TaskLoader.next, [], getattr(signal, name)

    def next_(self):
        made.append(1)
        if len(made) == 2:
            signal.raise_signal(number)
        return real(self)
    monkeypatch.setattr(tasks.TaskLoader, "next", next_)
    usual = signal.signal(number, before)
    try:
        stopped = go(tmp_path, "--steps=9") == 130
    finally:
        signal.signal(number, usual)
    assert (stopped, last(tmp_path)["step"]) == ((False, 9) if before == signal.SIG_IGN else (True, 2))


def test_a_validation_that_fails_loses_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, "--steps=4", "--eval_interval=2")
    assert last(tmp_path)["step"] == 2


def test_a_validation_without_a_question_is_no_error(tmp_path):
    go(tmp_path, "--steps=1", "--data=delayed:gap=48:bptt_windows=4", "--segments=1", model="gpt")
    go(tmp_path / "paper", "--steps=1", "--query=paper", "--data=needle:distance=20", model="hmt")
    assert last(tmp_path)["step"] == 1


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with checkpoint.lock(tmp_path):
        with pytest.raises(UserError, match="another run is writing to"):
            go(tmp_path, "--steps=1")
    go(tmp_path, "--steps=1")


def test_steps_that_are_done_again_stand_once_in_the_log(tmp_path):
    go(tmp_path, "--steps=4", "--eval_interval=2", "--log_interval=1")
    with open(tmp_path / "log.csv", "a") as f:
        f.write("5,1,,,1,1,1,1\n")                         # as after a kill between two checkpoints
    train.main([f"--out={tmp_path}", "--resume", "--steps=6"])
    assert [r["step"] for r in csv.DictReader(open(tmp_path / "log.csv"))] == ["1", "2", "3", "4", "5", "6"]


def test_only_a_regular_file_is_ever_replaced_and_a_link_is_followed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "real.pt").write_text("old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match="is not a regular file and will not be replaced"):
            checkpoint.save(tmp_path / name, "memory", x=1)
    checkpoint.save(tmp_path / "link.pt", "memory", x=1)
    assert (tmp_path / "link.pt").is_symlink() and checkpoint.load(tmp_path / "real.pt", "memory")["x"] == 1


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_nothing(tmp_path):
    """kill -9 a dozen times at random moments, resume each time: the end is that of the whole run, to the bit."""
    flags = [*SMALL, "--model=rmt", "--steps=400", "--eval_interval=20"]
    train.main([*flags, f"--out={tmp_path / 'whole'}"])
    rng, kills, out = np.random.default_rng(0), 0, tmp_path / "killed"
    while not (out / "last.pt").exists() or last(out)["step"] < 400:
        more = ["--resume"] if (out / "last.pt").exists() else ["--overwrite"]
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags, f"--out={out}", *more],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(1.5, 4) if kills < 12 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    one, two = last(tmp_path / "whole"), last(out)
    assert kills and all(torch.equal(one["weights"][k], two["weights"][k]) for k in one["weights"])
    assert all(torch.equal(one["state"][k], two["state"][k]) for k in one["state"]) and one["best"] == two["best"]


# the command line

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    train.main(["--model=rmt", f"--out={folder}", *BYTES, "--steps=2"])
    return folder


def test_a_pipe_is_read_before_the_prompt(out):
    command = [sys.executable, str(ROOT / "sample.py"), str(out), "--tokens=8", "--temperature=0"]
    piped = subprocess.run([*command, "--prompt=x"], input="The whale ", capture_output=True, text=True)
    whole = subprocess.run([*command, "--prompt=The whale x"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert piped.returncode == whole.returncode == 0 and "The whale " + piped.stdout == whole.stdout


def test_text_ends_where_the_model_says_that_a_text_ends(out, capsys, monkeypatch):
    tokens = iter([*b"ab", 256, *b"cd"])
    monkeypatch.setattr(sample, "picker", lambda *_: lambda logits: torch.tensor([[next(tokens)]]))
    sample.main([str(out), "--prompt=x", "--tokens=5"])
    assert capsys.readouterr().out == "xab\n"


@pytest.mark.parametrize("argv, why", [
    (["-model=rmt"], "flags begin with two dashes: --model=rmt"), (["--learning_rate=1"], "did you mean muon or lr"),
    (["--data=recal"], "did you mean recall"), (["--seed=-1"], "must not be negative"), (["--lr=nan"], "got 'nan'"),
    (["--lr=inf"], "got 'inf'"), ([f"--steps={10 ** 30}"], "too large"), (["--warmup=2"], "between 0 and 1"),
    (["--device=cuda" if not torch.cuda.is_available() else "--device=tpu"], "there is no device"),
    (["--width=2000000"], "parameters need .* GB"), (["--batch=1000000000"], "a step needs .* GB"),
    (["--data=train.py"], "is not a folder of shards"), (["--data=recall:pairs=0"], "0 pairs"),
    (["--data=retain:chunk=0"], "chunks of 0"), (["--out=train.py"], "cannot write train.py")])
def test_a_users_mistake_is_one_sentence(tmp_path, argv, why, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=why):
        go(tmp_path, *argv)


def test_llm_c_shards_are_books_that_begin_at_end_of_text(tmp_path):
    try:
        enc = data.tokenizer("gpt2")
    except UserError:
        pytest.skip("no gpt2 vocabulary here")
    tokens = np.concatenate([[enc.eot_token, *enc.encode_ordinary(t)] for t in ("One book.", "And another one.")])
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, 1, len(tokens)
    for split in ("train", "val"):
        (tmp_path / f"books_{split}_000001.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    books = data.open_shards(tmp_path, "validation")
    assert [enc.decode(t[1:].tolist()) for t in books.tokens] == ["One book.", "And another one."]


# hundreds of odd flags and damaged files

def outcome(function, *args):
    """accepted or refused; anything else is a traceback, which fails the test. Prints nothing."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function(*args)
        return "accepted"
    except UserError as e:
        assert "\n" not in str(e), f"more than one line: {e}"
        return "refused"
    except SystemExit as e:
        return "refused" if e.code == 2 else "accepted"


ODD = ["-1", "0", "1e400", "nan", "inf", "", "x", str(10 ** 20), "1e-300", "-0.5", "yes", "é\udc80", "1.5"]


def odd_flags(rng, n):
    """n command lines of train.py and sample.py with one flag of an odd value."""
    import dataclasses
    fields = {"train": [f.name for f in dataclasses.fields(train.Run) if f.name not in ("out", "resume", "overwrite")],
              "sample": [f.name for f in dataclasses.fields(sample.Sample) if f.name not in ("save_memory",)]}
    fields["train"] += ["vocab", "layers", "heads", "width", "seg", "mlp", "mem", "sensory"]
    for _ in range(n):
        script = ("train", "train", "sample")[rng.integers(3)]
        yield script, f"--{fields[script][rng.integers(len(fields[script]))]}={ODD[rng.integers(len(ODD))]}"


@pytest.mark.parametrize("n", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_no_odd_flag_gives_a_traceback(tmp_path, out, n, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)                            # --look=1.5 writes a file
    found = dict(accepted=0, refused=0)
    for i, (script, flag) in enumerate(odd_flags(np.random.default_rng(n), n)):
        argv = [f"--out={tmp_path / str(i)}", "--model=rmt", *SMALL, "--steps=1", flag] if script == "train" else \
            [str(out), "--tokens=1", "--prompt=a", flag]
        found[outcome((train if script == "train" else sample).main, argv)] += 1
    with capsys.disabled():
        print(f" [{n} odd flags: {found['refused']} refused, {found['accepted']} accepted, 0 tracebacks]", end="")
    assert found["refused"] > n / 3


def damage(content, rng):
    """A copy with one entry missing, of another type, of another shape, or full of other numbers."""
    content = copy.deepcopy(content)
    parent, path = content, []
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = keys[rng.integers(len(keys))]
        child = parent[key]
        path.append(key)
        if isinstance(child, (dict, list)) and len(child) and rng.random() < 0.7:
            parent = child
            continue
        break
    other = [None, "x", -1, 10 ** 9, math.nan, [], {}, torch.zeros(3), torch.zeros(2, 2).long() - 5][rng.integers(9)]
    if isinstance(child, torch.Tensor) and rng.random() < 0.5:
        other = child[:0] if child.ndim and rng.random() < 0.5 else child.to(torch.complex64)
    if rng.random() < 0.3 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = other
    return content


@pytest.mark.parametrize("n", [90, pytest.param(600, marks=pytest.mark.slow)])
def test_no_damaged_file_gives_a_traceback(tmp_path, out, n, capsys):
    """Checkpoints and memories with a right checksum but a wrong content, files cut off, shards with wrong numbers."""
    rng, found = np.random.default_rng(n), dict(accepted=0, refused=0)
    saved = checkpoint.load(out / "last.pt", "checkpoint")
    sample.main([str(out), "--prompt=The whale, the whale", "--tokens=1", f"--save-memory={tmp_path / 'm.pt'}"])
    memory = checkpoint.load(tmp_path / "m.pt", "memory")
    rest = lambda content: {k: v for k, v in content.items() if k not in ("format", "version")}
    for i in range(n):
        kind = i % 3
        if kind == 0:
            (tmp_path / "run").mkdir(exist_ok=True)
            checkpoint.save(tmp_path / "run" / "last.pt", "checkpoint", **damage(rest(saved), rng))
            found[outcome(train.main, [f"--out={tmp_path / 'run'}", "--resume", "--steps=3"])] += 1
            found[outcome(sample.main, [str(tmp_path / "run"), "--tokens=1", "--prompt=a"])] += 1
        elif kind == 1:
            checkpoint.save(tmp_path / "d.pt", "memory", **damage(rest(memory), rng))
            found[outcome(sample.main, [str(out), f"--load-memory={tmp_path / 'd.pt'}", "--tokens=1"])] += 1
        else:
            folder = shards(tmp_path / "shards")
            if rng.random() < 0.5:
                meta = json.loads((folder / "meta.json").read_text())
                text_ = json.dumps(damage(meta, rng), default=str)
                (folder / "meta.json").write_text(text_)
            else:
                path = sorted(folder.glob("train_00000.*"))[rng.integers(2)]
                raw = bytearray(path.read_bytes())
                for place in rng.integers(len(raw), size=3):
                    raw[place] = rng.integers(256)
                path.write_bytes(raw[:rng.integers(len(raw))] if rng.random() < 0.3 else raw)
            argv = [f"--out={tmp_path / 'o'}", "--overwrite", "--model=gpt", *SMALL, "--steps=1", f"--data={folder}"]
            found[outcome(train.main, argv)] += 1
            for path in folder.glob("*"):
                path.unlink()
    with capsys.disabled():
        print(f" [{n} damaged files: {found['refused']} refused, {found['accepted']} accepted, 0 tracebacks]", end="")
    assert found["refused"] > n / 3
