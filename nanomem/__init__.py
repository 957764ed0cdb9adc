"""nanomem: one tiny GPT, many memories. MODELS is the index, in reading order."""
import dataclasses
import importlib
from pathlib import Path

from . import checkpoint
from .cli import UserError, check_types, nearest

# name: (file in nanomem/models/, its class, the settings that make it this preset)
MODELS = {
    "gpt": ("gpt", "GPT", {}),
    "window": ("xl", "XL", dict(slide=True)),
    "xl": ("xl", "XL", {}),
    "full": ("xl", "XL", dict(slide=True, window=-8)),
    "rmt": ("rmt", "RMT", {}),
    "hmt": ("hmt", "HMT", {}),
    "hmt_split": ("hmt", "HMT", dict(query="split")),
    "memformer": ("memformer", "Memformer", {}),
    "memoryllm": ("memoryllm", "MemoryLLM", {}),
    "mplus": ("mplus", "MPlus", {}),
    "mamba": ("mamba", "Mamba", {}),
    "deltanet": ("deltanet", "DeltaNet", {}),
    "infini": ("infini", "Infini", {}),
    "titans": ("titans", "Titans", {}),
    "titans_mag": ("titans", "Titans", dict(form="mag")),
    "hybrid": ("bmojo", "BMojo", dict(mix="window,ssm")),
    "bmojo_f": ("bmojo", "BMojo", dict(eidetic=0)),
    "bmojo": ("bmojo", "BMojo", {}),
    "gca": ("gca", "GCA", {}),
    "landmark": ("landmark", "Landmark", {}),
}


def model_class(name):
    """The class of a model or preset. Raises UserError if there is none of that name."""
    if name not in MODELS:
        raise UserError(f"no model is called {name}: {nearest(name, list(MODELS))}")
    file, cls, _ = MODELS[name]
    return getattr(importlib.import_module(f".models.{file}", __name__), cls)


def build(name, **fields):
    """Make a model or preset: build("xl", width=128, seg=256). Raises UserError for a wrong name, field or setting."""
    Model = model_class(name)
    known = [f.name for f in dataclasses.fields(Model.Config)]
    for field in fields:
        if field not in known:
            raise UserError(f"{name} has no field {field}: {nearest(field, known)}")
    try:
        config = Model.Config(**{**MODELS[name][2], **fields})
    except AssertionError as refusal:   # the checks of Config say what is wrong, with the numbers
        raise UserError(f"{name}: {refusal}") from None
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{name}: one of these fields has a value of the wrong type: {fields}") from None
    check_types(config, f"{name}: ")
    return Model(config)


def load(path, **fields):
    """The model in a checkpoint of train.py, and the checkpoint: a file, or a folder that holds best.pt or last.pt.
    Fields that shape no weight may differ from those in training: load("out/gca", seg=4096, bank=65536)."""
    path = Path(path)
    if path.is_dir():
        path = next((path / f for f in ("best.pt", "last.pt") if (path / f).exists()), path / "last.pt")
    saved = checkpoint.load(path, "checkpoint")
    with checkpoint.using(path):
        model = build(saved["name"], **{**saved["config"], **fields})
        checkpoint.set_weights(model, saved["weights"])
    return model, saved
