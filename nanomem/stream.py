"""The one loop over segments. It trains, evaluates and generates with any model and knows none of them."""
import contextlib
import os
import sys

import torch
from torch.nn import functional as F

from . import checkpoint
from .cli import UserError


def machine(device="", dtype="", compile=None):
    """Device, dtype and whether to compile; what is not given is chosen: the best device there is, bfloat16 and
    compiling on CUDA. Raises UserError if there is no such device."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = device or best
    try:
        device = torch.device(name)
        assert device.type in ("cpu", "cuda", "mps")
        if device.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, AttributeError):
        raise UserError(f"there is no device {device or name} here: choose another, as in --device=cpu") from None
    cuda = device.type == "cuda"
    dtype = dtype or ("bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32")
    return device, getattr(torch, dtype), cuda if compile is None else compile


def reset(model, state, fresh):
    """The state at the start of a BPTT window: batch elements that begin a new document (fresh (B,) True) get the
    model's initial state, through which gradient reaches a learned one; the others keep `state`. Each tensor goes to
    the device where the initial state has it: a large bank may lie in the CPU's memory."""
    def choose(start, v):
        return torch.where(fresh.to(start.device).view(-1, *[1] * (v.ndim - 1)), start, v.to(start.device))
    return {k: choose(start, state[k]) for k, start in model.init_state(len(fresh)).items()}


def detach(state):
    return {k: v.detach() for k, v in state.items()}


def nbytes(state):
    """Bytes that are remembered for one batch element."""
    return sum(v[0].nbytes for v in state.values())


def device_of(model):
    return model.head.weight.device


def precision(model, dtype):
    """Autocast on the model's device to dtype, or nothing for float32. Parameters and states stay float32."""
    if dtype in (None, torch.float32):
        return contextlib.nullcontext()
    return torch.autocast(device_of(model).type, dtype)


def scored(batch, *models):
    """The batch with targets of -1 wherever one of these models must not be scored: where it has seen the target."""
    y = batch.y
    for model in models:
        y = y.masked_fill(~model.scored().repeat(y.size(1) // model.c.seg), -1)
    return batch._replace(y=y)


# ----------------------------------------------------------------------------------------------------------------------
# Training

def make_step(model, dtype=None, compile=False):
    """The unit of training: one call of the model, (x (B, T), y (B, T) or None, state) -> (summed loss, next state).

    Compiled, it is one graph for any number of segments. If the compiler fails on this machine, it says so in one line
    and runs the same function eagerly.
    """
    def step(x, y, state):
        with precision(model, dtype):
            logits, state = model(x, state)
        if y is None:
            return None, state
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction="sum")
        return loss, state

    if not compile:
        return step
    torch.compiler.reset()     # the compiler's limit of eight graphs counts those of other models too
    fast = torch.compile(step, fullgraph=True, dynamic=False)

    def compiled(*args):
        nonlocal fast
        try:
            return fast(*args)
        except torch.OutOfMemoryError:
            raise                                          # without the compiler it needs more
        except Exception as e:
            if fast is step:
                raise
            why = f"{type(e).__name__}: {e}".splitlines()[0][:100]
            print(f"warning: torch.compile failed ({why}), going on without it", file=sys.stderr)
            fast = step
            return fast(*args)
    return compiled


def segments(model, x, y):
    """A BPTT window x, y (B, K*S), cut into its segments."""
    return list(zip(x.split(model.c.seg, 1), y.split(model.c.seg, 1)))


def calls(model, x, y, state):
    """The same, cut into what the model takes at once: as many segments as need not wait for each other. A model
    without a state takes all of them as batch elements."""
    if not state:
        return [(x.reshape(-1, model.c.seg), y.reshape(-1, model.c.seg))]
    n = min(model.parallel * model.c.seg, x.size(1))
    return list(zip(x.split(n, 1), y.split(n, 1)))


def objective(loss, state, scale, share, parts):
    """What one of the parts of a BPTT window adds to the quantity that is minimised: to the mean loss, and to the mean
    of `aux`."""
    return loss * scale + (state["aux"].mean() * share / parts if "aux" in state else 0)


def bptt(model, step, x, y, state, scale, share=1.0):
    """Back-propagate through all K segments of x and y (B, K*S); gradients add up in .grad.

    Returns the summed loss and the detached state after the last segment. `scale` is 1 / (number of targets); `share`
    is the part of the whole batch that x is, when the batch is split.
    """
    total, goal, parts = 0, 0, calls(model, x, y, state)
    for xs, ys in parts:
        loss, state = step(xs, ys, state)
        total, goal = total + loss.detach(), goal + objective(loss, state, scale, share, len(parts))
    goal.backward()
    return total, detach(state)


def replay(model, step, x, y, state, scale, share=1.0):
    """Memory-replay back-propagation (Memformer 2010.06891, algorithm 1): the gradients of `bptt` with the activations
    of one segment. Run forwards without a graph and keep only the states. Then go backwards: run each segment once more
    from its state, and hand the gradient of that state to the segment before."""
    start, states, parts = state, [detach(state)], segments(model, x, y)
    with torch.no_grad():
        for xs, _ in parts[:-1]:
            states.append(step(xs, None, states[-1])[1])
    total, last, grad = 0, None, {}
    for xs, ys in reversed(parts):
        leaf = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in states.pop().items()}
        loss, out = step(xs, ys, leaf)
        total, last = total + loss.detach(), last or detach(out)
        later = {k: g for k, g in grad.items() if out[k].requires_grad}
        # one call for the loss and all states: a compiled graph can be back-propagated only once
        torch.autograd.backward([objective(loss, out, scale, share, len(parts)), *[out[k] for k in later]],
                                [None, *later.values()])
        grad = {k: v.grad for k, v in leaf.items() if v.grad is not None}
    learned = [k for k in grad if start[k].requires_grad]            # an initial state that is a parameter
    if learned:
        torch.autograd.backward([start[k] for k in learned], [grad[k] for k in learned])
    return total, last


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and generation

@torch.no_grad()
def evaluate(model, loader, batches=None, dtype=None, like=(), change=lambda state: state):
    """Run over a loader in order (all of a `once` loader, or its first `batches`), the state carried from batch to
    batch. Yields (batch, nll (B, T) in nats, 0 where nothing is scored, correct (B, T): the likeliest token is right).

    Models are compared on the same positions: where one of the models `like` must not be scored, this one is not
    either. `change` maps the state before each segment to the one that the segment sees: what memory is worth is how
    much worse the loss is with an empty or a wrong one.
    """
    state, device = None, device_of(model)
    while batches is None or batches > 0:
        try:
            batch = scored(loader.next().to(device), model, *like)
        except StopIteration:
            return
        state = reset(model, state or model.init_state(len(batch.x)), batch.fresh)
        nll, correct = [], []
        for x, y in segments(model, batch.x, batch.y):
            with precision(model, dtype):
                logits, state = model(x, change(state))
            nll.append(F.cross_entropy(logits.transpose(1, 2).float(), y, ignore_index=-1, reduction="none"))
            correct.append(logits.argmax(-1) == y)
        yield batch, torch.cat(nll, 1), torch.cat(correct, 1)
        if batches is not None:
            batches -= 1


class Reader:
    """A model in the middle of a text: takes more tokens, one or a million in a call, and predicts the next one.

    It holds the state after the last whole segment, and the tokens and the cache of the open segment. So what a token
    costs, in time and in bytes, does not depend on how much came before.
    """

    def __init__(self, model, B=1):
        self.model, self.count, self.logits = model, 0, None
        self.begin_segment(model.init_state(B), torch.empty(B, 0, dtype=torch.long, device=device_of(model)))

    def begin_segment(self, state, tokens):
        self.state, self.tokens, self.cache = state, tokens, None    # tokens (B, 0..S-1) of the open segment

    @torch.no_grad()
    def __call__(self, tokens):
        """Take tokens (B, T), T >= 1. Returns the logits (B, V) of the token that follows; .logits keeps them."""
        model, S = self.model, self.model.c.seg
        while tokens.size(1):
            T = min(S - self.tokens.size(1), tokens.size(1))
            part, tokens = tokens[:, :T], tokens[:, T:]
            self.count += T
            if T == S:                                               # a whole segment at once
                logits, state = model(part, self.state)
                self.begin_segment(state, self.tokens)
                continue
            logits, self.cache = model.extend(part, self.cache if self.tokens.size(1) else model.read(self.state))
            self.tokens = torch.cat([self.tokens, part], 1)
            if self.tokens.size(1) == S:
                self.begin_segment(model.write(self.cache, self.state), self.tokens[:, :0].clone())
        self.logits = logits[:, -1].float().clone()   # a view would keep, and save, the logits of the whole segment
        return self.logits

    def generate(self, n, pick):
        """Write n tokens: pick(logits (B, V)) -> (B, 1) chooses each one. Yields a token after it has been taken in."""
        for _ in range(n):
            token = pick(self.logits)
            self(token)
            yield token

    def save(self, path):
        """Write what is remembered to a file. `load` goes on from it with the same weights."""
        checkpoint.save(path, "memory", weights=checkpoint.weights_hash(self.model), state=self.state,
                        tokens=self.tokens, count=self.count, logits=self.logits)

    @torch.no_grad()
    def load(self, path):
        memory = checkpoint.load(path, "memory")
        with checkpoint.using(path):
            if memory["weights"] != checkpoint.weights_hash(self.model):
                raise UserError(f"{path} was made with other weights: load it with the checkpoint that made it")
            device, tokens, c = device_of(self.model), memory["tokens"], self.model.c
            shape = lambda state: {k: (v.shape, v.dtype) for k, v in state.items()}
            assert shape(memory["state"]) == shape(self.model.init_state(len(tokens))), "another state"
            assert tokens.shape[1:] < (c.seg,) and ((0 <= tokens) & (tokens < c.vocab)).all(), "no tokens of a segment"
            logits = memory["logits"]
            assert logits.shape == (len(tokens), c.vocab) and logits.dtype == torch.float32, "no prediction"
            none_fresh = torch.zeros(len(tokens), dtype=torch.bool)
            self.begin_segment(reset(self.model, memory["state"], none_fresh), tokens.to(device))
            self.count, self.logits = int(memory["count"]), logits.to(device)
            if self.tokens.size(1):
                self.cache = self.model.extend(self.tokens, self.model.read(self.state))[1]
