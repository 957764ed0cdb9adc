"""Compare the models: train what is missing, measure, and print tables.

    python bench.py                                         every model, on recall, and what it costs: ten minutes
    python bench.py --models=gpt,rmt --tasks=books,cost     any part of it
    python bench.py --models=rmt,rmt:mem=1:lr=1e-3,gca/topk=8
    python bench.py --tasks=books --data=data/pg19 --steps=5000
    python bench.py --suite=night --data=data/pg19          everything, with 30M parameters: a night on one GPU
    python bench.py --suite=night --data=data/pg19 --minutes=10          the next ten minutes of it
    python bench.py --suite=night --data=data/pg19 --dry --speed=100000  what it will do, and how long that takes

Settings of a model or of train.py follow the model's name, and settings behind a slash are changed only for the test.
A name alone gets the settings that the task has for it, such as segments so short that it needs its memory.
The path of a file is a model too: --models=rmt,homework/rmt.py:mem=1.

    books     loss of the held-out books by position; how much it increases without memory, or with another book's
    passage   how much easier a passage is when it was read before, some segments of another book ago
    reach     how far back predictions depend on the text: how much one changed token moves them, by distance
    rates     the loss of the held-out books after a tenth of the steps, with multiples of the learning rates (--search)
    recall, recall2, recall32, recall512, recall_bytes, delayed, mqar, noise, needle, needle1k, hops, retain
              accuracy on synthetic tasks, by the distance to the answer or by the length of the text
    cost      training speed, time to read and to decode, and bytes, as the text grows
    race      time to the same loss against nanoGPT's model and recipe, both trained in turn
    replay    bytes and time of back-propagation through K segments: plain, with checkpoints, by memory replay

Each task, model and seed has one small file of results, OUT/results/TASK-MODEL-SEED.json. What is there with the same
settings is not measured again, so a comparison can be interrupted, or divided among machines: copy the files together.
--report makes the report of what is there and trains nothing; --overwrite does all again, for a model that has changed.
"""
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

import nanomem
import train
from nanomem import checkpoint, claims, cli, cost, data, measure, pictures, reach, report, stream, suites, tasks
from nanomem.cli import UserError
from nanomem.jobs import Job, TimeUp, describe, file_of, halves, read_result, relative_speeds, run_all, write_result
from nanomem.suites import BYTES, TASKS, VOCAB


@dataclass
class Bench(suites.Suite):
    suite: str = "laptop"        # laptop or night: night has other defaults
    data: str = ""               # shards with the books; without it the embedded Moby-Dick
    final: bool = False          # measure on the test books: once, when everything is decided
    out: str = ""                # folder for checkpoints, results and report (without it out/bench, out/night)
    overwrite: bool = False      # train and measure again what is there already
    device: str = ""             # cpu, cuda, mps
    jobs: int = 0                # trainings side by side, one thread each; 0: on a CPU one for each core, else 1
    plot: bool = False           # draw pictures of books, tasks and cost (needs matplotlib)
    minutes: float = 0           # stop after so many minutes, the same command goes on; 0: when all is done
    report: bool = False         # train and measure nothing: only the report of what is there
    dry: bool = False            # only print what would be done, in which order
    speed: float = 0             # tokens a second of gpt's training on books, from which --dry estimates minutes


# ----------------------------------------------------------------------------------------------------------------------
# Models as they are typed

def parts_of(model):
    """"gca:chunk=16/topk=8" -> its name, the settings with which it is trained, and those changed for the test."""
    trained, tested = halves(model)
    return *cli.variant(trained), cli.variant(f"/:{tested}")[1] if tested else {}


OURS = ("model", "data", "out", "seed", "resume", "overwrite", "minutes", "eval_batches", "eval_interval")


def fields_of(model, tested=False):
    """The fields of the model's Config among its settings. Refuses what neither the model nor train.py knows."""
    name, trained, changed = parts_of(model)
    for k in trained:
        if k in OURS:
            raise UserError(f"{model}: {k} is not a setting of one model, bench.py sets it for all: --{k}")
    flags = [f"--{k}={v}" for k, v in (changed if tested else trained).items()]
    return cli.parse(flags, nanomem.model_class(name).Config, *([] if tested else [train.Run]))[0][0]


def models_of(b, task):
    """The models of a task, after making sure that each exists, and that its settings do."""
    t = TASKS.get(task)
    made_for = list(t.models) if t else dict(replay=["memformer"], race=["gpt"]).get(task, [])
    others = [name for name in nanomem.MODELS if name not in {parts_of(model)[0] for model in made_for}]
    usual = t.others if t else ""
    every = made_for + [name + usual for name in others]

    def in_full(word):   # a name alone has the usual settings
        trained, tested = halves(word)
        alone = ":" not in trained and trained not in made_for
        return trained + usual + f"/{tested}" * bool(tested) if alone else word
    typed = [word.strip() for word in b.models.split(",") if word.strip()]
    models = [m for word in typed for m in (every if word == "all" else [in_full(word)])] or made_for or every
    models = list(dict.fromkeys(models))                       # --models=gpt,all names gpt twice
    if task == "rates":   # a model with a rate of its own needs no search
        models = [model for model in models if "lr" not in parts_of(model)[1]]
    for model in models:
        name = parts_of(model)[0]
        if name not in nanomem.MODELS and not name.endswith(".py"):
            raise UserError(f"--models={name} is none of them: {cli.nearest(name, list(nanomem.MODELS))}")
        fields = {**fields_of(model), **fields_of(model, tested=True)}
        if t and min(t.tests) % fields.get("seg", t.train["seg"]):
            raise UserError(f"{model}: texts of {min(t.tests)} tokens are not whole segments of {fields['seg']}")
    return models


SHAPE = ("layers", "heads", "width", "seg")


@cache
def size_of(name, **fields):
    """Number of parameters of a model; nothing is computed."""
    with torch.device("meta"):
        return measure.parameters(nanomem.build(name, **{"vocab": VOCAB, **fields}))


def equal_mlp(b, model, shape):
    """{"mlp": its width}, for a model that would not have as many parameters as gpt, within 3%, and has with that MLP:
    the number of parameters grows with the width of the MLP in a straight line. Else {}."""
    name, fields, width = parts_of(model)[0], {**shape, **fields_of(model)}, shape["width"]
    if not b.equal or "mlp" in fields:
        return {}
    gpt, four, two = size_of("gpt", **shape), size_of(name, **fields), size_of(name, **fields, mlp=2 * width)
    if abs(four / gpt - 1) <= 0.03 or four == two:
        return {}
    return dict(mlp=max(8, round((4 - 2 * (four - gpt) / (four - two)) * width / 8) * 8))


def shape_of(b, model):
    """The fields of a model that reads books."""
    shape = {k: getattr(b, k) for k in SHAPE}
    return {**shape, **equal_mlp(b, model, shape)}


def untrained(b, model, vocab=VOCAB):
    """A new model of the size that reads books."""
    fields = {**shape_of(b, model), "vocab": vocab, **fields_of(model), **fields_of(model, tested=True)}
    return nanomem.build(parts_of(model)[0], **fields)


# ----------------------------------------------------------------------------------------------------------------------
# A job: its settings, its training, its result

def flags_of(b, job):
    """The flags of train.py for a training."""
    name, settings, _ = parts_of(job.model)
    if job.task in TASKS:
        flags = TASKS[job.task].flags(settings, b.task_steps)
        flags.update(equal_mlp(b, job.model, {k: flags[k] for k in SHAPE}))
    else:
        same = ("data", "steps", "batch", "segments", "interleave", "interleave_len", "lr", "muon")
        flags = dict({k: getattr(b, k) for k in same}, **shape_of(b, job.model), **({} if b.data else BYTES))
    flags.update(settings, model=name, seed=job.seed, eval_batches=4)
    return [f"--{k}={v}" for k, v in {**flags, "eval_interval": flags["steps"]}.items()]


def settings_of(b, job):
    """All settings on which the result of a job depends."""
    if job.training is None:
        found = dict(shape_of(b, job.model), batch=b.batch, segments=b.segments, read=b.read, compile=b.compile)
        if job.task == "race":
            found.update(steps=b.steps, data=b.data)
    elif job.task in TASKS:
        t = TASKS[job.task]
        found = dict(tests=t.tests_for(parts_of(job.model)[0], b.read), texts=t.texts, edges=t.edges)
        if t.long_texts:
            found["fewest"] = t.fewest
    else:
        found = dict(search=b.search, final=b.final)
    if job.task == "books":   # no model is scored where one of them has seen the target
        models = [model for model in models_of(b, "books") if model not in nanomem.MODELS]
        found.update(upto=b.upto, not_scored=[model for model in models if not untrained(b, model).scored().all()])
    if job.training:
        found["train"] = " ".join(flags_of(b, job.training))
    if code := nanomem.code_of(parts_of(job.model)[0]):      # a student's file changes, and keeps its name
        found["code"] = code
    return json.loads(json.dumps(found))


@cache
def hash_of_books(folder, split, tokenizer=BYTES["tokenizer"]):
    """A checksum of the books, "" for a task."""
    return "" if tasks.is_task(folder) else data.open_books(folder, split, tokenizer).fingerprint()


def books_of(b, job):
    """Checksums of the books that a job is about, None where there are none or they are not here."""
    if job.task in TASKS or job.task in ("cost", "replay"):
        return None
    with contextlib.suppress(UserError):
        return [hash_of_books(b.data, split) for split in ("train", "test" if b.final else "validation")]


NO_EFFECT = ("device", "log_interval", "eval_interval", "eval_batches", "minutes")    # on the weights


def checkpoint_of(flags, out, until=math.inf, overwrite=False):
    """The checkpoint that train.py makes with these flags: of an earlier run, of the rest of one, or of a new one, as
    always with `overwrite`. Raises TimeUp if it is not there at the time `until`: what there is then is saved. Raises
    UserError where a training with other flags would be lost."""
    typed, fields = train.parse(flags)
    last, extra, saved = out / "last.pt", "--overwrite", None
    if last.exists() and not overwrite:
        with contextlib.suppress(UserError):           # a damaged file is no loss
            saved = checkpoint.load(last, "checkpoint")
    if saved and saved.get("code", "") == nanomem.code_of(typed["model"]):     # else a student's file has changed
        was = {**saved["run"], **saved["config"], "books": saved["data_hash"]}
        now = {k: v for k, v in {**typed, **fields}.items() if k not in NO_EFFECT}
        now["books"] = hash_of_books(typed["data"], "train", typed.get("tokenizer", BYTES["tokenizer"]))
        for k, v in now.items():
            if was.get(k) != v:
                what = "with other books" if k == "books" else f"with --{k}={was.get(k)}, not {v}"
                raise UserError(f"{out} holds a training {what}: add --overwrite to replace it, or choose another "
                                "--out")
        if saved["step"] == typed["steps"]:
            return saved
        extra = "--resume"
    minutes = min((until - time.time()) / 60, 1e6)
    if minutes <= 0:
        raise TimeUp
    with contextlib.redirect_stdout(io.StringIO()):    # what it prints is in log.csv too
        if train.main([*flags, f"--out={out}", f"--minutes={minutes}", extra]):
            raise KeyboardInterrupt
    saved = checkpoint.load(last, "checkpoint")
    if saved["step"] < typed["steps"]:
        raise TimeUp
    return saved


def searched(b, training):
    """{x: the Bench with x times its learning rates, for a tenth of the steps}, for a training with --search."""
    if training.task != "books" or not b.search or "lr" in parts_of(training.model)[1]:
        return {}
    return {x: replace(b, steps=max(1, b.steps // 10), lr=b.lr * float(x), muon=b.muon * float(x))
            for x in b.search.split(",")}


def only_rates(group):
    """Whether the short trainings of the search are all that these jobs need."""
    return all(job.task == "rates" for job in group)


def train_for(b, group, until):
    """Train for jobs that need the same training; with --search, at the best of the learning rates. Returns the
    checkpoint, the loss on held-out text of each rate that was tried, and the seconds of all trainings."""
    training, device = group[0].training, [f"--device={b.device}"] if b.device else []
    out, tried, saved, seconds = Path(b.out) / str(training), {}, None, 0
    for x, short in searched(b, training).items():
        flags = [*flags_of(short, training), "--eval_batches=16", *device]
        try:
            one = checkpoint_of(flags, Path(f"{out}-x{x}"), until, b.overwrite)
            tried[x], seconds = one["best"], seconds + one["seconds"]
        except train.Diverged:                         # a rate that is too high
            tried[x] = math.inf
    if not only_rates(group):
        best = float(min(tried, key=tried.get)) if tried else 1
        flags = [*flags_of(replace(b, lr=b.lr * best, muon=b.muon * best), training), *device]
        saved = checkpoint_of(flags, out, until, b.overwrite)
        seconds += saved["seconds"]
    return saved, tried, seconds


def tokens_of(b, group):
    """Tokens that are trained on for jobs that need the same training, those of the search too."""
    total = 0
    for one in (*searched(b, group[0].training).values(), *([] if only_rates(group) else [b])):
        run, fields = train.parse(flags_of(one, group[0].training))
        total += run["steps"] * run["batch"] * run["segments"] * fields["seg"]
    return total


def measured(b, job, saved, tried):
    """What measure.py says about a job, given its checkpoint and the learning rates that were tried."""
    device, dtype, _ = stream.machine(b.device)
    if job.task == "cost":
        after = sorted({n for n in suites.READ if n < b.read} | {b.read})
        return cost.cost(untrained(b, job.model).to(device), b.batch, b.segments, after, b.compile, dtype)
    if job.task == "race":
        tokenizer = BYTES["tokenizer"]
        books, held_out = (data.open_books(b.data, split, tokenizer) for split in ("train", "validation"))
        new = untrained(b, job.model, -(-books.enc.n_vocab // 64) * 64)
        return cost.race(new.to(device), books, held_out, b.steps, b.batch, b.segments, dtype=dtype)
    if job.task == "rates":
        return tried
    if job.task == "replay":
        return cost.replay(untrained(b, job.model).to(device), suites.REPLAY_SEGMENTS)
    last = Path(b.out) / str(job.training) / "last.pt"
    load = lambda **more: nanomem.load(last, **{**fields_of(job.model, tested=True), **more})[0].to(device).eval()
    model = load()
    if job.task in TASKS:
        t, found = TASKS[job.task], []
        for T, test in t.tests_for(parts_of(job.model)[0], b.read).items():
            sized = load(**model.for_length(T)) if t.long_texts else model
            texts = max(t.fewest, t.texts * min(t.tests) // T)
            found += measure.accuracy(sized, test, T, texts, t.batch, t.edges)
        return found
    tokenizer = saved["run"]["tokenizer"]
    books = data.open_books(b.data, "test" if b.final else "validation", tokenizer)
    if job.task == "passage":
        return measure.passage(model, books)
    if job.task == "reach":
        return reach.reach(model, books)
    like = [untrained(b, other).to(device) for other in settings_of(b, job)["not_scored"]]
    return dict(measure.loss_by_position(model, books, suites.POSITIONS, 4 * b.batch, b.upto, b.interleave, like=like,
                                         segments=b.segments, interleave_len=b.interleave_len,
                                         training=data.open_books(b.data, "train", tokenizer)), search=tried)


def work(b, group, command, until):
    """Train once for jobs that need the same training, measure each, and write its result. Raises TimeUp, or what the
    first job raised that failed, with its name, when the others are done."""
    saved, tried, seconds = train_for(b, group, until) if group[0].training else (None, {}, 0)
    failed = None
    for job in group:
        if time.time() > until:
            raise TimeUp
        torch.manual_seed(job.seed)
        start = time.perf_counter()
        try:
            found = measured(b, job, saved, tried)
        except Exception as error:
            error.job, failed = job, failed or error
            continue
        books = books_of(b, job)
        write_result(b.out, job, settings=settings_of(b, job), **(dict(books=books) if books else {}), command=command,
                     torch=torch.__version__, machine=cost.machine_name(stream.machine(b.device)[0]),
                     train_minutes=seconds / 60, minutes=(time.perf_counter() - start) / 60, measured=found)
    if failed:
        raise failed


def options(argv):
    """The command line as a Bench, and its tasks in the order of the report."""
    (typed,), words = cli.parse(argv, Bench)
    suite = typed.get("suite", Bench.suite)
    out = "out/bench" if suite == Bench.suite else f"out/{suite}"
    b = Bench(**{"out": out, **suites.SUITES.get(suite, {}), **typed})
    names = [word.strip() for word in b.tasks.split(",") if word.strip()]
    if words:
        raise UserError(f"bench.py takes only flags, got {words[0]}")
    for flag, words, known in ("suite", [suite], suites.SUITES), ("tasks", names, (*suites.ORDER, "all")):
        for word in words:
            if word not in known:
                raise UserError(f"--{flag}={word} is none of them: {cli.nearest(word, list(known))}")
    if b.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if "rates" in names and not b.search:
        raise UserError("--tasks=rates needs what to multiply the learning rates with: --search=0.5,1,2")
    if b.search and not all(re.fullmatch(r"\d*\.?\d+", x) and float(x) for x in b.search.split(",")):
        raise UserError(f"--search={b.search} is no list of numbers with commas between them, such as --search=0.5,1,2")
    for flag, least in dict(seeds=1, jobs=0, batch=1, segments=1, steps=1, task_steps=0, upto=0,
                            read=2048).items():                 # read: cost is compared with that after 1,024 tokens
        if getattr(b, flag) < least:
            raise UserError(f"--{flag}={getattr(b, flag)} is too little: at least {least}")
    if b.data and not tasks.is_task(b.data):
        b.data = os.path.normpath(b.data)                           # data/mine/ is data/mine
    return b, [task for task in suites.ORDER if task in names or "all" in names and (b.search or task != "rates")]


def plan(b, groups):
    """Print what is left to do, in order: parameters, training tokens, and minutes of training where they can be known:
    on books, from --speed and from how fast a model was in an earlier `cost`, compared with gpt."""
    measured_here, rows, minutes = Path(b.out) / "results", [], []
    folder = measured_here if any(measured_here.glob("cost-gpt-*")) else Path(__file__).parent / ".github" / "results"
    speeds = relative_speeds(folder)
    for group in groups:
        model, training = group[0].model, group[0].training
        row = [f"{', '.join(job.task for job in group)} of {model}", group[0].seed]
        if training:
            run, fields = train.parse(flags_of(b, training))
            task, tokens = tasks.is_task(run["data"]), tokens_of(b, group)
            vocab = tasks.vocab_of(run["data"]) if task else vocab_of(b.data)
            row += [size_of(run["model"], **{"vocab": -(-vocab // 64) * 64, **fields}), tokens]
            if b.speed and not task and model in speeds:
                row.append(tokens / b.speed / speeds[model] / 60)
                minutes.append(row[-1])
        rows.append(row)
    cells = [[*row[:2], *[f"{n / 1e6:.2f}M" for n in row[2:4]], *[f"{m:.0f}" for m in row[4:]]] for row in rows]
    print(report.table(["what", "seed", "parameters", "training tokens", "minutes"], cells))
    print(f"\n{len(rows)} are left, with {sum(sum(row[3:4]) for row in rows) / 1e6:,.1f}M training tokens.")
    if minutes:
        print(f"The trainings on books need {sum(minutes):,.0f} minutes, {math.ceil(sum(minutes) / 10)} pieces of "
              f"--minutes=10, if the models are as fast beside gpt as in {os.path.relpath(folder)}. What is measured "
              "after a training, and the small trainings on tasks, come on top.")


@cache
def vocab_of(folder):
    """The size of the vocabulary of the books."""
    return data.open_books(folder, "train", BYTES["tokenizer"]).enc.n_vocab


ON_BOOKS = ("books", "passage", "reach", "rates", "race")


def check_books(b, jobs):
    """Rather before the trainings than after: are the books there, and would a result on the test books be lost, or one
    on the validation books?"""
    for split in ("train", "test" if b.final else "validation"):
        data.open_books(b.data, split, BYTES["tokenizer"])
    for job in jobs:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            was = json.loads(file_of(b.out, job).read_text())["settings"]["final"]
            if was != b.final and not b.overwrite:
                raise UserError(f"{file_of(b.out, job)} was measured {'with' if was else 'without'} --final: add "
                                "--overwrite to replace it, or choose another --out")


def main(argv):
    b, names = options(argv)
    switches = ("--report", "--overwrite")
    command = " ".join(["python bench.py", *[word for word in argv if not word.startswith(switches)]])
    seeds = range(b.seed, b.seed + b.seeds)
    jobs = [Job(task, model, seed) for task in names for model in models_of(b, task)
            for seed in (seeds[:1] if task in ("cost", "replay") else seeds)]
    if not jobs:
        raise UserError("nothing to do: --tasks=rates is for models without a learning rate of their own")
    result = lambda job: read_result(b.out, job, settings_of(b, job), books_of(b, job))
    left = [job for job in jobs if b.overwrite or not result(job)]
    left.sort(key=lambda job: (job.seed, names.index(job.task), job.model not in suites.FIRST))
    groups = {}                                                          # the jobs that need the same training
    for job in left:
        groups.setdefault(job.training or job, []).append(job)
    on_books = [job for job in left if job.task in ON_BOOKS]
    if on_books and not b.report:
        check_books(b, on_books)
    if b.dry:
        plan(b, groups.values())
        return 0
    if b.report:
        groups = {}
    until = time.time() + 60 * (b.minutes or math.inf)
    n = b.jobs or (torch.get_num_threads() if stream.machine(b.device)[0].type == "cpu" else 1)
    calls, alone = [(b, group, command, until) for group in groups.values()], []
    if n > 1:                                                            # what is timed is alone on the machine
        calls, alone = ([call for call in calls if bool(call[1][0].training) == side] for side in (True, False))
    failed = []
    with tqdm(total=len(groups), unit="job", disable=not groups) as bar:
        for (_, group, *_), error in chain(run_all(work, calls, n), run_all(work, alone, 1)):
            if error and not isinstance(error, TimeUp):
                (said, where), job = describe(error), getattr(error, "job", group[0])
                failed.append(f"{job.task} of {job.model}: {said}")
                bar.write(f"warning: {failed[-1]}\n{where}", sys.stderr)
            bar.set_description(group[-1].model)
            bar.update(not isinstance(error, TimeUp))

    results = [found for job in jobs if (found := result(job))]
    without = "".join(f" without {switch}" for switch in switches if getattr(b, switch[2:]))
    rest = f"{len(results)} of {len(jobs)} jobs are done: the same command{without} goes on"
    if not results:
        if failed:
            raise UserError(failed[0])
        print(rest)
        return 0
    head, models = report.head(results, command), report.collect(results)
    here = f"; here {b.task_steps} steps" * (b.task_steps > 0)
    about = {k: f"{t.about}{here}; chance {1 / tasks.VALUES:.0%}" for k, t in TASKS.items()}
    tables = "\n\n".join(filter(None, [report.tables(models, about), *claims.claims_table(models)]))
    text = f"```\n{head}\n```\n\n{tables}\n"
    checkpoint.write_whole(Path(b.out, "report.md"), lambda scratch: scratch.write_text(text, encoding="utf-8"))
    print(f"\n{head}\n\n{tables}\n")
    print(f"written to {b.out}:", ", ".join(["report.md", *(pictures.draw(models, TASKS, b.out) if b.plot else [])]))
    if failed:
        raise UserError(f"not all of it could be measured: {'; '.join(failed)}")
    if len(results) < len(jobs):
        print(rest)
    elif not b.report and len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} results were there already: --overwrite measures them again, "
              "as you will want to if you have changed a model")
    return 0


if __name__ == "__main__":
    cli.run(main)
