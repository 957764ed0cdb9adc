"""Models as bench.py takes them: "gca:chunk=16/topk=8" is gca, trained with chunk=16 and tested with topk=8."""
import contextlib
import json
import re
from dataclasses import replace
from functools import cache

import torch

import nanomem
from . import cli, data, tasks
from .cli import UserError
from .measure import parameters
from .suites import BYTES, ON_BOOKS, TASKS, UNTRAINED, VOCAB

SHAPE = ("layers", "heads", "width", "seg")


def halves(model):
    """A model as typed -> what is trained and what is changed for the test: "gca:chunk=16/topk=8" -> "gca:chunk=16",
    "topk=8". The path of a model's file, up to .py, is kept whole."""
    return re.fullmatch(r"((?:.+?\.py(?=[:/]|$))?[^/]*)/?(.*)", model, re.S).groups()


def parts_of(model):
    """"gca:chunk=16/topk=8" -> its name, the settings with which it is trained, and those changed for the test."""
    trained, tested = halves(model)
    return *cli.variant(trained), cli.variant(f"/:{tested}")[1] if tested else {}


def fields_of(model):
    """The fields of the model's Config among its settings: in training, and changed for the test. What else is among
    them is for train.py."""
    name, *both = parts_of(model)
    Config = nanomem.model_class(name).Config
    known = cli.types(Config)
    flags = ([f"--{k}={v}" for k, v in settings.items() if k.replace("-", "_") in known] for settings in both)
    return [cli.parse(typed, Config)[0][0] for typed in flags]


def models_of(b, task):
    """The models of a task, as they are typed in full: those of --models, else those it was made for, else all."""
    t = TASKS.get(task)
    made_for, usual = (t.models, t.others) if t else (UNTRAINED.get(task, ()), "")
    names = {parts_of(model)[0] for model in made_for}
    every = [*made_for, *(name + usual for name in nanomem.MODELS if name not in names)]

    def in_full(word):   # a name alone has the usual settings
        trained, tested = halves(word)
        alone = not parts_of(word)[1] and trained not in made_for
        return trained + usual + f"/{tested}" * bool(tested) if alone else word

    found = []
    for word in filter(None, map(str.strip, b.models.split(","))):
        found += every if word == "all" else [in_full(word)]
    found = found or made_for or every
    if task == "rates":   # a model with a rate of its own needs no search
        found = [model for model in found if "lr" not in parts_of(model)[1]]
    return list(dict.fromkeys(found))   # --models=gpt,all names gpt twice


@cache
def size_of(name, **fields):
    """Number of parameters of a model; nothing is computed."""
    with torch.device("meta"):
        return parameters(nanomem.build(name, **{"vocab": VOCAB, **fields}))


def equal_mlp(b, model, shape):
    """{"mlp": its width}, for a model that would not have as many parameters as gpt, within 3%, and has with that MLP:
    the number of parameters grows with the width of the MLP in a straight line. Else {}."""
    name, fields, width = parts_of(model)[0], {**shape, **fields_of(model)[0]}, shape["width"]
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
    trained, tested = fields_of(model)
    return nanomem.build(parts_of(model)[0], **{**shape_of(b, model), "vocab": vocab, **trained, **tested})


# ----------------------------------------------------------------------------------------------------------------------
# Their trainings and results

def training_of(b, job):
    """What a training is made with: {setting of train.py or field of the model: value}; what was typed stays text."""
    name, settings, _ = parts_of(job.model)
    if job.task in TASKS:
        found = TASKS[job.task].flags(settings, b.task_steps)
        found.update(equal_mlp(b, job.model, {k: found[k] for k in SHAPE}))
    else:
        same = ("data", "steps", "batch", "segments", "interleave", "interleave_len", "lr", "muon")
        found = dict({k: getattr(b, k) for k in same}, **shape_of(b, job.model), **({} if b.data else BYTES))
    found.update(settings, model=name, seed=job.seed, eval_batches=4)
    return {**found, "eval_interval": found["steps"]}


def flags_of(b, job):
    """The same as flags of train.py."""
    return [f"--{k}={v}" for k, v in training_of(b, job).items()]


def searched(b, training):
    """{x: the Bench with x times its learning rates, for a tenth of the steps}, for a training with --search."""
    if training.task != "books" or not b.search or "lr" in parts_of(training.model)[1]:
        return {}
    return {x: replace(b, steps=max(1, b.steps // 10), lr=b.lr * float(x), muon=b.muon * float(x))
            for x in b.search.split(",")}


def only_rates(group):
    """Whether the short trainings of the search are all that these jobs need."""
    return all(job.task == "rates" for job in group)


def not_scored(b):
    """The models that are compared on books and have seen some of their targets: there, no model is scored."""
    models = [model for model in models_of(b, "books") if model not in nanomem.MODELS]
    return [model for model in models if not untrained(b, model).scored().all()]


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
    if job.task == "books":
        found.update(upto=b.upto, not_scored=not_scored(b))
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
    """{"books": checksums of those that a job is about}, {} where there are none or they are not here."""
    with contextlib.suppress(UserError):
        if job.task in ON_BOOKS:
            return dict(books=[hash_of_books(b.data, split) for split in ("train", held_out(b, job.task))])
    return {}


def held_out(b, task):
    """The split of the books that a task is measured on."""
    return "test" if b.final and task != "race" else "validation"
