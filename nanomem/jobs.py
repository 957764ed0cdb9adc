"""The jobs of bench.py: each has one file for its result, and several of them run side by side."""
import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import checkpoint
from .cli import UserError


class TimeUp(Exception):
    """The minutes that were given are over. What was begun is saved."""


def halves(model):
    """A model as typed -> what is trained and what is changed for the test: "gca:chunk=16/topk=8" -> "gca:chunk=16",
    "topk=8". The path of a model's file, up to .py, is kept whole."""
    return re.fullmatch(r"((?:.+?\.py(?=[:/]|$))?[^/]*)/?(.*)", model, re.S).groups()


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
        if self.task in ("cost", "race", "replay"):
            return None
        task = "books" if self.task in ("passage", "reach", "rates") else self.task
        return Job(task, halves(self.model)[0], self.seed)


def file_of(out, job):
    return Path(out) / "results" / f"{job}.json"


def read_result(out, job, settings, books=None):
    """The content of the job's file; None if there is none, or one of other settings or of other books, as far as it
    says which."""
    try:
        found = json.loads(file_of(out, job).read_text())
        same = found["model"] == job.model and found["settings"] == settings
        return found if same and (books is None or found.get("books", books) == books) else None
    except (OSError, ValueError, KeyError):
        return None


def write_result(out, job, **content):
    """Write the job's file, whole or not at all."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**job._asdict(), **content}.items()]
    text = "{" + ",\n ".join(lines) + "}\n"
    checkpoint.write_whole(file_of(out, job), lambda scratch: scratch.write_text(text))


def begin_process():
    """A process among others: one thread and no bar. Ctrl-C is for train.py, which saves first."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    if isinstance(error, (UserError, NotImplementedError)):
        return "not written yet: " * isinstance(error, NotImplementedError) + str(error), ""
    return f"{type(error).__name__}: {error}".splitlines()[0], "".join(traceback.format_exception(error))


def relative_speeds(folder):
    """{model: its training speed over that of gpt}, from the results of cost in a folder."""
    found = {}
    for path in Path(folder).glob("cost-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            one = json.loads(path.read_text())
            found[one["model"]] = float(one["measured"]["training_tokens_per_s"])
    return {model: speed / found["gpt"] for model, speed in found.items() if "gpt" in found}
