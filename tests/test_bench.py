"""bench.py on tiny settings: every task runs, nothing is done twice, and a mistake is one sentence."""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import nanomem
import train
from nanomem import checkpoint, cost, data, jobs, measure, pictures, stream, suites, tasks
from nanomem.cli import UserError
from nanomem.jobs import Job
from nanomem.variants import untrained

SMALL = ["--steps=2", "--task_steps=2", "--layers=1", "--heads=2", "--width=16", "--seg=16", "--batch=2",
         "--segments=2", "--read=2048", "--jobs=1"]
TINY = suites.Task("by tokens", dict(data="recall", layers=1, heads=2, width=16, batch=2, segments=2, seg=16, steps=2),
                   {32: "recall:asks=2"}, texts=128, edges=(0, 16, 32))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books") / "shards"
    texts = [(str(i), f"Book {i}. " * (60 * i)) for i in range(1, 5)]
    data.write_shards(folder, data.tokenizer("bytes"), dict(train=texts[:2], validation=texts[2:]))
    return folder


@pytest.fixture(autouse=True)
def tiny_recall(monkeypatch):
    monkeypatch.setitem(suites.TASKS, "recall", TINY)


@pytest.fixture
def trainings(monkeypatch):
    """The flags of each training, as a list that grows."""
    real, made = train.main, []
    monkeypatch.setattr(train, "main", lambda argv: made.append(argv) or real(argv))
    return made


def contents(out):
    """{name of a result file: its content}"""
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}


def measured(out, job):
    return contents(out)[job]["measured"]


# what is done, and what is not done twice

def test_the_whole_bench_runs_and_runs_again_without_work(tmp_path, shards, monkeypatch, trainings):
    argv, out = [*SMALL, "--models=gpt,xl,rmt", "--tasks=books,recall,cost", f"--data={shards}"], tmp_path / "out"
    assert bench.main([*argv, f"--out={out}"]) == 0
    found, text = contents(out), (out / "report.md").read_text()
    assert set(found) == {f"{task}-{name}-1" for task in ("books", "recall", "cost") for name in ("gpt", "xl", "rmt")}
    for name in ("gpt", "xl", "rmt"):
        assert found[f"books-{name}-1"]["measured"]["all"]["loss"] > 0 and f"| {name} " in text
        assert found[f"recall-{name}-1"]["measured"][0]["questions"] > 0
    one = found["recall-rmt-1"]
    assert (one["task"], one["model"], one["seed"], one["torch"]) == ("recall", "rmt", 1, torch.__version__)
    assert one["command"].startswith("python bench.py --steps=2") and one["machine"] and one["minutes"] > 0
    assert "--model=rmt" in one["settings"]["train"] and one["train_minutes"] > 0
    monkeypatch.setattr(measure, "accuracy", None)                     # whoever measures again fails
    monkeypatch.setattr(measure, "loss_by_position", None)
    out.rename(tmp_path / "moved")
    assert bench.main([*argv, f"--out={tmp_path / 'moved'}"]) == 0
    assert contents(tmp_path / "moved") == found and len(trainings) == 6


def test_two_folders_of_results_make_one_report(tmp_path, shards, trainings, capsys):
    argv = [*SMALL, "--tasks=books,recall", f"--data={shards}"]
    for name in ("gpt", "rmt"):
        bench.main([*argv, f"--models={name}", f"--out={tmp_path / name}"])
    made = len(trainings)
    shutil.copytree(tmp_path / "gpt" / "results", tmp_path / "both" / "results")
    shutil.copytree(tmp_path / "rmt" / "results", tmp_path / "both" / "results", dirs_exist_ok=True)
    before = contents(tmp_path / "both")
    bench.main([*argv, "--models=gpt,xl,rmt", f"--out={tmp_path / 'both'}", "--report"])
    text = (tmp_path / "both" / "report.md").read_text()
    assert len(trainings) == made and contents(tmp_path / "both") == before     # nothing is done for xl
    assert "4 of 6 jobs are done" in capsys.readouterr().out
    assert "Loss minus gpt's" in text and "\n| rmt " in text and "\n| xl " not in text
    assert "--models=gpt,xl,rmt" in text and "--report" not in text             # it is the command that makes the rest


def test_an_interrupted_bench_goes_on_where_it_stopped(tmp_path, shards, monkeypatch):
    argv = [*SMALL, "--steps=3", "--models=gpt,rmt", "--tasks=books", f"--data={shards}"]
    bench.main([*argv, f"--out={tmp_path / 'whole'}"])
    real, steps = data.Loader.next, []

    def next_(self):
        if not self.once:
            steps.append(1)
            if len(steps) == 3 + 2:
                signal.raise_signal(signal.SIGINT)
        return real(self)
    monkeypatch.setattr(data.Loader, "next", next_)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*argv, f"--out={tmp_path / 'parts'}"])
    assert set(contents(tmp_path / "parts")) == {"books-gpt-1"}
    assert checkpoint.load(tmp_path / "parts" / "books-rmt-1" / "last.pt", "checkpoint")["step"] == 2
    bench.main([*argv, f"--out={tmp_path / 'parts'}"])
    assert len(steps) == 3 + 3
    one, two = (nanomem.load(tmp_path / d / "books-rmt-1")[0].state_dict() for d in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert measured(tmp_path / "whole", "books-rmt-1") == measured(tmp_path / "parts", "books-rmt-1")


def test_pieces_of_a_bench_give_the_whole(tmp_path, shards, capsys, monkeypatch):
    """With --minutes it stops, says how far it is, and the same command goes on. Its clock stands still here, so that
    train.py gets 60 nanoseconds for each training: a step."""
    argv = [*SMALL, "--steps=4", "--models=gpt,rmt", "--tasks=books,recall", "--search=0.5,1", f"--data={shards}"]
    bench.main([*argv, f"--out={tmp_path / 'whole'}"])
    monkeypatch.setattr(bench, "time", SimpleNamespace(time=lambda: 0.0, perf_counter=time.perf_counter))
    capsys.readouterr()
    for done in (0, 2, 2, None):                                       # two steps for recall, four for books
        assert bench.main([*argv, f"--out={tmp_path / 'parts'}", "--minutes=1e-9"]) == 0
        said = capsys.readouterr().out
        assert (f"{done} of 4 jobs are done: the same command goes on" in said) == (done is not None)
    one, two = ({job: x["measured"] for job, x in contents(tmp_path / d).items()} for d in ("whole", "parts"))
    assert one == two


def test_what_says_most_is_done_first(tmp_path, monkeypatch, capsys):
    """gpt, window and full before other models, every model before another seed, and what is timed in its turn."""
    done = []
    monkeypatch.setattr(bench, "work", lambda b, group, *_: done.append((group[0].task, group[0].model, group[0].seed)))
    monkeypatch.setattr(stream, "machine", lambda *_: (torch.device("cuda"), None, None))
    with contextlib.suppress(IndexError):                                # there are no results to report
        bench.main(["--suite=night", "--tasks=books,passage,cost", f"--out={tmp_path}"])
    n = len(nanomem.MODELS)
    assert done[:5] == [("books", model, 1) for model in ("gpt", "window", "full", "xl", "rmt")]
    assert [task for task, *_ in done] == ["books"] * n + ["cost"] * n + ["books"] * n
    assert [seed for *_, seed in done] == [1] * 2 * n + [2] * n


def test_a_dry_run_names_the_work_its_size_and_its_time_and_does_nothing(tmp_path, shards, capsys):
    argv = [*SMALL, "--models=gpt,rmt,rmt:mem=1", "--tasks=books,passage,recall,cost", f"--data={shards}",
            f"--out={tmp_path}", "--search=0.5,1", "--steps=20", "--dry"]
    jobs.write_result(tmp_path, Job("cost", "gpt", 7), measured=dict(training_tokens_per_s=100))
    jobs.write_result(tmp_path, Job("cost", "rmt", 7), measured=dict(training_tokens_per_s=50))
    assert bench.main([*argv, "--speed=10"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
            if line.startswith("| ")]
    assert [row[0] for row in rows[2:5]] == [f"books, passage of {model}" for model in ("gpt", "rmt", "rmt:mem=1")]
    tokens = (20 + 2 + 2) * 2 * 2 * 16                                   # steps, and a tenth for each rate tried
    assert rows[2][4:] == [f"{tokens / 10 / 60:.0f}"] and rows[3][4:] == [f"{tokens / 5 / 60:.0f}"] and rows[4][4] == ""
    assert len(rows) == 2 + 3 * 3 and not list(tmp_path.glob("*.md")) and len(contents(tmp_path)) == 2


def test_a_file_that_is_damaged_is_measured_again_and_one_of_other_settings_is_not_lost(tmp_path, shards, trainings):
    argv = [*SMALL, "--models=gpt", "--tasks=books", f"--data={shards}", f"--out={tmp_path}"]
    bench.main(argv)
    path = tmp_path / "results" / "books-gpt-1.json"
    before = path.read_text()
    with pytest.raises(UserError, match=r"books-gpt-1.json was measured with other settings \(upto\): remove that"):
        bench.main([*argv, "--upto=64"])
    assert path.read_text() == before
    path.unlink()
    bench.main([*argv, "--upto=64"])                                   # measured anew with the same training
    assert len(trainings) == 1 and measured(tmp_path, "books-gpt-1")["all"]["tokens"] == 2 * 64
    whole = json.loads(path.read_text())
    for damaged in (path.read_text()[:100], "[]", 10_000 * "[", json.dumps({**whole, "settings": "x"}),
                    json.dumps({k: v for k, v in whole.items() if k != "measured"})):
        path.write_text(damaged)
        bench.main([*argv, "--upto=64"])
        assert len(trainings) == 1 and measured(tmp_path, "books-gpt-1")["all"]["tokens"] == 2 * 64
    path.unlink()
    (tmp_path / "books-gpt-1" / "last.pt").write_bytes(b"of another version")      # of worth to somebody
    with pytest.raises(UserError, match="last.pt is damaged or not a checkpoint.*; or add --overwrite to train again"):
        bench.main([*argv, "--upto=64"])


def test_a_training_with_other_settings_is_not_lost(tmp_path, shards, trainings, capsys):
    """A night of training, and then --width=32 for a try: train.py would not overwrite it either."""
    argv = [*SMALL, "--models=gpt", "--tasks=books", f"--data={shards}", f"--out={tmp_path}"]
    bench.main(argv)
    last, before = tmp_path / "books-gpt-1" / "last.pt", contents(tmp_path)
    whole = last.read_bytes()
    with pytest.raises(UserError, match="books-gpt-1 holds a training with --width=16, not 32: add --overwrite"):
        bench.main([*argv, "--width=32"])
    assert last.read_bytes() == whole and contents(tmp_path) == before and len(trainings) == 1
    bench.main([*argv, "--width=32", "--overwrite"])
    assert len(trainings) == 2 and nanomem.load(tmp_path / "books-gpt-1")[1]["config"]["width"] == 32
    bench.main([*argv, "--width=32"])
    assert "1 of 1 results were there already: --overwrite measures them again" in capsys.readouterr().out
    bench.main([*argv, "--width=32", "--overwrite"])                   # of a model that has changed
    path = tmp_path / "results" / "books-gpt-1.json"                   # and what was measured on the test books
    path.write_text(path.read_text().replace('"final": false', '"final": true'))
    with pytest.raises(UserError, match="books-gpt-1.json was measured with --final: remove that file"):
        bench.main([*argv, "--width=32"])
    assert len(trainings) == 3 and bench.options([])[0].out != bench.options(["--suite=night"])[0].out


def test_overwrite_that_is_cut_short_leaves_nothing_old(tmp_path, shards, trainings, capsys):
    """A model has changed: neither its old numbers nor its old weights may come back."""
    argv = [*SMALL, "--models=gpt,rmt", "--tasks=books", f"--data={shards}", f"--out={tmp_path}"]
    bench.main(argv)
    bench.main([*argv, "--overwrite", "--minutes=1e-9"])
    assert "0 of 2 jobs are done: the same command without --overwrite goes on" in capsys.readouterr().out
    bench.main(argv)
    assert len(trainings) == 4


def test_what_was_timed_on_another_device_is_not_taken(tmp_path):
    b, job = bench.options(["--device=cpu"])[0], jobs.Job("cost", "gpt", 1)
    assert jobs.machine_of(b, job) == dict(machine=cost.machine_name(torch.device("cpu")))
    assert jobs.machine_of(bench.options([])[0], job) == jobs.machine_of(b, jobs.Job("recall", "gpt", 1)) == {}
    jobs.write_result(tmp_path, job, settings={}, machine="a GPU", measured={})
    assert jobs.read_result(tmp_path, job, {}) and not jobs.read_result(tmp_path, job, {}, **jobs.machine_of(b, job))


def test_results_of_other_books_are_not_taken(tmp_path, trainings):
    """The shards were made again, in the same folder."""
    folder, argv = tmp_path / "shards", [*SMALL, "--models=gpt", "--tasks=books", f"--out={tmp_path / 'out'}"]
    argv.append(f"--data={folder}")
    def make(text):
        bench.hash_of_books.cache_clear()
        splits = {split: [(split, text * 200)] for split in ("train", "validation")}
        data.write_shards(folder, data.tokenizer("bytes"), splits)
    make("One book. ")
    bench.main(argv)
    make("Other books. ")
    with pytest.raises(UserError, match="books-gpt-1 holds a training with other books: add --overwrite to"):
        bench.main(argv)
    bench.main([*argv, "--overwrite"])
    assert len(trainings) == 2


def test_one_training_serves_a_model_and_what_is_changed_for_its_test(tmp_path, monkeypatch, trainings):
    small = suites.Task("by tokens", dict(data="needle:notice=8", batch=2, layers=2, heads=2, width=16, segments=1,
                        seg=32, steps=2), {T: "needle:notice=8" for T in (32, 64, 2080)}, texts=256,
                        long_texts=True, fewest=192)
    monkeypatch.setitem(suites.TASKS, "needle", small)
    gca, full = "gca:chunk=8:topk=2", "full"
    bench.main([f"--models={gca},{gca}/retrieval=recent:topk=1,{full}", "--tasks=needle", f"--out={tmp_path}",
                "--jobs=1", "--read=2048"])
    one, other, no_search = (measured(tmp_path, f"needle-{name}-1") for name in (
        "gca-chunk8-topk2", "gca-chunk8-topk2--retrievalrecent-topk1", "full"))
    assert len(trainings) == 2 and [r["length"] for r in one] == [r["length"] for r in other] == [32, 64]
    assert one[0]["hits"] == 0 or one[0]["hits"] != other[0]["hits"]
    assert "hits" not in no_search[0] and [r["questions"] for r in one] == [256, 192]    # not 256, 128


def test_a_task_stops_at_the_longest_text_of_a_model():
    t = suites.Task("", {}, {8: "a", 16: "b", 64: "c"}, 1, long_texts=True, longest=dict(full=16))
    assert list(t.tests_for("full", 1000)) == [8, 16] and list(t.tests_for("gca", 1000)) == [8, 16, 64]
    assert list(t.tests_for("gca", 10)) == [8]


@pytest.mark.slow
def test_side_by_side_is_one_after_the_other(tmp_path, shards, monkeypatch):
    monkeypatch.undo()                                                 # other processes know only the real tasks
    argv = [*SMALL, "--models=gpt,rmt", "--tasks=books,recall", f"--data={shards}"]
    for n in "12":
        bench.main([*argv, f"--out={tmp_path / n}", f"--jobs={n}"])
    one, two = ({k: r["measured"] for k, r in contents(tmp_path / n).items()} for n in "12")
    assert one == two and len(one) == 4


def test_a_process_that_is_killed_is_named_too():
    errors = [error for _, error in jobs.run_all(os._exit, [(1,), (1,)], 2)]
    assert all(jobs.describe(error)[0].startswith("BrokenProcessPool: ") for error in errors) and len(errors) == 2


BUSY = """
import os, sys, time
from pathlib import Path
from nanomem import jobs

def work(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    list(jobs.run_all(work, [(sys.argv[1],)] * 2, 2))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows")
def test_the_processes_end_with_the_one_that_began_them(tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    (tmp_path / "at_work").mkdir()
    env = dict(os.environ, PYTHONPATH=str(Path(bench.__file__).parent))
    main = subprocess.Popen([sys.executable, tmp_path / "busy.py", tmp_path / "at_work"], env=env)

    def wait(done):
        until = time.time() + 60
        while not done() and time.time() < until:
            time.sleep(0.1)
        return done()
    at_work = lambda: [int(path.name) for path in (tmp_path / "at_work").iterdir()]
    assert wait(lambda: len(at_work()) == 2)
    main.kill()
    main.wait()

    def ended(pid):
        try:
            os.kill(pid, 0)                                            # only asks
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{pid}/stat")                              # ended, though its new parent has not looked yet
        return state.exists() and ") Z " in state.read_text()
    assert wait(lambda: all(map(ended, at_work())))


# settings

def test_settings_make_a_model_of_their_own_and_seeds_are_averaged(tmp_path, shards):
    argv = [*SMALL, "--models=rmt,rmt:mem=1", "--tasks=books,recall", f"--data={shards}", f"--out={tmp_path}"]
    bench.main([*argv, "--seeds=2"])
    found = contents(tmp_path)
    assert len(found) == 2 * 2 * 2
    few, many = (found[f"books-{name}-1"]["measured"]["parameters"] for name in ("rmt-mem1", "rmt"))
    assert few == many - 16 * 3
    one, two = (found[f"recall-rmt-{seed}"]["measured"][0]["accuracy"] for seed in (1, 2))
    assert f"{(one + two) / 2:.0%} ({min(one, two):.0%} to {max(one, two):.0%})" in (tmp_path / "report.md").read_text()


def test_the_best_learning_rate_of_a_search_is_taken(tmp_path, shards, trainings):
    """And a search that was already made, for a table of the rates, is not made again."""
    argv = [*SMALL, "--steps=20", "--models=gpt", f"--data={shards}", f"--out={tmp_path}", "--search=0.001,1"]
    bench.main([*argv, "--tasks=rates"])
    tried = measured(tmp_path, "rates-gpt-1")
    assert len(trainings) == 2 and f"{tried['1']:.3f} |" in (tmp_path / "report.md").read_text()
    bench.main([*argv, "--tasks=books,rates"])
    assert len(trainings) == 3 and tried == measured(tmp_path, "books-gpt-1")["search"]
    assert set(tried) == {"0.001", "1"} and tried["1"] < tried["0.001"]
    assert nanomem.load(tmp_path / "books-gpt-1")[1]["run"]["lr"] == 4e-3
    slow = nanomem.load(tmp_path / "books-gpt-1-x0.001")[1]["run"]
    assert slow["steps"] == 2 and slow["lr"] == pytest.approx(4e-6) and slow["muon"] == pytest.approx(4e-5)


def test_a_rate_at_which_training_diverges_costs_nothing_else(tmp_path, shards, monkeypatch):
    real = train.main

    def main(argv):
        if "--lr=0.4" in argv:
            raise train.Diverged("the loss is nan at step 1")
        return real(argv)
    monkeypatch.setattr(train, "main", main)
    bench.main([*SMALL, "--models=gpt", "--tasks=books", f"--data={shards}", f"--out={tmp_path}", "--search=1,100"])
    tried = measured(tmp_path, "books-gpt-1")["search"]
    assert tried["100"] == float("inf") > tried["1"] > 0 and " inf |" in (tmp_path / "report.md").read_text()


def test_equal_models_have_as_many_parameters_as_gpt(name):
    b = bench.Bench(layers=4, heads=4, width=128, seg=64)
    with torch.device("meta"):
        size = lambda model: measure.parameters(untrained(b, model))
        assert abs(size(name) / size("gpt") - 1) < 0.03
        assert untrained(b, f"{name}:mlp=64").c.mlp == 64


def test_names_with_spaces_and_none_mean_all():
    assert bench.models_of(bench.Bench(), "books") == list(nanomem.MODELS)
    assert bench.models_of(bench.Bench(models="gpt, rmt:mem=2"), "books") == ["gpt", "rmt:mem=2"]
    assert bench.models_of(bench.Bench(models="all, rmt:mem=2"), "books") == [*nanomem.MODELS, "rmt:mem=2"]
    assert bench.models_of(bench.Bench(models="gpt,all,gpt"), "books") == [*nanomem.MODELS]     # none is measured twice


def test_all_models_join_a_task_in_segments_that_its_texts_are_longer_than():
    """Texts of mqar are one call for its own models; what gpt sees in one call must not be all of it."""
    models = bench.models_of(bench.Bench(models="rmt:mem=1,all"), "mqar")
    own = list(suites.TASKS["mqar"].models)
    assert models[:1 + len(own)] == ["rmt:mem=1", *own] and "gpt:seg=16:segments=8" in models
    assert {model.partition(":")[0] for model in models} == set(nanomem.MODELS)


@pytest.mark.parametrize("typed, model", [
    ("rmt", "rmt:seg=16:segments=4"), ("rmt/mem=2", "rmt:seg=16:segments=4/mem=2"), ("rmt:mem=2", "rmt:mem=2"),
    ("full", "full"), ("full/window=8", "full/window=8")])
def test_a_name_alone_is_trained_as_it_is_among_all_models(typed, model):
    """In one call for a whole text, rmt would have no memory; full is a model that needle was made for."""
    assert bench.models_of(bench.Bench(models=typed), "needle") == [model]
    assert bench.models_of(bench.Bench(models=typed), "books") == [typed]


# the suites

@pytest.mark.parametrize("task", suites.TASKS)
def test_every_model_of_a_task_trains_on_texts_of_one_length(task):
    """And those that the task was not made for need their memory: their segment is not the whole text."""
    b = bench.Bench(models="all")
    runs = [train.parse(bench.flags_of(b, Job(task, model, 1))) for model in bench.models_of(b, task)]
    segments = [run["segments"] * tasks.settings_of(run["data"])[1]["bptt_windows"] for run, _ in runs]
    assert len({n * fields["seg"] for n, (_, fields) in zip(segments, runs)}) == 1
    assert all(n > 1 for n in segments[len(suites.TASKS[task].models):])


@pytest.mark.parametrize("task", suites.ORDER)
def test_a_night_has_every_model_in_every_task_and_each_can_be_built(task):
    b = bench.Bench(**suites.SUITES["night"])
    models = bench.models_of(b, task)
    assert {bench.parts_of(model)[0] for model in models} == set(nanomem.MODELS)
    if task in suites.TASKS:
        assert models[:2] == bench.models_of(bench.Bench(), task)[:2], "those that the task was made for come first"
        for model in models:
            run, fields = train.parse(bench.flags_of(b, Job(task, model, 1).training))
            nanomem.build(run["model"], **{**fields, "vocab": 64})


def test_a_night_goes_through_in_a_minute(tmp_path, shards, monkeypatch):
    """The whole suite, with a few small models that take a step or two on tiny texts."""
    for task, t in suites.TASKS.items():
        few = dict(list(t.tests.items())[:2])
        monkeypatch.setitem(suites.TASKS, task, bench.replace(t, tests=few, texts=8, batch=4, train=dict(
            t.train, width=16, batch=2, layers=min(2, t.train["layers"]))))
    monkeypatch.setattr(measure, "passage", lambda model, books: [dict(after=0, gain=0.0, interval=0.0)])
    monkeypatch.setattr(suites, "REPLAY_SEGMENTS", (2, 4))
    monkeypatch.setattr(cost.replay, "__defaults__", (1, 1))
    argv = [*SMALL, "--suite=night", f"--data={shards}", f"--out={tmp_path}", "--seeds=1", "--models=gpt,memformer"]
    assert bench.main(argv) == 0
    found = contents(tmp_path)
    names = suites.SUITES["night"]["tasks"].split(",")
    assert len(found) == 2 * len(names) and {(r["task"], r["model"].partition(":")[0]) for r in found.values()} == {
        (task, name) for task in names for name in ("gpt", "memformer")}
    assert len(found["books-memformer-1"]["measured"]["search"]) == 3
    assert "What the papers say" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("task, t", suites.TASKS.items())
def test_every_task_asks_in_training_and_in_its_tests(task, t):
    """Its texts can be made, and each has questions, none further away than the last column."""
    shortest = min(t.tests)
    for name, T in [(t.train["data"], max(t.text_segments, t.train["segments"]) * t.train["seg"]),
                    (t.tests[shortest], shortest)]:
        batch = tasks.TaskLoader(name, 2, T).next()
        assert (batch.y >= 0).any(1).all() and (not t.edges or batch.distance.max() < t.edges[-1])


# what goes wrong

@pytest.mark.parametrize("argv, why", [
    (["--models=gpt,xk"], "--models=xk is none of them: did you mean xl"),
    (["--tasks=book"], "--tasks=book is none of them: did you mean books"),
    (["--tasks=books,rates"], "--tasks=rates needs what to multiply the learning rates with: --search=0.5,1,2"),
    (["--search=1,x"], "--search=1,x is no list of numbers"), (["--search=0,1"], "--search=0,1 is no list of number"),
    (["--tasks=rates", "--search=1", "--models=rmt:lr=1e-3"], "nothing to do: --tasks=rates is for models without a"),
    (["--seeds=0"], "--seeds=0 is too little: at least 1"), (["--jobs=-1"], "--jobs=-1 is too little: at least 0"),
    (["--minutes=-1"], "--minutes=-1 is too little: at least 0"), (["--tasks=,"], "--tasks=, is none of them"),
    (["--models=gpt:seg=0"], "gpt:seg=0: texts of 32 tokens are not whole segments of 0"),
    (["--read=10"], "--read=10 is too little: at least 2048"), (["--step=3"], "unknown flag --step: did you mean step"),
    (["gpt"], "takes only flags"), (["--models=gca/topp=2"], "unknown flag --topp: did you mean topk"),
    (["--models=gca/steps=2"], "unknown flag --steps"), (["--models=rmt:slots=1"], "unknown flag --slots"),
    (["--models=rmt:mem"], "settings follow a name as :field=value, got :mem"),
    (["--models=rmt:mem=x"], "takes a whole number"),
    (["--models=rmt:seed=2"], "rmt:seed=2: seed is not a setting of one model"), (["--batch=0"], "--batch=0 is too"),
    (["--tasks=books", "--final"], "the embedded book has no split test"), (["--upto=-1"], "--upto=-1 is too little"),
    (["--tasks=books", "--data=recall"], "no shards in recall"),
    (["--suite=day"], "--suite=day is none of them: choose from laptop, night"),
    (["--models=gpt:seg=48", "--tasks=mqar"], "gpt:seg=48: texts of 128 tokens are not whole segments of 48")])
def test_a_wrong_flag_is_one_sentence(argv, why):
    with pytest.raises(UserError, match=why):
        bench.main(argv)


@pytest.mark.parametrize("error, said", [(UserError("the loss is nan in step 2"), "the loss is nan in step 2"),
                                         (torch.OutOfMemoryError("no memory"), "OutOfMemoryError: no memory")])
def test_a_job_that_fails_does_not_cost_the_others(error, said, tmp_path, monkeypatch):
    real = train.main

    def main(argv):
        if "--model=rmt" in argv:
            raise error
        return real(argv)
    monkeypatch.setattr(train, "main", main)
    argv = [*SMALL, f"--out={tmp_path}"]
    with pytest.raises(UserError, match=f"not all of it could be measured: recall of rmt: {said}$"):
        bench.main([*argv, "--tasks=recall,cost", "--models=rmt,gpt"])
    assert set(contents(tmp_path)) == {"recall-gpt-1", "cost-gpt-1", "cost-rmt-1"}
    assert all(f"\n| {name} " in (tmp_path / "report.md").read_text() for name in ("gpt", "rmt"))
    with pytest.raises(UserError, match=f"^recall of rmt: {said}$"):   # and nothing is no report
        bench.main([*argv, "--tasks=recall", "--models=rmt"])


def test_a_measurement_that_fails_is_named_and_does_not_cost_the_others_of_its_training(tmp_path, shards, capsys):
    argv = [*SMALL, "--models=gpt", "--tasks=books,passage,reach", f"--data={shards}", f"--out={tmp_path}", "--seg=64"]
    with pytest.raises(UserError, match="not all of it could be measured: passage of gpt: a passage needs a book of"):
        bench.main(argv)
    assert set(contents(tmp_path)) == {"books-gpt-1", "reach-gpt-1"}


def test_a_slash_at_the_end_of_a_folder_changes_nothing(tmp_path, shards, trainings):
    for end in ("", "/"):
        bench.main([*SMALL, "--models=gpt", "--tasks=books", f"--data={shards}{end}", f"--out={tmp_path}"])
    assert len(trainings) == 1


def test_plots_are_drawn_or_missed_in_one_sentence(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        bench.main([*SMALL, "--plot"])
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(suites.TASKS, "recall", TINY)
    bench.main([*SMALL, "--models=gpt,rmt", "--tasks=books,reach,recall", f"--data={shards}", f"--out={tmp_path}",
                "--plot"])
    drawn = {name: (tmp_path / f"{name}.svg").read_text() for name in ("books", "memory", "recall", "reach")}
    assert all(">rmt" in text for text in drawn.values()) and "tokens back to the answer" in drawn["recall"]
    assert "KL in nats" in drawn["reach"] and not (tmp_path / "reach-gpt-1").exists()      # trained for books
    bench.main([*SMALL, "--models=gpt,rmt", "--tasks=books", f"--data={shards}", f"--out={tmp_path}", "--plot"])
    memory = (tmp_path / "memory.svg").read_text()                     # each of its two halves stands alone, too
    assert "gain over gpt" in memory and ">rmt" in memory and "right answers" not in memory
    assert not (tmp_path / "tasks.svg").exists()                       # one picture of several tasks
    monkeypatch.setitem(suites.TASKS, "recall512", TINY)
    bench.main([*SMALL, "--models=gpt,rmt", "--tasks=recall,recall512", f"--out={tmp_path}", "--plot"])
    assert all(name in (tmp_path / "tasks.svg").read_text() for name in (">rmt", ">gpt", ">recall512"))


def test_the_map_of_a_task_shows_first_who_answers_most_of_what_is_far(tmp_path):
    pytest.importorskip("matplotlib")
    columns = lambda *each: [dict(start=i, end=i + 1, accuracy=a, questions=9) for i, a in enumerate(each)]
    models = dict(near=dict(recall=columns(1, 0.1)), far=dict(recall=columns(0, 0.9)), none=dict(recall=columns(1, 0)))
    pictures.accuracy_map(models, "recall", tmp_path / "recall.svg")
    assert re.findall(r">(near|far|none) ", (tmp_path / "recall.svg").read_text()) == ["far", "near", "none"]


def test_labels_that_would_overlap_are_moved_apart_and_no_others():
    moved = pictures.apart([5.0, 1.0, 1.1, 1.2], 0.5)
    assert moved[0] == 5.0 and (abs(np.diff(sorted(moved))) > 0.499).all() and moved[1] < moved[2] < moved[3]
    assert abs(moved[1:].mean() - 1.1) < 1e-6


def test_a_terminal_that_knows_ascii_only_gets_a_report_too(tmp_path, shards):
    """The table of passages holds a character that ascii does not have."""
    argv = [sys.executable, "bench.py", *SMALL, "--models=gpt", "--tasks=passage", f"--out={tmp_path}", "--device=cpu",
            "--jobs=1"]
    env = dict(os.environ, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    done = subprocess.run(argv, capture_output=True, env=env, cwd=Path(bench.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert "\u00b1" in (tmp_path / "report.md").read_text(encoding="utf-8") and b"0.000 ?" in done.stdout
