"""The bytes of a training step: counted, estimated before the first step, and compared with what the device has."""
import math
import os
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import stream
from .cli import UserError


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive at once, on one device or on all, .peak is the most, of those made inside the
    `with`. Eager only."""

    def __init__(self, device=None):
        super().__init__()
        self.device, self.now, self.peak, self.seen = device, 0, 0, {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = f(*args, **kwargs)
        given = {s._cdata for s in self.storages([*args, *kwargs.values()])}   # a view of an argument is nothing new
        for storage in self.storages(out):
            key, here = storage._cdata, self.device in (None, storage.device)
            if here and key not in self.seen and key not in given and storage.nbytes():
                self.seen[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, key)
        return out

    def storages(self, x):
        """Of a tensor, or of all tensors in a list of lists."""
        if isinstance(x, torch.Tensor):
            return [x.untyped_storage()]
        return [s for part in x for s in self.storages(part)] if isinstance(x, (list, tuple)) else []

    def drop(self, key):
        self.now -= self.seen.pop(key, 0)


def available(device):
    """Bytes that this process can have on a device; on a CPU, all memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def check_weights(model, device):
    """Raises UserError if the weights of a model, which may lie on device=meta, cannot be trained on a device: each
    needs up to 16 bytes, for itself, its gradient and two numbers of AdamW (Muon has one)."""
    weights, have = sum(p.numel() for p in model.parameters()), available(device)
    if 16 * weights > have:
        raise UserError(f"{weights:,} parameters need {16 * weights / 1e9:,.0f} GB, here are {have / 1e9:,.0f}: try a "
                        "smaller --width, --layers or --vocab")


def step_bytes(model, backward, dtype, K):
    """(a, b): a step through K segments of B texts needs about a + b * B bytes beside weights and optimizers, for
    activations and gradients. Small steps are counted: another text, and another segment of it, add the same each time.
    """
    step = stream.make_step(model, dtype)

    def peak(B, K):
        x = torch.zeros(B, K * model.c.seg, dtype=torch.long, device=stream.device_of(model))
        with LiveBytes(stream.device_of(model)) as live:
            backward(model, step, x, x, stream.detach(model.init_state(B)), 1 / x.numel())
        model.zero_grad()
        return live.peak
    few = min(K, 2)
    one = peak(1, few)
    per_text = peak(2, few) - one
    return one - per_text, per_text + (K - few) * (peak(1, few + 1) - one)


def check_step(model, backward, dtype, B, K, accum=1, compiled=False):
    """A sentence that says what a step needs in which B texts are split into `accum` parts. Where the device has less,
    raises UserError and names a number of parts that fits; only warns if the step is compiled, which may need less.
    """
    device, fixed = stream.device_of(model), 12 * sum(p.numel() for p in model.parameters())
    have, (a, b) = available(device), step_bytes(model, backward, dtype, K)
    need = lambda parts: fixed + a + b * (B // parts)
    said = (f"a step needs about {need(accum) / 1e9:.2f} GB: {fixed / 1e9:.2f} for weights and optimizers, "
            f"{(need(accum) - fixed) / 1e9:.2f} for activations and gradients")
    if need(accum) <= have:
        return said
    smaller = range(accum + 1, B + 1) if need(B) <= have else ()
    fits = next((n for n in smaller if B % n == 0 and need(n) <= have), None)
    way = f"--accum={fits} needs {need(fits) / 1e9:.2f}" if fits else \
        "--replay keeps the activations of one segment" if backward is stream.bptt and K > 1 else \
        "try a smaller --seg, --width or --layers"
    said = f"{said}; here are {have / 1e9:.2f}: {way}"
    if compiled:
        return f"warning: {said}"
    raise UserError(said)
