"""Compare the models: train what is missing, measure, and print tables.

    python bench.py                                         every model, on recall, and what it costs: ten minutes
    python bench.py --models=gpt,rmt --tasks=books,cost     any part of it
    python bench.py --models=rmt,rmt:mem=1:lr=1e-3,gca/topk=8
    python bench.py --tasks=books --data=data/pg19 --steps=5000
    python bench.py --suite=night --data=data/pg19          most of it, with 30M parameters: a night on one GPU
    python bench.py --suite=night --data=data/pg19 --minutes=10          the next ten minutes of it
    python bench.py --suite=night --data=data/pg19 --dry --speed=100000  what it will do, and how long that takes

Settings of a model or of train.py follow the model's name, and settings behind a slash are changed only for the test.
A name alone gets the settings that the task has for it, such as segments so short that it needs its memory.
The path of a file is a model too: --models=rmt,homework/rmt.py:mem=1.

    books     loss of the held-out books by position; how much it increases without memory, or with another book's
    passage   how much easier a passage is when it was read before, some segments of another book ago
    reach     how far back predictions depend on the text: how much one changed token moves them, by distance
    rates     the loss of the held-out books after a tenth of the steps, with multiples of the learning rates (--search)
    recall, recall2, recall32, recall512, recall_bytes, delayed, mqar, noise, needle, needle8, needle1k, hops, retain
              accuracy on synthetic tasks, by the distance to the answer or by the length of the text
    cost      training speed, time to read and to decode, and bytes, as the text grows
    race      time to the same loss against nanoGPT's model and recipe, both trained in turn
    replay    bytes and time of back-propagation through K segments: plain, with checkpoints, by memory replay

Each task, model and seed has one small file of results, OUT/results/TASK-MODEL-SEED.json. What is there with the same
settings is not measured again, so a comparison can be interrupted, or divided among machines: copy the files together.
--report makes the report of what is there and trains nothing. --overwrite removes what is there and does it all again,
for a model that has changed.
"""
import contextlib
import importlib.util
import io
import math
import os
import re
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

import nanomem
import train
from nanomem import checkpoint, claims, cli, cost, data, pictures, report, stream, suites
from nanomem.cli import UserError
from nanomem.jobs import (Job, TimeUp, content_of, file_of, machine_of, measure_new, measure_trained, plan, read_result,
                          run_groups, write_result)
from nanomem.suites import BYTES, FIRST, TASKS
from nanomem.variants import (books_of, fields_of, flags_of, hash_of_books, held_out, models_of, only_rates, parts_of,
                              searched, settings_of)


@dataclass
class Bench(suites.Suite):
    suite: str = "laptop"        # laptop or night: night has other defaults
    data: str = ""               # shards with the books; without it the embedded Moby-Dick
    final: bool = False          # measure on the test books: once, when everything is decided
    out: str = ""                # folder for checkpoints, results and report (without it out/bench, out/night)
    overwrite: bool = False      # remove what is there of these jobs, train and measure again
    device: str = ""             # cpu, cuda, mps
    jobs: int = 0                # trainings side by side, one thread each; 0: on a CPU one for each core, else 1
    plot: bool = False           # draw pictures (needs matplotlib)
    minutes: float = 0           # stop after so many minutes, the same command goes on; 0: when all is done
    report: bool = False         # train and measure nothing: only the report of what is there
    dry: bool = False            # only print what would be done, in which order
    speed: float = 0             # tokens a second of gpt's training on books, from which --dry estimates minutes


# ----------------------------------------------------------------------------------------------------------------------
# Train what is missing, and measure

NO_EFFECT = ("device", "log_interval", "eval_interval", "eval_batches", "minutes")    # on the weights


def refuse_to_lose(saved, out, typed, fields):
    """Raises UserError where a training in the folder `out` was made with other flags, or on other books."""
    was = {**saved["run"], **saved["config"], "books": saved["data_hash"]}
    books = hash_of_books(typed["data"], "train", typed.get("tokenizer", BYTES["tokenizer"]))
    for k, v in {**typed, **fields, "books": books}.items():
        if k not in NO_EFFECT and was.get(k) != v:
            what = "with other books" if k == "books" else f"with --{k}={was.get(k)}, not {v}"
            raise UserError(f"{out} holds a training {what}: add --overwrite to replace it, or choose another --out")


def checkpoint_of(flags, out, until):
    """The checkpoint that train.py makes with these flags: of an earlier run, of the rest of one, or of a new one.
    Raises TimeUp if it is not there at the time `until`: what there is then is saved."""
    typed, fields = train.parse(flags)
    last, saved, how = out / "last.pt", None, "--overwrite"
    if last.exists():
        try:
            saved = checkpoint.load(last, "checkpoint")
        except UserError as error:
            raise UserError(f"{error}; or add --overwrite to train again") from None
    if saved and saved.get("code", "") == nanomem.code_of(typed["model"]):     # else a student's file has changed
        refuse_to_lose(saved, out, typed, fields)
        if saved["step"] == typed["steps"]:
            return saved
        how = "--resume"
    minutes = min((until - time.time()) / 60, 1e6)
    if minutes <= 0:
        raise TimeUp
    with contextlib.redirect_stdout(io.StringIO()):    # what it prints is in log.csv too
        if train.main([*flags, f"--out={out}", f"--minutes={minutes}", how]):
            raise KeyboardInterrupt
    saved = checkpoint.load(last, "checkpoint")
    if saved["step"] < typed["steps"]:
        raise TimeUp
    return saved


def train_for(b, group, until):
    """Train for jobs that need the same training; with --search, at the best of the learning rates. Returns the
    checkpoint, the loss on held-out text of each rate that was tried, and the seconds of all trainings."""
    training, device = group[0].training, [f"--device={b.device}"] if b.device else []
    out, tried, saved, seconds = Path(b.out) / str(training), {}, None, 0
    for x, short in searched(b, training).items():
        flags = [*flags_of(short, training), "--eval_batches=16", *device]
        try:
            one = checkpoint_of(flags, Path(f"{out}-x{x}"), until)
            tried[x], seconds = one["best"], seconds + one["seconds"]
        except train.Diverged:                         # a rate that is too high
            tried[x] = math.inf
    if not only_rates(group):
        best = float(min(tried, key=tried.get)) if tried else 1
        flags = [*flags_of(replace(b, lr=b.lr * best, muon=b.muon * best), training), *device]
        saved = checkpoint_of(flags, out, until)
        seconds += saved["seconds"]
    return saved, tried, seconds


def remove(b, jobs):
    """For --overwrite: remove the results of these jobs and the trainings that they need. If it is cut short, the same
    command without --overwrite goes on."""
    for job in jobs:
        file_of(b.out, job).unlink(missing_ok=True)
        if job.training:
            for end in ("", *(f"-x{x}" for x in searched(b, job.training))):
                Path(b.out, f"{job.training}{end}", "last.pt").unlink(missing_ok=True)


def work(b, group, command, until):
    """Train once for jobs that need the same training, measure each, and write its result. Raises TimeUp, or what the
    first job raised that failed, with its name, when the others are done."""
    saved, tried, seconds = train_for(b, group, until) if group[0].training else (None, {}, 0)
    failed = None
    for job in group:
        if time.time() > until:
            failed = failed or TimeUp()
            break
        torch.manual_seed(job.seed)
        start = time.perf_counter()
        try:
            found = measure_trained(b, job, saved, tried) if job.training else measure_new(b, job)
        except Exception as error:
            error.job, failed = job, failed or error
            continue
        write_result(b.out, job, settings=settings_of(b, job), **books_of(b, job), command=command,
                     torch=torch.__version__, machine=cost.machine_name(stream.machine(b.device)[0]),
                     date=str(date.today()), train_minutes=seconds / 60,
                     minutes=(time.perf_counter() - start) / 60, measured=found)
    if failed:
        raise failed


# ----------------------------------------------------------------------------------------------------------------------
# The command

OURS = ("model", "data", "tokenizer", "out", "seed", "resume", "overwrite", "minutes", "eval_batches", "eval_interval")


def check_word(flag, word, known):
    if word not in known:
        raise UserError(f"--{flag}={word} is none of them: {cli.nearest(word, list(known))}")


def options(argv):
    """The command line as a Bench, and its tasks in the order of the report."""
    (typed,), words = cli.parse(argv, Bench)
    if words:
        raise UserError(f"bench.py takes only flags, got {words[0]}")
    suite = typed.get("suite", Bench.suite)
    check_word("suite", suite, suites.SUITES)
    out = "out/bench" if suite == Bench.suite else f"out/{suite}"
    b = Bench(**{"out": out, **suites.SUITES[suite], **typed})
    names = [word.strip() for word in b.tasks.split(",") if word.strip()]
    for name in names or [b.tasks]:
        check_word("tasks", name, (*suites.ORDER, "all"))
    if b.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if "rates" in names and not b.search:
        raise UserError("--tasks=rates needs what to multiply the learning rates with: --search=0.5,1,2")
    if b.search and not all(re.fullmatch(r"\d*\.?\d+", x) and float(x) for x in b.search.split(",")):
        raise UserError(f"--search={b.search} is no list of numbers with commas between them, such as --search=0.5,1,2")
    for flag, least in dict(seed=1, seeds=1, jobs=0, batch=1, segments=1, steps=1, task_steps=0, upto=0, minutes=0,
                            speed=0, read=2048).items():         # read: cost is compared with that after 1,024 tokens
        if getattr(b, flag) < least:
            raise UserError(f"--{flag}={getattr(b, flag):g} is too little: at least {least}")
    if b.data:
        b.data = os.path.normpath(b.data)                           # data/mine/ is data/mine
    return b, [task for task in suites.ORDER if task in names or "all" in names and (b.search or task != "rates")]


def check_model(model, task):
    """Raises UserError for a model that is none, and for settings that neither it nor train.py knows."""
    name, trained, tested = parts_of(model)
    if not name.endswith(".py"):
        check_word("models", name, nanomem.MODELS)
    for k in trained:
        if k.replace("-", "_") in OURS:
            raise UserError(f"{model}: {k} is not a setting of one model, bench.py sets it for all: --{k}")
    Config = nanomem.model_class(name).Config
    for settings, known in (trained, (Config, train.Run)), (tested, (Config,)):
        cli.parse([f"--{k}={v}" for k, v in settings.items()], *known)
    if task in TASKS:
        (fields, changed), shortest = fields_of(model), min(TASKS[task].tests)
        S = {**TASKS[task].train, **fields, **changed}["seg"]
        if S < 1 or shortest % S:
            raise UserError(f"{model}: texts of {shortest} tokens are not whole segments of {S}")


def check_books(b, jobs):
    """Rather before the trainings than after: are the books there?"""
    for split in ("train", *sorted({held_out(b, job.task) for job in jobs})):
        data.open_books(b.data, split, BYTES["tokenizer"])


def check_results(b, jobs):
    """Raises UserError where a result of other settings would be lost, such as one on the test books. (A model that has
    changed is measured again; a training with other settings is not lost either: see refuse_to_lose.)"""
    for job in jobs:
        path, here = file_of(b.out, job), settings_of(b, job)
        was = content_of(path).get("settings")
        for k in here if isinstance(was, dict) else ():
            if k not in ("code", "not_scored", "train") and was.get(k, here[k]) != here[k]:
                how = f"{'with' if was[k] else 'without'} --final" if k == "final" else f"with other settings ({k})"
                raise UserError(f"{path} was measured {how}: remove that file to measure it again, or choose another "
                                "--out")


def tell(b, results, command):
    """Write the report of these results and print it; with --plot, draw the pictures."""
    head, models = report.head(results, command), report.collect(results)
    here = f"; here {b.task_steps} steps" * (b.task_steps > 0)
    about = {k: f"{t.about}{here}; {t.guess}" for k, t in TASKS.items()}
    tables = "\n\n".join(filter(None, [report.tables(models, about), *claims.claims_table(models)]))
    text = f"```\n{head}\n```\n\n{tables}\n"
    checkpoint.write_whole(Path(b.out, "report.md"), lambda scratch: scratch.write_text(text, encoding="utf-8"))
    print(f"\n{head}\n\n{tables}\n")
    print(f"written to {b.out}:", ", ".join(["report.md", *(pictures.draw(models, b.out) if b.plot else [])]))


def main(argv):
    b, names = options(argv)
    switches = ("--report", "--overwrite")
    command = " ".join(["python bench.py", *[word for word in argv if not word.startswith(switches)]])

    # what is wanted, and of that what is not there yet
    jobs, seeds = [], range(b.seed, b.seed + b.seeds)
    for task in names:
        for model in models_of(b, task):
            check_model(model, task)
            jobs += [Job(task, model, seed) for seed in (seeds[:1] if task in ("cost", "replay") else seeds)]
    if not jobs:
        raise UserError("nothing to do: --tasks=rates is for models without a learning rate of their own")
    result = lambda job: read_result(b.out, job, settings_of(b, job), **books_of(b, job), **machine_of(b, job))
    left = [job for job in jobs if b.overwrite or not result(job)]
    left.sort(key=lambda job: (job.seed, names.index(job.task), parts_of(job.model)[0] not in FIRST))
    on_books = [job for job in left if job.task in suites.ON_BOOKS]
    if on_books and not b.report:
        check_books(b, on_books)
    if not (b.report or b.overwrite):
        check_results(b, left)
    checkpoint.target(Path(b.out, "report.md"), "report of bench.py", b"```\npython bench.py")
    groups = {}                                                      # the jobs that need the same training
    for job in left:
        groups.setdefault(job.training or job, []).append(job)
    if b.dry:
        plan(b, groups.values())
        return 0

    # do it, and show all that is there
    if b.overwrite and not b.report:
        remove(b, left)
    until = time.time() + 60 * (b.minutes or math.inf)
    failed = [] if b.report else run_groups(work, b, groups.values(), command, until)
    results = [found for job in jobs if (found := result(job))]
    if b.report and not results:
        raise UserError(f"{b.out} has no results of these tasks, models and settings: --report needs the flags with "
                        "which they were made, as the first lines of its report.md say")
    if results:
        tell(b, results, command)
    if failed:
        raise UserError(f"not all of it could be measured: {'; '.join(failed)}" if results else failed[0])
    if len(results) < len(jobs):
        without = "".join(f" without {switch}" for switch in switches if getattr(b, switch[2:]))
        print(f"{len(results)} of {len(jobs)} jobs are done: the same command{without} goes on")
    elif not b.report and len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} results were there already: --overwrite measures them again, "
              "as you will want to if you have changed a model")
    return 0


if __name__ == "__main__":
    cli.run(main)
