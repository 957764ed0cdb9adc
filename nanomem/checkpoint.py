"""Files of tensors: written whole or not at all, read without running code from them, and checked by their sum."""
import contextlib
import hashlib
import os
import pickle
from pathlib import Path

import torch

from .cli import UserError

VERSION = 2   # of the format; files of another version are refused


def checksum(content):
    """SHA-256 of nested dicts, lists, numbers, strings and tensors."""
    digest = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(x, dict):
            for k, v in x.items():
                digest.update(repr(k).encode())
                add(v)
        elif isinstance(x, (list, tuple)):
            digest.update(f"{type(x).__name__}{len(x)}".encode())
            for v in x:
                add(v)
        else:
            digest.update(repr(x).encode())
    add(content)
    return digest.hexdigest()


def weights_hash(model):
    """The checksum of all weights: a memory can only be used with the weights that made it."""
    return checksum(dict(model.state_dict()))


def target(path, what="", begin=b"", mark=b""):
    """The file that writing to path will replace: a link is followed. Raises UserError for what is no regular file, and
    for a file that is no `what`: that begins with `begin` and has `mark` in its first bytes."""
    if str(path).endswith(("/", os.sep)):
        raise UserError(f"{path} is the name of a folder: add the name of a file")
    real = Path(os.path.realpath(path))
    folder = next((p for p in real.parents if p.exists()), real.parent)    # none: a drive that is not there
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is a file")
    if real.exists() and not real.is_file():
        raise UserError(f"{path} is not a regular file and will not be replaced: choose another name")
    try:
        head = real.open("rb").read(4096) if what and real.exists() else None
        if head is not None and not (head.startswith(begin) and mark in head):
            raise UserError(f"{path} is there and is no {what}, so it will not be replaced: choose another name")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None
    return real


def write_whole(path, write):
    """Call write(scratch), which writes a file beside `path`, and put it there. The old file stays whole until the new
    one is."""
    path = target(path)
    scratch = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as e:             # torch.save raises RuntimeError where it cannot open the file
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None


def save(path, kind, **content):
    """Write a file that `load` reads."""
    content = dict(format=f"nanomem {kind}", version=VERSION, **content)
    content["checksum"] = checksum(content)
    write_whole(path, lambda scratch: torch.save(content, scratch))


def load(path, kind):
    """Read what `save` wrote, onto the CPU. Raises UserError if it is missing, damaged, too old, or something else."""
    if not os.path.isfile(path):
        raise UserError(f"cannot read {path}: no such file")
    damaged = f"{path} is damaged or not a {kind}: it may have been cut off or changed while copying"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, OverflowError,
            AssertionError, UnicodeDecodeError, pickle.UnpicklingError):
        raise UserError(damaged) from None
    found = content.get("format", "") if isinstance(content, dict) else ""
    if found != f"nanomem {kind}":
        but = f" but a {found.removeprefix('nanomem ')}" if found and isinstance(found, str) else ""
        raise UserError(f"{path} is not a {kind} of nanomem{but}")
    if content.get("version") != VERSION:
        raise UserError(f"{path} was written in format {content.get('version')}, this code reads format {VERSION}: "
                        "train again, or use the code that wrote it")
    if content.pop("checksum", None) != checksum(content):
        raise UserError(damaged)
    return content


def set_weights(model, weights):
    """model.load_state_dict, where a tensor of another type is an error too."""
    for k, v in model.state_dict().items():
        assert weights[k].dtype == v.dtype, f"{k} is {weights[k].dtype}"
    model.load_state_dict(weights)


def set_optimizer(optimizer, state):
    """optimizer.load_state_dict, with a check of what it would take as it is."""
    kinds = [{k: type(v) for k, v in group.items()} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    assert [{k: type(v) for k, v in group.items()} for group in optimizer.param_groups] == kinds, "other settings"
    for p, moments in optimizer.state.items():
        assert all(v.shape in (p.shape, ()) and v.dtype == p.dtype for v in moments.values()), "another shape"


@contextlib.contextmanager
def using(path):
    """While the content of a file is put to use: what is missing or has another shape becomes a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError) as e:
        why = (str(e).splitlines() or [""])[0][:80]
        raise UserError(f"{path} does not hold what it should ({type(e).__name__}: {why})") from None


@contextlib.contextmanager
def lock(folder):
    """Two runs in one folder would overwrite each other. The lock ends with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as e:
        raise UserError(f"cannot write into {folder}: {e.strerror}") from None
    with file:
        try:
            import fcntl                                   # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {folder}: wait for it, or choose another --out") from None
        except (ImportError, OSError):                     # nor on some network drives
            pass
        yield
