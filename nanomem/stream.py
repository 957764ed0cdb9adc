"""The one walk over segments. It trains, evaluates and generates with any model and knows none of them."""
import contextlib
import hashlib
import os
import pickle
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from .cli import UserError


def enter(model, state, fresh):
    """The state in which a window begins: rows that open a new book (fresh (B,) True) start from the model's initial
    state, through which gradient reaches a learned one; the others go on from `state`. The initial state also decides
    where a tensor lies: a bank may be in the memory of the CPU while the model is not."""
    def choose(start, v):
        return torch.where(fresh.to(start.device).view(-1, *[1] * (v.ndim - 1)), start, v.to(start.device))
    return {k: choose(start, state[k]) for k, start in model.init_state(len(fresh)).items()}


def detach(state):
    return {k: v.detach() for k, v in state.items()}


def scored(batch, *models):
    """The batch with targets of -1 wherever one of these models must not be scored: where it has seen the target."""
    y = batch.y
    for model in models:
        y = y.masked_fill(~model.scored().repeat(y.size(1) // model.c.seg), -1)
    return batch._replace(y=y)


def nbytes(state):
    """Bytes that are remembered for one row."""
    return sum(v[0].nbytes for v in state.values())


def device_of(model):
    return model.head.weight.device


def precision(model, dtype):
    """Autocast of the model's device to dtype, or nothing for float32. Parameters and states stay float32."""
    if dtype in (None, torch.float32):
        return contextlib.nullcontext()
    return torch.autocast(device_of(model).type, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Training

class CrossEntropy(torch.autograd.Function):
    """`summed_loss` in the memory of the logits: they become probabilities, and on the way back their own gradient."""

    @staticmethod
    def forward(ctx, logits, y):
        i = y.clamp(min=0)[:, None]
        nll = logits.amax(-1) - logits.gather(1, i)[:, 0]
        p = torch.softmax(logits, -1, out=logits)
        ctx.save_for_backward(p, i, y >= 0)
        return (nll - p.amax(-1).log()).masked_fill(y < 0, 0).sum()          # the largest p is at least 1/V

    @staticmethod
    def backward(ctx, grad):
        p, i, scored = ctx.saved_tensors
        grad = (grad * scored)[:, None]
        return p.mul_(grad).scatter_add_(1, i, -grad), None


def summed_loss(logits, y):
    """Cross-entropy of logits (N, V), which it may overwrite, with targets y (N,), -1 where nothing is scored."""
    if logits.is_cpu and not torch.compiler.is_compiling():    # where new memory of that size takes a tenth of a step
        return CrossEntropy.apply(logits, y)
    return F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")


def step_of(model, dtype=None, compile=False, loss=summed_loss):
    """The unit of training: one call of the model, (x (B, T), y (B, T) or None, state) -> (summed loss, next state).

    Compiled it is one graph for any number of calls. If the compiler fails on this machine it says so in one line
    and runs the same function eagerly.
    """
    def step(x, y, state):
        with precision(model, dtype):
            logits, state = model(x, state)
        return None if y is None else loss(logits.flatten(0, 1).float(), y.flatten()), state

    if not compile:
        return step
    torch.compiler.reset()     # what was compiled for other models counts too, and after eight the compiler gives up
    fast = torch.compile(step, fullgraph=True, dynamic=False)

    def compiled(*args):
        nonlocal fast
        try:
            return fast(*args)
        except Exception as e:
            if fast is step:
                raise
            print(f"warning: torch.compile failed ({type(e).__name__}), going on without it", file=sys.stderr)
            fast = step
            return fast(*args)
    return compiled


def segments(model, x, y):
    """A window x, y (B, K*S) cut into its segments."""
    return list(zip(x.split(model.c.seg, 1), y.split(model.c.seg, 1)))


def calls(model, x, y, state):
    """The same, cut into what the model takes at once: as many segments as need not wait for each other; and where
    nothing is remembered, all of them, as rows."""
    if not state:
        return [(x.reshape(-1, model.c.seg), y.reshape(-1, model.c.seg))]
    n = min(model.parallel * model.c.seg, x.size(1))
    return list(zip(x.split(n, 1), y.split(n, 1)))


def objective(loss, state, scale, K):
    """What a segment adds to the quantity that is minimised: its share of the mean loss and of the mean `aux`."""
    return loss * scale + (state["aux"].mean() / K if "aux" in state else 0)


def bptt(model, step, x, y, state, scale):
    """Back-propagate through all K segments of a window, x and y (B, K*S); gradients add up in .grad.

    Returns the summed loss and the detached state behind the window. `scale` is 1 / (number of targets).
    """
    total, goal, parts = 0, 0, calls(model, x, y, state)
    for xs, ys in parts:
        loss, state = step(xs, ys, state)
        total, goal = total + loss.detach(), goal + objective(loss, state, scale, len(parts))
    goal.backward()
    return total, detach(state)


def replay(model, step, x, y, state, scale):
    """Memory-replay back-propagation (Memformer 2010.06891, algorithm 1): the gradients of `bptt` with the activations
    of one segment. Walk forwards without a graph and keep only the states; then backwards, each segment once more
    from its state, handing down the gradient of the state it began with."""
    start, states, parts = state, [detach(state)], segments(model, x, y)
    with torch.no_grad():
        for xs, _ in parts[:-1]:
            states.append(step(xs, None, states[-1])[1])
    total, after, grad = 0, None, {}
    for xs, ys in reversed(parts):
        leaf = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in states.pop().items()}
        loss, out = step(xs, ys, leaf)
        total, after = total + loss.detach(), after or detach(out)
        roots = {k: g for k, g in grad.items() if out[k].requires_grad}
        # one joint call: two would walk the segment's graph twice, and a compiled graph can be walked only once
        torch.autograd.backward([objective(loss, out, scale, len(parts)), *[out[k] for k in roots]],
                                [None, *roots.values()])
        grad = {k: v.grad for k, v in leaf.items() if v.grad is not None}
    learned = [k for k in grad if start[k].requires_grad]
    if learned:
        torch.autograd.backward([start[k] for k in learned], [grad[k] for k in learned])
    return total, after


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and generation

@torch.no_grad()
def evaluate(model, loader, windows=None, dtype=None, like=(), change=lambda state: state):
    """Read windows of a loader in order (all of a `once` loader, or the first `windows`), the state carried from one to
    the next. Yields (batch, nll (B, T) in nats, 0 where nothing is scored, hit (B, T): the likeliest token is right).
    Models are compared on the same positions: what one of the models `like` must leave out, this one leaves out too.
    `change` makes the state that a segment sees of the one it should see: what memory is worth is what this costs.
    """
    state, device = None, device_of(model)
    while windows is None or windows > 0:
        try:
            batch = scored(loader.next().to(device), model, *like)
        except StopIteration:
            return
        state = enter(model, state or model.init_state(len(batch.x)), batch.fresh)
        nll, hit = [], []
        for x, y in segments(model, batch.x, batch.y):
            with precision(model, dtype):
                logits, state = model(x, change(state))
            nll.append(F.cross_entropy(logits.transpose(1, 2).float(), y, ignore_index=-1, reduction="none"))
            hit.append(logits.argmax(-1) == y)
        yield batch, torch.cat(nll, 1), torch.cat(hit, 1)
        windows = windows and windows - 1


@contextlib.contextmanager
def overheard(model):
    """A list into which everything goes that a model with a search (gca) finds: numbers of chunks (B, n, k)."""
    heard, find = [], getattr(model, "find", None)

    def aloud(*args):
        found = find(*args)
        heard.append(found[-1])
        return found
    if find:
        model.find = aloud
    yield heard
    if find:
        del model.find


def met(model, batch, heard):
    """Where in a window (B, T), with which its text began, the chunk `batch.at` tokens back was found (overheard)."""
    t = torch.arange(batch.x.size(1), device=batch.x.device)
    picks = torch.cat([torch.cat(heard[g::model.c.groups], 1) for g in range(model.c.groups)], -1)   # (B, T/m, G k)
    return (picks[:, t // model.c.m] == ((t - batch.at) // model.c.m)[..., None]).any(-1)


class Reader:
    """A model with a book open in front of it: reads tokens, one or a million in a call, and predicts the next one.

    It holds the state behind the last full segment, and the tokens and the cache of the open one; so what a token
    costs, in time and in bytes, does not depend on how much was read before.
    """

    def __init__(self, model, B=1):
        self.model, self.count, self.logits = model, 0, None
        self.turn_page(model.init_state(B), torch.empty(B, 0, dtype=torch.long, device=device_of(model)))

    def turn_page(self, state, page):
        self.state, self.page, self.cache = state, page, None   # page (B, 0..S-1): the tokens of the open segment

    @torch.no_grad()
    def __call__(self, tokens):
        """Read tokens (B, T), T >= 1. Returns the logits (B, V) of the token that follows; they stay in .logits too."""
        model, S = self.model, self.model.c.seg
        while tokens.size(1):
            T = min(S - self.page.size(1), tokens.size(1))
            part, tokens = tokens[:, :T], tokens[:, T:]
            self.count += T
            if T == S:   # a whole segment at once
                logits, state = model(part, self.state)
                self.turn_page(state, self.page)
                continue
            logits, self.cache = model.extend(part, self.cache if self.page.size(1) else model.read(self.state))
            self.page = torch.cat([self.page, part], 1)
            if self.page.size(1) == S:
                self.turn_page(model.write(self.cache, self.state), self.page[:, :0].clone())
        self.logits = logits[:, -1].float().clone()   # a view would keep, and save, the logits of the whole segment
        return self.logits

    def generate(self, n, pick):
        """Write n tokens: pick(logits (B, V)) -> (B, 1) chooses each one. Yields a token when it has been read."""
        for _ in range(n):
            token = pick(self.logits)
            self(token)
            yield token

    def save(self, path):
        """What is remembered, to a file that `load` continues from with the same weights."""
        save(path, "memory", weights=fingerprint(self.model), state=self.state, page=self.page, count=self.count,
             logits=self.logits)

    @torch.no_grad()
    def load(self, path):
        memory = load(path, "memory")
        if memory["weights"] != fingerprint(self.model):
            raise UserError(f"{path} was remembered by other weights: load it with the checkpoint that made it")
        at = device_of(self.model)
        nobody = torch.zeros(len(memory["page"]), dtype=torch.bool)
        self.turn_page(enter(self.model, memory["state"], nobody), memory["page"].to(at))
        self.count, self.logits = memory["count"], memory["logits"].to(at)
        if self.page.size(1):
            self.cache = self.model.extend(self.page, self.model.read(self.state))[1]


# ----------------------------------------------------------------------------------------------------------------------
# Files

def fingerprint(model):
    digest = hashlib.sha256()
    for v in model.state_dict().values():
        digest.update(v.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(path, kind, **content):
    """Write a file that `load` reads with weights_only; the old one stays whole until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    torch.save(dict(format=f"nanomem {kind}", version=1, **content), scratch)
    os.replace(scratch, path)


def load(path, kind):
    """Read what `save` wrote, onto the CPU. Raises UserError if it is missing, cut off, or something else."""
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
    return content
