"""Files of tensors: written whole or not at all, and read without running code from them."""
import hashlib
import os
import pickle
from pathlib import Path

import torch

from .cli import UserError

VERSION = 2   # 1 named the model "room" and its weights "model"


def weights_hash(model):
    """The SHA-256 of all weights: a memory can be read on only by the weights that made it."""
    digest = hashlib.sha256()
    for v in model.state_dict().values():
        digest.update(v.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(path, kind, **content):
    """Write a file that `load` reads with weights_only. The old file stays whole until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    torch.save(dict(format=f"nanomem {kind}", version=VERSION, **content), scratch)
    os.replace(scratch, path)


def load(path, kind):
    """Read what `save` wrote, onto the CPU. Raises UserError if it is missing, cut off, too old, or something else."""
    if not os.path.isfile(path):
        raise UserError(f"cannot read {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise UserError(f"{path} is damaged or not a {kind}: it may have been cut off while copying") from None
    found = content.get("format", "") if isinstance(content, dict) else ""
    if found != f"nanomem {kind}":
        but = f" but a {found.removeprefix('nanomem ')}" if found else ""
        raise UserError(f"{path} is not a {kind} of nanomem{but}")
    if content.get("version") != VERSION:
        raise UserError(f"{path} was written in format {content.get('version')}, this code reads format {VERSION}: "
                        "train again, or use the code that wrote it")
    return content
