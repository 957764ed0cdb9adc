"""The jobs of bench.py: how each is measured, its file, what is left to do, and how several run side by side."""
import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import nanomem
from . import checkpoint, cli, cost, data, measure, reach, stream, suites, tasks
from .cli import UserError
from .report import table
from .suites import BYTES, TASKS, VOCAB
from .variants import (SHAPE, fields_of, halves, held_out, not_scored, only_rates, parts_of, searched, size_of,
                       training_of, untrained)


class TimeUp(Exception):
    """The minutes that were given are over. What was begun is saved."""


class Job(NamedTuple):
    """One thing to measure: a task, with a model and a seed."""
    task: str
    model: str    # as typed, with its settings
    seed: int

    def __str__(self):
        """Its name as a file: recall of rmt:mem=1/topk=2 is recall-rmt-mem1--topk2-1 with the seed 1."""
        return re.sub(r"[/\\]", "--", "-".join(map(str, self))).replace(":", "-").replace("=", "")

    @property
    def training(self):
        """The job for which the model is trained, itself or another one; None if this one needs no training."""
        if self.task in suites.UNTRAINED:
            return None
        return Job("books" if self.task in suites.BOOKS else self.task, halves(self.model)[0], self.seed)


# ----------------------------------------------------------------------------------------------------------------------
# How a job is measured

def measure_new(b, job):
    """What is measured of a new model."""
    device, dtype, _ = stream.machine(b.device)
    new = lambda vocab=VOCAB: untrained(b, job.model, vocab).to(device)
    if job.task == "cost":
        after = sorted({n for n in suites.READ if n < b.read} | {b.read})
        return cost.cost(new(), b.batch, b.segments, after, b.compile, dtype)
    if job.task == "replay":
        return cost.replay(new(), suites.REPLAY_SEGMENTS)
    books, others = (data.open_books(b.data, split, BYTES["tokenizer"]) for split in ("train", held_out(b, job.task)))
    model = new(-(-books.enc.n_vocab // 64) * 64)
    return cost.race(model, books, others, b.steps, b.batch, b.segments, dtype=dtype)


def measure_trained(b, job, saved, tried):
    """What is measured of a model, given its checkpoint and the losses with the learning rates that were tried."""
    if job.task == "rates":
        return tried
    device, (_, changed) = stream.machine(b.device)[0], fields_of(job.model)
    last = Path(b.out) / str(job.training) / "last.pt"
    load = lambda **more: nanomem.load(last, **{**changed, **more})[0].to(device).eval()
    model = load()
    if job.task in TASKS:
        t, found = TASKS[job.task], []
        for T, test in t.tests_for(parts_of(job.model)[0], b.read).items():
            sized = load(**model.for_length(T)) if t.long_texts else model
            texts = max(t.fewest, t.texts * min(t.tests) // T)
            found += measure.accuracy(sized, test, T, texts, t.batch, t.edges)
        return found
    open_books = lambda split: data.open_books(b.data, split, saved["run"]["tokenizer"])
    books = open_books(held_out(b, job.task))
    if job.task == "passage":
        return measure.passage(model, books)
    if job.task == "reach":
        return reach.reach(model, books)
    like = [untrained(b, other).to(device) for other in not_scored(b)]
    return dict(measure.loss_by_position(model, books, suites.POSITIONS, 4 * b.batch, b.upto, b.interleave, like=like,
                                         segments=b.segments, interleave_len=b.interleave_len,
                                         training=open_books("train")), search=tried)


# ----------------------------------------------------------------------------------------------------------------------
# Its file

def file_of(out, job):
    return Path(out) / "results" / f"{job}.json"


def content_of(path):
    """The content of a result file; {} if there is none, or one that is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def read_result(out, job, settings, **books):
    """The content of the job's file; None if there is none, or one of other settings or of other books, as far as it
    says which."""
    found = content_of(file_of(out, job))
    same = (found.get("model"), found.get("settings")) == (job.model, settings) and "measured" in found
    return found if same and all(found.get(k, v) == v for k, v in books.items()) else None


def machine_of(b, job):
    """{"machine": its name}, for what is timed on a device that was asked for by name; else {}."""
    return {} if job.training or not b.device else dict(machine=cost.machine_name(stream.machine(b.device)[0]))


def write_result(out, job, **content):
    """Write the job's file, whole or not at all."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**job._asdict(), **content}.items()]
    text = "{" + ",\n ".join(lines) + "}\n"
    checkpoint.write_whole(file_of(out, job), lambda scratch: scratch.write_text(text))


# ----------------------------------------------------------------------------------------------------------------------
# What is left to do

def relative_speeds(folder):
    """{model: its training speed over that of gpt}, from the results of cost in a folder."""
    found = {}
    for one in map(content_of, Path(folder).glob("cost-*.json")):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[one["model"]] = float(one["measured"]["training_tokens_per_s"])
    return {model: speed / found["gpt"] for model, speed in found.items() if "gpt" in found}


@cache
def vocab_of(folder):
    """The size of the vocabulary of the books."""
    return data.open_books(folder, "train", BYTES["tokenizer"]).enc.n_vocab


def plan(b, groups):
    """Print what is left to do, in order: parameters, training tokens, and minutes of training where they can be known:
    on books, from --speed and from how fast a model was in an earlier `cost`, compared with gpt."""
    here, ours = Path(b.out) / "results", Path(__file__).parents[1] / ".github" / "results"
    folder = here if any(here.glob("cost-gpt-*")) else ours
    speeds, rows, all_tokens, all_minutes = relative_speeds(folder), [], 0, 0.0
    for group in groups:
        model, training, cells = group[0].model, group[0].training, []
        if training:
            made = training_of(b, training)
            needed = [*searched(b, training).values(), *([] if only_rates(group) else [b])]
            tokens = sum(math.prod(int(training_of(one, training)[k]) for k in ("steps", "batch", "segments", "seg"))
                         for one in needed)
            on_task = tasks.is_task(made["data"])
            vocab = tasks.vocab_of(made["data"]) if on_task else vocab_of(b.data)
            shape = {k: int(made[k]) for k in (*SHAPE, "mlp") if k in made}
            size = size_of(made["model"], **{"vocab": -(-vocab // 64) * 64, **shape, **fields_of(training.model)[0]})
            cells, all_tokens = [f"{size / 1e6:.2f}M", f"{tokens / 1e6:.2f}M"], all_tokens + tokens
            if b.speed and not on_task and model in speeds:
                minutes = tokens / b.speed / speeds[model] / 60
                cells, all_minutes = [*cells, f"{minutes:.0f}"], all_minutes + minutes
        rows.append([f"{', '.join(job.task for job in group)} of {model}", group[0].seed, *cells])
    print(table(["what", "seed", "parameters", "training tokens", "minutes"], rows))
    print(f"\n{len(rows)} are left, with {all_tokens / 1e6:,.1f}M training tokens, those of begun trainings included.")
    if all_minutes:
        print(f"The trainings on books need {all_minutes:,.0f} minutes, {math.ceil(all_minutes / 10)} pieces of "
              f"--minutes=10, if the models are as fast beside gpt as in {folder}. What is measured "
              "after a training, and the small trainings on tasks, come on top.")


# ----------------------------------------------------------------------------------------------------------------------
# Side by side

def begin_process():
    """A process among others: one thread and no bar. Ctrl-C is for train.py, which saves first."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """If the process that started this one is killed, nobody else ends it. At the first signal train.py saves."""
    multiprocessing.parent_process().join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


def run_all(function, calls, n):
    """Run function(*call) for each call, n side by side: small models use one thread better than several. Yields each
    call and what it raised, or None: one that fails must not cost the others."""
    pool = None
    if n > 1 and len(calls) > 1:
        pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), begin_process)
    try:
        wait = [pool.submit(function, *call).result if pool else partial(function, *call) for call in calls]
        for call, result in zip(calls, wait):
            error = None
            try:
                result()
            except Exception as e:
                error = e
            yield call, error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def describe(error):
    """What went wrong, in one line, and where, if that is not a mistake of the user or an exercise to be solved."""
    if isinstance(error, UserError) or cli.unwritten(error):
        return "not written yet: " * cli.unwritten(error) + str(error), ""
    return f"{type(error).__name__}: {error}".splitlines()[0], "".join(traceback.format_exception(error))


def run_groups(work, b, groups, *more):
    """work(b, group, *more) for each group of jobs, several side by side. Returns what failed, a line each."""
    n = b.jobs or (torch.get_num_threads() if stream.machine(b.device)[0].type == "cpu" else 1)
    calls, alone = [(b, group, *more) for group in groups], []
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
    return failed
