"""nanomem: one tiny GPT, many memories. MODELS is the index, in reading order."""
import dataclasses
import importlib

from pathlib import Path

from .cli import UserError, nearest

# name: (the file in nanomem/ where the model is, the settings that make it this preset)
MODELS = {
    "gpt": ("gpt", {}),
    "window": ("xl", dict(slide=True)),
    "xl": ("xl", {}),
    "full": ("xl", dict(slide=True, window=-8)),
    "rmt": ("rmt", {}),
    "hmt": ("hmt", {}),
    "hmt_split": ("hmt", dict(query="split")),
    "memformer": ("memformer", {}),
    "memoryllm": ("mplus", dict(store=0)),
    "mplus": ("mplus", {}),
    "mamba": ("mamba", {}),
    "hybrid": ("bmojo", dict(mix="window,ssm")),
    "bmojo_f": ("bmojo", dict(eidetic=0)),
    "bmojo": ("bmojo", {}),
    "gca": ("gca", {}),
}


def model_class(name):
    """The model's class by the name of a model or preset: the one class in its file that has a Config of that file."""
    if name not in MODELS:
        raise UserError(f"no model is called {name}: {nearest(name, list(MODELS))}")
    module = importlib.import_module(".models." + MODELS[name][0], __name__)
    return next(v for v in vars(module).values()
                if isinstance(v, type) and v.__module__ == module.__name__ and hasattr(v, "init_state"))


def build(name, **fields):
    """Make a model or preset: build("xl", width=128, seg=256). Raises UserError for a wrong name, field or setting."""
    Model = model_class(name)
    known = [f.name for f in dataclasses.fields(Model.Config)]
    for field in fields:
        if field not in known:
            raise UserError(f"{name} has no field {field}: {nearest(field, known)}")
    try:
        return Model(Model.Config(**{**MODELS[name][1], **fields}))
    except AssertionError as refusal:   # the doors of Config say what is wrong, with the numbers
        raise UserError(f"{name}: {refusal}") from None


def load(path, **fields):
    """The model in a checkpoint of train.py, and the checkpoint: a file, or a folder that holds best.pt or last.pt.
    Fields that shape no weight may be other ones than in training: load("out/gca", seg=4096, bank=65536)."""
    from . import stream
    path = Path(path)
    if path.is_dir():
        path = next((path / f for f in ("best.pt", "last.pt") if (path / f).exists()), path / "last.pt")
    checkpoint = stream.load(path, "checkpoint")
    model = build(checkpoint["name"], **{**checkpoint["config"], **fields})
    model.load_state_dict(checkpoint["weights"])
    return model, checkpoint
