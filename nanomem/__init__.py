"""nanomem: one tiny GPT, many memories. ROOMS is the index, in reading order."""
import dataclasses
import importlib

from pathlib import Path

from .cli import UserError, nearest

# name: (the file in nanomem/ where the room is, the settings that make it this preset)
ROOMS = {
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
    "mamba": ("bmojo", dict(mix="ssm")),
    "hybrid": ("bmojo", dict(mix="window,ssm")),
    "bmojo_f": ("bmojo", dict(eidetic=0)),
    "bmojo": ("bmojo", {}),
    "gca": ("gca", {}),
}


def room_class(name):
    """The room's class by the name of a room or preset: the one class in its file that has a Config of that file."""
    if name not in ROOMS:
        raise UserError(f"no room is called {name}: {nearest(name, list(ROOMS))}")
    module = importlib.import_module("." + ROOMS[name][0], __name__)
    return next(v for v in vars(module).values()
                if isinstance(v, type) and v.__module__ == module.__name__ and hasattr(v, "init_state"))


def build(name, **fields):
    """Make a room or preset: build("xl", width=128, seg=256). Raises UserError for a wrong name, field or setting."""
    Room = room_class(name)
    known = [f.name for f in dataclasses.fields(Room.Config)]
    for field in fields:
        if field not in known:
            raise UserError(f"{name} has no field {field}: {nearest(field, known)}")
    try:
        return Room(Room.Config(**{**ROOMS[name][1], **fields}))
    except AssertionError as refusal:   # the doors of Config say what is wrong, with the numbers
        raise UserError(f"{name}: {refusal}") from None


def load(path, **fields):
    """The room in a checkpoint of train.py, and the checkpoint: a file, or a folder that holds best.pt or last.pt.
    Fields that shape no weight may be other ones than in training: load("out/gca", seg=4096, bank=65536)."""
    from . import stream
    path = Path(path)
    if path.is_dir():
        path = next((path / f for f in ("best.pt", "last.pt") if (path / f).exists()), path / "last.pt")
    checkpoint = stream.load(path, "checkpoint")
    room = build(checkpoint["room"], **{**checkpoint["config"], **fields})
    room.load_state_dict(checkpoint["model"])
    return room, checkpoint
