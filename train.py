"""Train any model, on books or on a synthetic task.

    python train.py --model=rmt                       on the embedded book: a few minutes on a laptop
    python train.py --model=xl --data=data/pg19       on shards made by python -m nanomem.pg19 or nanomem.data
    python train.py --model=rmt --data=recall         on a task whose answers lie segments back
    python train.py --model=rmt --resume              go on where out/rmt stopped, to the bit
    torchrun --nproc_per_node=2 train.py --model=rmt  the same run on several devices
"""
import contextlib
import csv
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import nanomem
from nanomem import checkpoint, cli, data, stream, tasks
from nanomem.cli import UserError
from nanomem.models import gpt


@dataclass
class Run:
    model: str = "rmt"           # gpt, window, xl, full, rmt, hmt, memformer, memoryllm, mplus, mamba, bmojo, gca, ...
    data: str = ""               # folder of shards, or a task (recall, mqar, needle:distance=9); without it Moby-Dick
    tokenizer: str = "gpt2-4k"   # for the embedded book: gpt2-4k, gpt2 or bytes (shards bring their own)
    out: str = ""                # folder for checkpoints and log (without it out/MODEL)
    resume: bool = False         # go on from last.pt of that folder
    overwrite: bool = False      # start anew in a folder that holds a run
    steps: int = 600             # optimizer steps
    batch: int = 8               # B, books side by side, on all devices together
    segments: int = 4            # K, segments in a BPTT window: how far back-propagation reaches
    interleave: int = 1          # books that a batch element alternates between
    interleave_len: int = 1      # segments from one book before the next has its turn
    replay: bool = False         # memory replay: the same gradients with one segment's activations, a third more time
    accum: int = 1               # parts that a batch is split into, one after the other
    lr: float = 4e-3             # peak learning rate of AdamW
    warmup: float = 0.02         # part of the steps in which it rises from 0
    cooldown: float = 0.65       # part of the steps in which it falls to 0, at the end
    decay: float = 0.1           # weight decay, of the matrices only
    clip: float = 1.0            # largest norm of the gradient
    log_interval: int = 20       # steps between two lines of the log
    eval_interval: int = 200     # steps between two evaluations, each followed by a checkpoint
    eval_batches: int = 16       # batches in an evaluation
    seed: int = 1                # of the weights and of the order of the books
    device: str = ""             # cpu, cuda, mps (without it the best there is)
    dtype: str = ""              # float32, bfloat16 (without it bfloat16 on CUDA)
    compile: bool = None         # one graph for each segment (without it on CUDA only)


def parse(argv):
    """The command line as a Run's fields and the model's own fields, only what was typed."""
    name = cli.peek(argv, "model", Run.model)
    (run, fields), words = cli.parse(argv, Run, nanomem.model_class(name).Config)
    if words:
        raise UserError(f"train.py takes only flags, got {words[0]}: did you mean --data={words[0]}?")
    return run, fields


def check(run, world):
    for name in ("steps", "batch", "segments", "interleave", "interleave_len", "accum", "log_interval", "eval_interval",
                 "eval_batches"):
        if getattr(run, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(run, name)}")
    if run.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype is float32 or bfloat16, got {run.dtype}")
    if run.batch % (world * run.accum):
        raise UserError(f"--batch={run.batch} does not split over {world} devices x {run.accum} parts")


def loaders(run, seg):
    """A loader for training, a function that opens one for evaluation, and the size of the vocabulary."""
    T, interleave = run.segments * seg, dict(interleave=run.interleave, interleave_len=run.interleave_len * seg)
    if tasks.is_task(run.data):
        return (tasks.TaskLoader(run.data, run.batch, T, seed=run.seed),
                lambda: tasks.TaskLoader(run.data, run.batch, T, seed=(run.seed, 1)), tasks.vocab_of(run.data))
    books, held_out = (data.open_books(run.data, split, run.tokenizer) for split in ("train", "validation"))
    run.tokenizer = books.enc.name
    cursors = run.batch * run.interleave
    piece = None if len(held_out) >= cursors else -(-sum(map(len, held_out.tokens)) // cursors)
    return (data.Loader(books, run.batch, T, run.seed, **interleave),
            lambda: data.Loader(held_out, run.batch, T, once=True, piece=piece, **interleave), books.enc.n_vocab)


def optimizer_of(model, run):
    """AdamW. Only the matrices of linear layers decay, no embedding and no memory does."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = [dict(params=[p for p in model.parameters() if (id(p) in matrices) == decays],
                   weight_decay=decays * run.decay) for decays in (True, False)]
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(run, step):
    """A short rise, a plateau, a straight line down to zero."""
    up, down = run.warmup * run.steps, run.cooldown * run.steps
    return run.lr * min(1, (step + 1) / max(1, up), (run.steps - step) / max(1, down))


def validate(model, loader, batches, dtype):
    """On the first batches of the held-out text: the mean loss in nats a token, and the part of correct guesses."""
    nll, hits, n = 0.0, 0, 0
    model.eval()
    for batch, loss, correct in stream.evaluate(model, loader, batches, dtype):
        asked = batch.y >= 0
        nll, hits, n = nll + loss.sum().item(), hits + (correct & asked).sum().item(), n + asked.sum().item()
    model.train()
    return nll / n, hits / n


@contextlib.contextmanager
def catch_ctrl_c():
    """A list that the first Ctrl-C fills, so that the step can end and be saved. The second one does not wait."""
    stop = []
    before = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(1))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def load_run(last, typed, fields):
    """The checkpoint to go on from, after making sure that what was typed does not contradict it."""
    saved = checkpoint.load(last, "checkpoint")
    was = {**saved["run"], **saved["config"], "model": saved["name"]}
    fixed = ("data", "tokenizer", "batch", "segments", "interleave", "interleave_len", "seed")
    for k, v in {**{k: typed.get(k, was[k]) for k in fixed}, **fields, "model": typed.get("model", Run.model)}.items():
        if v != was[k]:
            raise UserError(f"{last} was made with --{k}={was[k]}, not {v}: leave the flag out, or change --out")
    return saved


def main(argv):
    typed, fields = parse(argv)
    run, saved = Run(**typed), None
    out = Path(run.out or f"out/{run.model}")
    last, top = out / "last.pt", out / "best.pt"
    if run.resume:
        saved = load_run(last, typed, fields)
        run, fields = Run(**{**saved["run"], **typed}), saved["config"]
        if saved["step"] >= run.steps:
            raise UserError(f"{last} has done all of its {run.steps} steps: --steps=N with a larger N goes on")
    elif last.exists() and not run.overwrite:
        raise UserError(f"{out} holds a run already: --resume, --overwrite it, or choose another --out")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(run, world)
    device, dtype, compile = stream.machine(run.device, run.dtype, run.compile)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # the data, the model, the optimizer, and where they stopped
    torch.manual_seed(run.seed)
    loader, held_out, vocab = loaders(run, fields.get("seg", gpt.Config.seg))
    fields.setdefault("vocab", -(-vocab // 64) * 64)   # a round number is faster; the last entries are no tokens
    if fields["vocab"] < vocab:
        raise UserError(f"--vocab={fields['vocab']} is too small: the data has {vocab} different tokens")
    model = nanomem.build(run.model, **fields).to(device)
    optimizer = optimizer_of(model, run)
    B = run.batch // world                             # batch elements of this process
    state, start, best, seconds = stream.detach(model.init_state(B)), 0, math.inf, 0.0
    if saved:
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        torch.set_rng_state(saved["rng"])
        state = {k: v[rank * B:(rank + 1) * B].to(device) for k, v in saved["state"].items()}
        start, best, seconds = saved["step"], saved["best"], saved["seconds"]
    forward = stream.make_step(model, dtype, compile)
    backward = stream.replay if run.replay else stream.bptt

    def save(step, *paths):
        """All that the next step depends on. The state's batch elements come together from all processes."""
        whole = dict(state)
        for k, v in state.items() if world > 1 else ():
            parts = [torch.empty_like(v) for _ in range(world)]
            dist.all_gather(parts, v.contiguous())
            whole[k] = torch.cat(parts)
        for path in paths if rank == 0 else ():
            checkpoint.save(path, "checkpoint", name=run.model, config=asdict(model.c), run=asdict(run), step=step,
                            best=best, seconds=seconds, weights=model.state_dict(), optimizer=optimizer.state_dict(),
                            loader=loader.state_dict(), state=whole, rng=torch.get_rng_state())

    tokens = run.batch * run.segments * model.c.seg    # in a step
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not saved:
            last.unlink(missing_ok=True), top.unlink(missing_ok=True)
            (out / "log.csv").write_text("step,loss,val_loss,val_accuracy,lr,grad_norm,tokens_per_s,minutes\n")
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{run.model} on {run.data or 'Moby-Dick'}: {size:.2f}M parameters, "
              f"{stream.nbytes(state) / 1024:.0f} KB of state a book; {run.steps} steps of {tokens:,} tokens; "
              f"{world} x {device}, {str(dtype)[6:]}, {'compiled' if compile else 'eager'}")

    bar = tqdm(range(start, run.steps), initial=start, total=run.steps, unit="step", desc=run.model, disable=rank > 0)
    losses, clock = [], time.perf_counter()
    with catch_ctrl_c() as stop:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run, step)
            batch = stream.scored(loader.next().elements(rank * B, (rank + 1) * B).to(device), model)
            targets, loss, ends = (batch.y >= 0).sum(), 0, []
            if world > 1:
                dist.all_reduce(targets)               # a token weighs the same whichever process has it
            targets.clamp_(min=1)                      # a batch of a task may ask nothing
            for i in range(0, B, B // run.accum):
                part = slice(i, i + B // run.accum)
                begin = stream.reset(model, {k: v[part] for k, v in state.items()}, batch.fresh[part])
                total, end = backward(model, forward, batch.x[part], batch.y[part], begin, 1 / targets,
                                      share=1 / (world * run.accum))
                loss = loss + total / targets
                ends.append(end)
            state = {k: torch.cat([end[k] for end in ends]) for k in state}
            sums = torch.stack([loss, loss.new_tensor(float(len(stop)))])
            if world > 1:                              # by hand: DDP expects one backward a step, replay makes K
                for p in model.parameters():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    dist.all_reduce(p.grad)
                dist.all_reduce(sums)
            loss, stopped = sums.tolist()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip).item()
            for name, v in dict(loss=loss, gradient=grad_norm).items():
                if not math.isfinite(v):
                    raise UserError(f"the {name} is {v} at step {step}: try a lower --lr"
                                    + (f"; {last} is the last good checkpoint" if last.exists() else ""))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)

            # log, evaluate, save
            done = step + 1
            evaluates, ends_here = done % run.eval_interval == 0 or done == run.steps, done == run.steps or bool(stopped)
            if not (evaluates or ends_here or done % run.log_interval == 0):
                continue
            spent = time.perf_counter() - clock
            seconds, speed = seconds + spent, tokens * len(losses) / spent
            mean, losses, val_loss, accuracy = sum(losses) / len(losses), [], None, None
            if rank == 0:
                if evaluates:
                    val_loss, accuracy = validate(model, held_out(), run.eval_batches, dtype)
                val = f"val {val_loss:6.3f} {accuracy:6.1%}" if evaluates else " " * 17
                bar.write(f"{done:7d}  loss {mean:6.3f}  {val}  lr {learning_rate(run, step):.1e}  "
                          f"grad {grad_norm:6.2f}  {speed / 1e3:7.1f}k tok/s"
                          f"  {(run.steps - done) * tokens / speed / 60:6.1f} min left")
                with open(out / "log.csv", "a", newline="") as f:
                    csv.writer(f).writerow([done, mean, val_loss, accuracy, learning_rate(run, step), grad_norm, speed,
                                            seconds / 60])
            if evaluates or ends_here:
                better = evaluates and rank == 0 and val_loss < best
                best = val_loss if better else best
                save(done, last, *([top] if better else []))
            if stopped:
                break
            clock = time.perf_counter()
    bar.close()
    if world > 1:
        dist.barrier()                 # a process that exits while its last message is on its way may abort
        dist.destroy_process_group()
    finished = done == run.steps
    if rank == 0:
        print(f"saved {last}" if finished else f"stopped after {done} steps and saved: --resume goes on from {last}")
    return 0 if finished else 130


if __name__ == "__main__":
    cli.run(main)
