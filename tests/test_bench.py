"""bench.py on tiny settings: every task runs, what was trained is used again, and its instruments measure right."""
import json
import os
import signal

import numpy as np
import pytest
import torch

import bench
import nanomem
import train
from nanomem import data, stream
from nanomem.cli import UserError

from conftest import tiny

SMALL = ["--steps=2", "--stream_steps=2", "--layers=1", "--heads=2", "--width=16", "--seg=16",
         "--batch=2", "--segments=2", "--read=2048"]


@pytest.fixture
def shards(tmp_path):
    texts = [(str(i), f"Book {i}. " * (200 * i)) for i in range(1, 5)]
    data.write_shards(tmp_path / "shards", data.tokenizer("bytes"), dict(train=texts[:2], validation=texts[2:]))
    return tmp_path / "shards"


def test_the_whole_bench_runs_and_runs_again_without_training(tmp_path, shards, capsys, monkeypatch):
    argv = [*SMALL, "--models=gpt,xl,rmt", f"--data={shards}", f"--out={tmp_path / 'out'}"]
    assert bench.main(argv) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    text = (tmp_path / "out" / "report.md").read_text()
    for name in ("gpt", "xl", "rmt"):
        model = report["models"][name]
        assert model["depth"]["all"]["loss"] > 0 and model["recall"][0]["questions"] > 0
        assert model["cost"]["decode_growth"] > 0 and f"| {name} " in text
    assert report["models"]["gpt"]["cost"]["state_bytes"] == 0
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    (tmp_path / "out").rename(tmp_path / "moved")
    assert bench.main([*argv, "--tasks=depth,recall", f"--out={tmp_path / 'moved'}"]) == 0
    again = json.loads((tmp_path / "moved" / "report.json").read_text())
    assert all(again["models"][n]["depth"]["all"] == report["models"][n]["depth"]["all"] for n in again["models"])


def test_an_interrupted_bench_goes_on_where_it_stopped(tmp_path, shards, monkeypatch):
    argv = [*SMALL, "--steps=3", "--models=rmt", "--tasks=depth", f"--data={shards}"]
    bench.main([*argv, f"--out={tmp_path / 'whole'}"])
    real, read = data.Loader.next, []

    def next_(self):
        read.append(1)
        if len(read) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self)
    monkeypatch.setattr(data.Loader, "next", next_)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*argv, f"--out={tmp_path / 'parts'}"])
    assert checkpoint.load(tmp_path / "parts" / "depth-rmt-1" / "last.pt", "checkpoint")["step"] == 2
    bench.main([*argv, f"--out={tmp_path / 'parts'}"])
    one, two = (nanomem.load(tmp_path / d / "depth-rmt-1")[0].state_dict() for d in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_side_by_side_is_one_after_the_other(tmp_path, shards):
    argv = [*SMALL, "--models=gpt,rmt", "--tasks=depth,recall", f"--data={shards}"]
    for n in (1, 2):
        bench.main([*argv, f"--out={tmp_path / str(n)}", f"--jobs={n}"])
    one, two = (json.loads((tmp_path / n / "report.json").read_text())["models"] for n in "12")
    assert one == two


def test_settings_of_the_test_need_no_other_training(tmp_path, monkeypatch):
    small = bench.Trial("", "--batch=2 --layers=2 --heads=2 --width=16 --seg=32", 2, 1, "needle:notice=8", rows=32,
                        windows=8, lengths=(1, 2, 65))
    monkeypatch.setitem(bench.TRIALS, "needle", small)
    real, made = train.main, []
    monkeypatch.setattr(train, "main", lambda argv: made.append(argv) or real(argv))
    gca, full = "gca:chunk=8:topk=2", "full"
    bench.main([f"--models={gca},{gca}/retrieval=recent:topk=1,{full}", "--tasks=needle", f"--out={tmp_path}",
                "--jobs=1", "--read=2048"])
    found = json.loads((tmp_path / "report.json").read_text())["models"]
    one, other, all_ = (found[name]["needle"] for name in (gca, f"{gca}/retrieval=recent:topk=1", full))
    assert len(made) == 2 and [r["length"] for r in one] == [r["length"] for r in other] == [32, 64]
    assert one[0]["found"] == 0 or one[0]["found"] != other[0]["found"] and all_[0]["found"] == 0


def test_equal_models_have_as_many_parameters_as_gpt(name):
    b = bench.Bench(equal=True, layers=4, heads=4, width=128, seg=64)
    size = lambda spec: sum(p.numel() for p in bench.model_of(b, spec).parameters())
    assert abs(size(name) / size("gpt") - 1) < 0.03
    assert bench.model_of(b, f"{name}:mlp=64").c.mlp == 64


def test_the_best_learning_rate_of_a_search_is_taken(tmp_path, shards):
    bench.main([*SMALL, "--steps=20", "--models=gpt", "--tasks=depth", f"--data={shards}", f"--out={tmp_path}",
                "--search=0.001,1"])
    tried = json.loads((tmp_path / "report.json").read_text())["models"]["gpt"]["search"]
    assert set(tried) == {"4.0e-06", "4.0e-03"} and tried["4.0e-03"] < tried["4.0e-06"]
    assert nanomem.load(tmp_path / "depth-gpt-1")[1]["run"]["lr"] == 4e-3
    assert nanomem.load(tmp_path / "depth-gpt-1-lr4.0e-06")[1]["run"]["steps"] == 2


def test_a_night_goes_through_in_a_minute(tmp_path, shards, monkeypatch):
    """The whole suite, of a few small models that take a step or two on tiny texts."""
    for task, t in bench.TRIALS.items():
        flags = t.train.replace("width=64", "width=16").replace("width=32", "width=16").replace("batch=64", "batch=2")
        monkeypatch.setitem(bench.TRIALS, task, bench.replace(t, train=flags, rows=8, windows=2, lengths=t.lengths[:2]))
    monkeypatch.setattr(bench, "passages", lambda model, books: [dict(after=0, gain=0.0, interval=0.0)])
    monkeypatch.setattr(bench.replay, "__defaults__", (1, (2, 4), 1))
    argv = [*SMALL, "--suite=night", f"--data={shards}", f"--out={tmp_path}", "--heads=2", "--seg=16", "--seeds=1"]
    assert bench.main([*argv, "--models=gpt,rmt,memformer"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(set(bench.TASKS) < set(r) | {"search", "ages"} for r in report["models"].values())
    assert report["settings"]["equal"] and all(len(r["search"]) == 3 for r in report["models"].values())
    assert "What the papers say" in (tmp_path / "report.md").read_text()


def test_claims_hold_or_not():
    curve = lambda *accuracies: [dict(start=4 * 2 ** i, accuracy=a) for i, a in enumerate(accuracies)]
    models = {"memoryllm": dict(retain=curve(1, 0.9, 0.4, 0.1, 0, 0)),
             "mplus:store=9": dict(retain=curve(1, 1, 1, 1, 1, 1)),
             "mplus:store=9/retrieval=random": dict(retain=curve(0, 0))}
    text = bench.claims(dict(models=models, settings=dict(interleave=1)))[0]
    assert "halves after 16 and inf tokens" in text and "does not hold" not in text
    models["mplus:store=9"] = dict(retain=curve(1, 0.9, 0.8, 0.7, 0.4))
    text = bench.claims(dict(models=models, settings=dict(interleave=1)))[0]
    assert "halves after 16 and 64 tokens" in text and "does not hold" in text
    answers = lambda near, far: dict(mqar=[dict(accuracy=near, questions=30), dict(accuracy=far, questions=70)])
    models = {"mamba:state=8": answers(0.24, 0.24), "hybrid:state=8": answers(1, 0.2),
             "bmojo_f:state=8": answers(1, 0.7), "bmojo:state=8:eidetic=24": answers(1, 1),
             "bmojo:state=8:eidetic=24:select=random": answers(0, 0)}
    text = bench.claims(dict(models=models, settings=dict(interleave=1)))[0]
    assert "24%, 44%, 79%, 100% of all questions; beyond the window 24%, 20%, 70%, 100%" in text
    assert "does not hold" not in text
    models["mamba:state=8"] = answers(0.5, 0.5)
    assert "does not hold" in bench.claims(dict(models=models, settings=dict(interleave=1)))[0]
    for length, says in (65_536, 1), (4096, 0):
        needle = dict(needle=[dict(length=64, accuracy=0.9, found=0.9), dict(length=length, accuracy=1, found=1)])
        claims = bench.claims(dict(models={"gca:chunk=4": needle}, settings=dict(interleave=1)))
        assert len(claims) == says and all("100% right, 100% found in 65,536 tokens" in text for text in claims)
    assert bench.summary(dict(models=models)) == ""       # these tasks have no column in the one table
    assert bench.claims(dict(models=dict(gpt={}), settings=dict(interleave=1))) == []
    assert bench.claims(dict(models=dict(rmt={}, hmt={}), settings=dict(interleave=2))) == []


def test_other_settings_train_anew(tmp_path, shards):
    argv = [*SMALL, "--models=gpt", "--tasks=depth", f"--data={shards}", f"--out={tmp_path / 'out'}"]
    bench.main(argv)
    bench.main([*argv, "--width=32"])
    assert nanomem.load(tmp_path / "out" / "depth-gpt-1")[1]["config"]["width"] == 32


@pytest.mark.parametrize("argv, why", [
    (["--models=gpt,xk"], "--models=xk is none of them: did you mean xl"), (["--tasks=deep"], "did you mean depth"),
    (["--read=10"], "--read=10 is too little"), (["--step=3"], "unknown flag --step: did you mean steps"),
    (["gpt"], "takes only flags"), (["--models=gca/topp=2"], "unknown flag --topp: did you mean topk"),
    (["--models=gca/steps=2"], "unknown flag --steps"), (["--models=mplus/retrieval=best"], "oracle or random, got best"),
    (["--models=rmt/retrieval=random"], "unknown flag --retrieval"),
    (["--models=mplus/retrieval=oracle", "--tasks=passage"], "oracle knows where the answer is in retain, and not in p"),
    (["--suite=day"], "--suite=day is none of them: choose from night"),
    (["--models=gpt:seg=48", "--tasks=mqar"], "gpt:seg=48: texts of 64 tokens are no whole number of segments of 48")])
def test_a_wrong_flag_is_one_sentence(argv, why):
    with pytest.raises(UserError, match=why):
        bench.main(argv)


def test_all_models_join_a_trial_in_segments_that_its_texts_are_longer_than():
    """Texts of mqar go through its own models in one call; what gpt sees in one call must not be all of it."""
    models = bench.models_of(bench.Bench(models="rmt:mem=1,all"), "mqar")
    own = bench.TRIALS["mqar"].models.split(",")
    assert models[:1 + len(own)] == ["rmt:mem=1", *own] and "gpt:seg=16:segments=4" in models
    assert {spec.partition(":")[0] for spec in models} == set(nanomem.MODELS)


def test_plots_are_drawn_or_missed_in_one_sentence(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        bench.main([*SMALL, "--plot"])
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    argv = [*SMALL, "--models=gpt,memformer", "--tasks=depth,recall", f"--data={shards}", f"--out={tmp_path}"]
    bench.main([*argv, "--plot"])
    assert all("<svg" in (tmp_path / f"{t}.svg").read_text() for t in ("depth", "recall", "writing-memformer"))


@torch.no_grad()
def test_depth_scores_every_token_once_and_its_units_agree(tmp_path, shards):
    model = tiny("rmt", vocab=320)
    books = data.open_shards(shards, "validation")
    found = bench.depth(model, data.open_shards(shards, "validation"), bench.Bench(segments=2))
    few = bench.depth(model, data.open_shards(shards, "validation"), bench.Bench(segments=2, upto=100))
    nats = 0.0
    for tokens in books.tokens:                               # the slow way: a book at a time
        ids, state = torch.tensor(tokens.astype(np.int64))[None], model.init_state(1)
        for i in range(0, ids.size(1) - 1, model.c.seg):
            x, y = ids[:, i:i + model.c.seg], ids[:, i + 1:i + 1 + model.c.seg]
            logits, state = model(torch.nn.functional.pad(x, (0, model.c.seg - x.size(1))), state)
            nats += torch.nn.functional.cross_entropy(logits[0, :y.size(1)], y[0], reduction="sum").item()
    n = sum(books.sizes)
    assert few["all"]["tokens"] == 100 * len(books.tokens)
    assert found["all"]["tokens"] == n and abs(found["all"]["loss"] - nats / n) < 1e-4
    assert abs(found["all"]["bits_per_byte"] - nats / n / np.log(2)) < 1e-4     # one byte a token
    assert abs(found["all"]["word_perplexity"] / np.exp(nats / sum(books.words)) - 1) < 1e-3
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(s["tokens"] for s in found["by_position"]) == n


def test_a_model_without_memory_does_not_care_who_takes_turns(shards):
    model = tiny("gpt", vocab=320)
    one, two = (bench.depth(model, data.open_shards(shards, "validation"), bench.Bench(segments=2, interleave=n))
                for n in (1, 2))
    assert abs(one["all"]["loss"] - two["all"]["loss"]) < 1e-6 and one["extra"] == 0
    assert np.allclose(one["all"]["by_book"], two["all"]["by_book"])


def test_a_search_that_looks_at_its_own_book_alone_is_told_from_chance(shards):
    model, b = tiny("hmt", vocab=320, bank=4), bench.Bench(data=str(shards), segments=2, interleave=2)
    books = data.open_shards(shards, "validation")
    blind = tiny("hmt", vocab=320, bank=4, search="uniform")
    found = bench.strangers(blind, books, b)
    assert abs(found["own"] - found["chance"]) < 1e-6 and 0.4 < found["chance"] <= 0.5
    model.weights = lambda state, tokens=None: torch.eye(4)[2].expand(len(state["n"]), model.c.M, 4)   # two segments ago
    assert bench.strangers(model, books, b)["own"] == 1
    b.turn, b.segments = 2, 4
    assert bench.strangers(model, books, b)["own"] == 0                # two segments ago it was the other's turn


def test_slots_that_keep_themselves_are_counted(shards):
    model, books = tiny("memformer", vocab=320, seg=16), data.open_shards(shards, "validation")
    for kept, retain in ((0.9, 1), (0.5, 0), (0.1, 0)):
        model.weights = lambda x, state: torch.full((len(x), 2, model.c.M, 17), kept)
        found = bench.writing(model, books, bench.Bench(segments=2), windows=2)
        assert len(found) == 4 and all(f["retain"] == retain and f["overwrite"] == (kept < 0.3) for f in found)


def test_nobody_is_scored_where_one_model_has_seen_the_target(shards):
    books, S = data.open_shards(shards, "validation"), 16
    b = bench.Bench(data=str(shards), segments=2, seg=S, models="gpt,hmt:query=paper")
    for x in bench.losses_of(tiny("gpt", vocab=320, seg=S), books, b):
        assert (np.isnan(x) == (np.arange(len(x)) % S < S // 2 - 1)).all()


def test_live_bytes_counts_what_is_alive_at_once():
    before = torch.ones(1000)
    with bench.LiveBytes() as live:
        before[10:].view(-1)
        a = torch.ones(256)
        b = a + 1
        b.view(16, 16)
        del a
        c = b * 2
    assert live.peak == 2 * 1024 and live.now == 2 * 1024 and c.numel()


@pytest.mark.parametrize("name", nanomem.MODELS)
def test_replay_holds_one_segment_however_many_there_are(name):
    """Peak bytes of a step: flat in K for replay but for states and tokens, growing for back-propagation."""
    def peak(walk, K):
        step = bench.training_step(tiny(name), 4, K, walk)
        step()
        with bench.LiveBytes() as live:
            step()
        return live.peak
    assert peak(stream.bptt, 16) > 2 * peak(stream.bptt, 4)
    model = tiny(name)
    kept = 4 * (stream.nbytes(model.init_state(1)) + 8 * model.c.seg)     # of 4 rows, for a segment: state and token ids
    assert peak(stream.replay, 16) - peak(stream.replay, 4) <= 12 * kept * 1.1


def test_the_three_ways_of_replay_stand_in_one_table_beside_the_papers():
    found = bench.replay(tiny("memformer", mem=4, layers=1, vocab=640), through=(2, 4, 16), rounds=1)
    peak = {way: [x["peak"] for x in rows] for way, rows in found.items()}
    assert [x["K"] for x in found["bptt"]] == [2, 4, 16] and all(x["ms"] > 0 for r in found.values() for x in r)
    assert peak["bptt"][-1] > 3 * peak["bptt"][1]
    assert peak["replay"][-1] < 1.05 * peak["replay"][1] and peak["checkpoint"][-1] < 1.05 * peak["checkpoint"][1]
    text, = bench.replay_table({"memformer": found})
    assert text.count("| memformer |") == text.count("| the paper |") == 3 and "0.45x, 1.11x" in text
    assert bench.replay_table({}) == []


def test_the_plain_model_is_as_large_as_gpt():
    c = nanomem.build("gpt").c
    size = lambda m: sum(p.numel() for p in m.parameters())
    gpt, plain = nanomem.build("gpt"), bench.Plain(c)
    assert plain(torch.zeros(2, c.seg, dtype=torch.long), {})[0].shape == (2, c.seg, c.vocab)
    assert abs(size(gpt) - gpt.head.weight.numel() - size(plain)) < 0.05 * size(gpt)   # it ties its head


@pytest.mark.parametrize("error, said", [(UserError("the loss is nan in step 2"), "the loss is nan in step 2"),
                                         (torch.OutOfMemoryError("no memory"), "OutOfMemoryError: no memory")])
def test_a_job_that_fails_does_not_cost_the_others(error, said, tmp_path, monkeypatch):
    real = train.main

    def main(argv):
        if "--model=rmt" in argv:
            raise error
        return real(argv)
    monkeypatch.setattr(train, "main", main)
    argv = [*SMALL, "--tasks=recall,cost", f"--out={tmp_path}", "--jobs=1"]
    with pytest.raises(UserError, match=f"not all of it could be measured: recall of rmt: {said}$"):
        bench.main([*argv, "--models=rmt,gpt"])
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert set(models["gpt"]) - set(models["rmt"]) == {"recall"}
    assert all(f"\n| {name} " in (tmp_path / "report.md").read_text() for name in ("gpt", "rmt"))
    with pytest.raises(UserError, match=f"^recall of rmt: {said}$"):      # and nothing is no report
        bench.main([*argv, "--tasks=recall", "--models=rmt"])


def test_a_process_that_is_killed_is_named_too():
    results = [result for _, result in bench.side_by_side(os._exit, [(1,), (1,)], 2)]
    assert all(isinstance(r, UserError) and str(r).startswith("BrokenProcessPool: ") for r in results)


def test_names_with_spaces_and_none_mean_all():
    assert bench.models_of(bench.Bench(), "depth") == list(nanomem.MODELS)
    assert bench.models_of(bench.Bench(models="gpt, rmt:mem=2"), "depth") == ["gpt", "rmt:mem=2"]
    assert bench.models_of(bench.Bench(models="all, rmt:mem=2"), "depth") == [*nanomem.MODELS, "rmt:mem=2"]


@pytest.mark.parametrize("task", bench.TASKS)
def test_a_night_has_every_model_in_every_task_and_each_can_be_built(task):
    b = bench.Bench(**bench.SUITES["night"])
    specs = bench.models_of(b, task)
    assert {bench.parts_of(spec)[0] for spec in specs} == set(nanomem.MODELS)
    if task in bench.TRIALS:
        assert specs[:2] == bench.models_of(bench.Bench(), task)[:2], "those that the task was made for come first"
        for spec in specs:
            run, fields = train.flags([f"--model={bench.parts_of(spec)[0]}", *bench.trial_of(b, task).train.split()])
            nanomem.build(run["model"], **{**fields, **bench.fields_of(spec), "vocab": 64})


@pytest.mark.parametrize("models, why", [
    ("rmt:slots=1", "unknown flag --slots"), ("rmt:mem", "settings follow a name as :field=value, got :mem"),
    ("rmt:mem=x", "takes a whole number")])
def test_a_wrong_setting_is_one_sentence(models, why):
    with pytest.raises(UserError, match=why):
        bench.main([f"--models={models}"])


def test_settings_make_a_model_of_their_own(tmp_path, shards):
    argv = [*SMALL, "--models=rmt,rmt:mem=1", "--tasks=depth,recall", f"--data={shards}", f"--out={tmp_path}"]
    bench.main([*argv, "--seeds=2"])
    found = json.loads((tmp_path / "report.json").read_text())["models"]
    assert found["rmt:mem=1"]["depth"]["parameters"] == found["rmt"]["depth"]["parameters"] - 16 * 3
    cell = found["rmt"]["recall"][0]
    assert len(cell["each"]) == 2 and abs(sum(cell["each"]) / 2 - cell["accuracy"]) < 1e-9


@pytest.mark.parametrize("pairs", [2, 8, 16, 32, 64])
def test_every_number_of_pairs_fits_into_its_texts(pairs):
    t = bench.trial_of(bench.Bench(pairs=pairs), "recall")
    for name, segments in ((t.data or "recall", t.segments), (t.test, t.lengths[0])):
        batch = tasks.TaskLoader(name, 2, 8 * pairs * segments).next()
        assert (batch.y >= 0).any(1).all() and batch.distance.max() < t.edges[-1]


def test_memory_is_worth_nothing_where_there_is_none(shards):
    worth = {n: bench.depth(tiny(n, vocab=320), data.open_shards(shards, "validation"), bench.Bench(segments=2))
             ["all"]["memory"] for n in ("gpt", "xl")}
    assert worth["gpt"] == 0 and abs(worth["xl"]) > 1e-3


def test_a_passage_helps_as_long_as_it_can_be_seen(shards):
    """gpt sees no earlier segment; two layers of a window that is a segment long see two of them, and no further."""
    books = data.open_shards(shards, "validation")
    gains = {n: [s["gain"] for s in bench.passages(tiny(n, vocab=320, seg=16), books, 8, (0, 1, 2, 4))]
             for n in ("gpt", "window", "rmt")}
    assert gains["gpt"] == [0, 0, 0, 0] and gains["window"][0] != 0 and gains["window"][2:] == [0, 0]
    assert all(gains["rmt"])


def test_the_ages_of_eidetic_tokens():
    """An oracle keeps only the letter Z, and that stands at the beginning of the books."""
    books = data.from_texts(data.tokenizer("bytes"), [(str(i), "Z" * 40 + "no surprise " * 800) for i in range(2)])
    model = tiny("bmojo", vocab=320, select=f"{ord('Z')}-{ord('Z') + 1}", eidetic=8, seg=64)
    found = bench.ages(model, books, bench.Bench(segments=4))
    assert [s["share"] for s in found] == [0, 0, 0, 1]
    found = bench.ages(tiny("bmojo", vocab=320, select="random", eidetic=8, seg=64), books, bench.Bench(segments=4))
    assert sum(s["share"] for s in found) == pytest.approx(1) and 0 < found[-1]["share"] < 1


def test_an_oracle_finds_what_was_told_and_chance_does_not():
    """M+ that is asked to bring the K vectors of one write brings those of the write in which the fact stood."""
    model = tiny("mplus", seg=4, rows=2, slots=4, store=64, found=2, ask="self", query=1).eval()
    batch = tasks.TaskLoader("retain", 3, 64, seed=1).next()
    told, right = {}, dict(oracle=0, random=0)
    for way in right:
        bench.as_oracle(model, batch) if way == "oracle" else bench.at_random(model)
        state = model.init_state(3)
        begin, told[way] = state["step"], 0
        for i, x in enumerate(batch.x.split(4, 1)):
            then = (4 * i - batch.distance[:, 4 * i]) // 4
            best = model.score(0, None, state).masked_fill(state["old_birth"][:, 0] < 0, -1).topk(2)[1]
            writes = state["old_birth"][:, 0].gather(1, best) // 2 - begin[:, None]
            there = ((state["old_birth"][:, 0] // 2 - begin[:, None]) == then[:, None]).sum(1) == 2
            asked = (batch.y[:, 4 * i] >= 0) & there
            right[way] += (writes[asked] == then[asked, None]).all(1).sum().item()
            told[way] += asked.sum().item()
            state = model(x, state)[1]
    assert right["oracle"] == told["oracle"] > 3 and right["random"] < told["random"]


def test_an_interval_holds_the_mean_and_none_is_left_when_the_books_agree():
    theirs = [[10.0 * n, n] for n in (5, 7, 100)]
    mean, low, high = bench.interval([[nats - n / 2, n] for nats, n in theirs], theirs)
    assert mean == low == high == -0.5
    mean, low, high = bench.interval([[nats + d, n] for (nats, n), d in zip(theirs, (9, -9, 3))], theirs)
    assert low < mean < high and abs(mean - 3 / 112) < 1e-12
