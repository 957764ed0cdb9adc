"""nanomem: one tiny GPT, many memories. MODELS is the index, in reading order."""
import dataclasses
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
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


def code_of(name):
    """A checksum of the file of a model that is given by a path: another text is another model. "" for our models."""
    if not name.endswith(".py"):
        return ""
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"cannot read the model's file {name} ({e.strerror}): its path counts from the folder in which "
                        "you start the command") from None


def import_file(path, module=""):
    """The module in a file. It becomes part of the package nanomem.models, wherever it lies, so that in it both
    `from . import gpt` and `from nanomem.models import gpt` work. Its name there is `module`; without it, one that no
    other file and no other text of this file has. Raises UserError with the line where it cannot be imported."""
    code, file = code_of(path), os.path.abspath(path)
    module = module or f"nanomem.models.{Path(path).stem.replace('.', '_')}_{code[:12]}"
    if module in sys.modules and sys.modules[module].__file__ == file:
        return sys.modules[module]
    made = importlib.util.module_from_spec(importlib.util.spec_from_file_location(module, file))
    sys.modules[module] = made
    try:
        exec(compile(Path(path).read_bytes(), file, "exec"), vars(made))       # leaves no __pycache__ beside the file
    except (Exception, SystemExit) as e:
        del sys.modules[module]
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else 1
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    return made


def model_in(path):
    """The one model class of a file: it has what the contract asks for and no other class of the file extends it."""
    module, needs = import_file(path), ("Config", "init_state", "read", "extend", "write")
    own = {c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
           and all(hasattr(c, name) for name in needs)}
    found = [c for c in own if not any(other is not c and issubclass(other, c) for other in own)]
    if len(found) != 1:
        names = ", ".join(sorted(c.__name__ for c in found))
        raise UserError(f"{path} must define one model, a class with {', '.join(needs)}: it defines {names or 'none'}")
    Config = found[0].Config
    if not dataclasses.is_dataclass(Config) or set(inspect.get_annotations(Config)) - {*Config.__dataclass_fields__}:
        raise UserError(f"{path}: Config declares settings and needs @dataclass in the line above it")
    return found[0]


def model_class(name):
    """The class of a model, of a preset, or of the file whose path is given: model_class("homework/hmt.py"). Raises
    UserError if there is none."""
    if name.endswith(".py"):
        return model_in(name)
    if name not in MODELS:
        raise UserError(f"no model is called {name}: {nearest(name, list(MODELS))}")
    file, cls, _ = MODELS[name]
    return getattr(importlib.import_module(f".models.{file}", __name__), cls)


def build(name, **fields):
    """Make a model, a preset, or the model of a file: build("xl", width=128, seg=256), build("homework/hmt.py"). Raises
    UserError for a wrong name, field or setting."""
    Model, preset = model_class(name), MODELS[name][2] if name in MODELS else {}
    known = [f.name for f in dataclasses.fields(Model.Config)]
    for field in fields:
        if field not in known:
            raise UserError(f"{name} has no field {field}: {nearest(field, known)}")
    try:
        config = Model.Config(**{**preset, **fields})
    except AssertionError as refusal:   # the checks of Config say what is wrong, with the numbers
        raise UserError(f"{name}: {refusal}") from None
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{name}: one of these fields has a value of the wrong type: {fields}") from None
    check_types(config, f"{name}: ")
    return Model(config)


def load(path, **fields):
    """The model in a checkpoint of train.py, and the checkpoint: a file, or a folder that holds best.pt or last.pt.
    Fields that shape no weight may differ from those in training: load("out/gca", seg=4096, bank=65536). A model that
    was given by a path is imported from that path again."""
    path = Path(path)
    if path.is_dir():
        path = next((path / f for f in ("best.pt", "last.pt") if (path / f).exists()), path / "last.pt")
    saved = checkpoint.load(path, "checkpoint")
    with checkpoint.using(path):
        model = build(saved["name"], **{**saved["config"], **fields})
        shapes = [{k: v.shape for k, v in weights.items()} for weights in (model.state_dict(), saved["weights"])]
        if fields and shapes[0] != shapes[1]:
            raise UserError(f"weights depend on {' or '.join(fields)}, which cannot be changed after training")
        checkpoint.set_weights(model, saved["weights"])
        if saved.get("code", "") != code_of(saved["name"]):
            print(f"note: {saved['name']} has changed since {path} was trained with it", file=sys.stderr)
    return model, saved
