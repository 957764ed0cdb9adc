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
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import nanomem
from nanomem import checkpoint, cli, data, footprint, optim, stream, tasks
from nanomem.cli import UserError


SAVE_EVERY = 300   # seconds between two checkpoints at most: what a kill can cost
LOG = "step,loss,val_loss,val_accuracy,lr,grad_norm,tokens_per_s,minutes"   # the first line of log.csv


class Diverged(UserError):
    """The loss or the gradient is no number any more."""


@dataclass
class Run:
    model: str = "rmt"           # gpt, window, xl, full, rmt, hmt, memformer, mamba, gca, ..., or a file: folder/hmt.py
    data: str = ""               # folder of shards, or a task (recall, mqar, needle:distance=9); without it Moby-Dick
    tokenizer: str = "gpt2-4k"   # for the embedded book: gpt2-4k, gpt2 or bytes (shards bring their own)
    out: str = ""                # folder for checkpoints and log (without it out/MODEL)
    resume: bool = False         # go on from last.pt of that folder
    overwrite: bool = False      # start anew in a folder that holds a run
    steps: int = 600             # optimizer steps
    minutes: float = 0           # save and stop after so many minutes, --resume goes on; 0: when all steps are done
    batch: int = 8               # B, books side by side, on all devices together
    segments: int = 4            # K, segments in a BPTT window: how far back-propagation reaches
    interleave: int = 1          # books that a batch element alternates between
    interleave_len: int = 1      # segments from one book before the next has its turn
    replay: bool = False         # memory replay: the same gradients with one segment's activations, a third more time
    accum: int = 1               # parts that a batch is split into, one after the other
    muon: float = 0.04           # peak learning rate of Muon, for the matrices of the blocks (0: AdamW for these too)
    lr: float = 4e-3             # peak learning rate of AdamW, for the rest: embedding, head, vectors, memories
    warmup: float = 0.02         # part of the steps in which the rates rise from 0
    cooldown: float = 0.65       # part of the steps in which they fall to 0, at the end
    decay: float = 0.1           # weight decay, of the matrices only
    clip: float = 1.0            # largest norm of the gradient (0: no limit)
    log_interval: int = 20       # steps between two lines of the log
    eval_interval: int = 200     # steps between two evaluations, each followed by a checkpoint
    eval_batches: int = 16       # batches in an evaluation
    seed: int = 1                # of the weights and of the order of the books
    device: str = ""             # cpu, cuda, mps (without it the best there is)
    dtype: str = ""              # float32, bfloat16 (without it bfloat16 on CUDA)
    compile: bool = None         # one graph for each segment (without it on CUDA only)


def parse(argv, name=Run.model):
    """The command line as a Run's fields and the model's own fields, only what was typed. `name` is the model where
    --model is not typed."""
    name = cli.peek(argv, "model", name)
    (run, fields), words = cli.parse(argv, Run, nanomem.model_class(name).Config)
    if words:
        flag = "model" if words[0] in nanomem.MODELS or words[0].endswith(".py") else "data"
        raise UserError(f"train.py takes only flags, got {words[0]}: did you mean --{flag}={words[0]}?")
    if run.get("data") and not tasks.is_task(run["data"]):
        run["data"] = os.path.normpath(run["data"])    # data/mine/ is data/mine
    return run, fields


def load_run(argv):
    """The checkpoint that --resume goes on from; None without --resume."""
    if not any(arg.lower() in ("--resume", "--resume=yes", "--resume=true", "--resume=1") for arg in argv):
        return None
    out = cli.peek(argv, "out", f"out/{Path(cli.peek(argv, 'model', Run.model)).stem}")
    return checkpoint.load(Path(out) / "last.pt", "checkpoint")


def check(run, world):
    """Raises UserError for a value that makes no sense."""
    cli.check_types(run, "--")
    for name in ("steps", "batch", "segments", "interleave", "interleave_len", "accum", "log_interval", "eval_interval",
                 "eval_batches"):
        if getattr(run, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(run, name)}")
    for name in ("minutes", "muon", "lr", "decay", "clip", "seed"):
        if getattr(run, name) < 0:
            raise UserError(f"--{name} must not be negative, got {getattr(run, name)}")
    for name in ("warmup", "cooldown"):
        if not 0 <= getattr(run, name) <= 1:
            raise UserError(f"--{name} is a part of the steps, between 0 and 1, got {getattr(run, name)}")
    if run.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype is float32 or bfloat16, got {run.dtype}")
    if run.batch % (world * run.accum):
        raise UserError(f"--batch={run.batch} does not split over {world} devices x {run.accum} parts")


def loaders(run, typed, seg):
    """A loader for training, a function that opens one for evaluation, the size of the vocabulary, and a fingerprint of
    the data."""
    T, interleave = run.segments * seg, dict(interleave=run.interleave, interleave_len=run.interleave_len * seg)
    if tasks.is_task(run.data):
        for flag in typed.keys() & {"tokenizer", "interleave", "interleave_len"}:
            raise UserError(f"--{flag} is for books, and {run.data} is a task: leave it out")
        return (tasks.TaskLoader(run.data, run.batch, T, seed=run.seed),
                lambda: tasks.TaskLoader(run.data, run.batch, T, seed=(run.seed, 1, 1)), tasks.vocab_of(run.data), "")
    if run.data and not Path(run.data).exists():
        raise UserError(f"there is no folder {run.data}, and no task of that name: "
                        + cli.nearest(run.data.partition(":")[0], list(tasks.TASKS)))
    books, held_out = (data.open_books(run.data, split, run.tokenizer) for split in ("train", "validation"))
    if typed.get("tokenizer", books.enc.name) != books.enc.name:
        raise UserError(f"{run.data} was made with the tokenizer {books.enc.name}: leave --tokenizer out")
    run.tokenizer = books.enc.name
    cursors = run.batch * run.interleave
    piece = None if len(held_out) >= cursors else -(-sum(map(len, held_out.tokens)) // cursors)
    return (data.Loader(books, run.batch, T, run.seed, **interleave),
            lambda: data.Loader(held_out, run.batch, T, once=True, piece=piece, **interleave), books.enc.n_vocab,
            books.fingerprint())


def schedule(run, step):
    return optim.schedule(step, run.steps, run.warmup, run.cooldown)


def validate(model, loader, batches, dtype):
    """On the first batches of the held-out text: the mean loss in nats a token, and the part of correct guesses. Both
    are NaN if nothing is scored there."""
    nll, right, n = 0.0, 0, 0
    model.eval()
    for batch, loss, correct in stream.evaluate(model, loader, batches, dtype):
        asked = batch.y >= 0
        nll, right, n = nll + loss.sum().item(), right + (correct & asked).sum().item(), n + asked.sum().item()
    model.train()
    return (nll / n, right / n) if n else (math.nan, math.nan)


def check_resume(saved, run, typed, fields):
    """Raises UserError where what was typed contradicts the run that goes on."""
    was = {**saved["run"], **saved["config"], "model": saved["name"]}
    fixed = ("model", "data", "tokenizer", "batch", "segments", "interleave", "interleave_len", "seed", "muon", "decay")
    for k in (*fixed, *fields):
        new = typed.get(k, fields.get(k, was.get(k)))
        if k not in was or new != was[k]:
            raise UserError(f"this run was made with --{k}={was.get(k)}, not {new}: leave the flag out, or begin a new "
                            "run with another --out and without --resume")
    if saved["step"] >= run.steps:
        raise UserError(f"this run has done {saved['step']} steps: --steps=N with a larger N goes on")
    if saved.get("code", "") != nanomem.code_of(saved["name"]):
        print(f"note: {saved['name']} has changed since this run was saved")
    if run.steps != was["steps"]:
        print(f"note: with {run.steps} steps the learning rate is now {schedule(run, saved['step']):.0%} of its peak; "
              f"with {was['steps']} it was {schedule(Run(**saved['run']), min(saved['step'], was['steps'] - 1)):.0%}")


def new_log(out, step):
    """log.csv with its lines up to this step; those that came later will be done again."""
    lines = (out / "log.csv").read_text().splitlines() if step and (out / "log.csv").exists() else []
    kept = [line for line in lines[1:] if line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step]
    (out / "log.csv").write_text("\n".join([LOG, *kept]) + "\n")


def main(argv):
    saved = load_run(argv)
    typed, fields = parse(argv, str(saved.get("name")) if saved else Run.model)
    run = Run(**typed)
    out = Path(run.out or f"out/{Path(run.model).stem}")
    if saved:
        with checkpoint.using(out / "last.pt"):
            run = Run(**{**saved["run"], "minutes": 0, **typed, "model": typed.get("model", saved["name"])})
            check_resume(saved, run, typed, fields)
            fields = dict(saved["config"])
            cli.check_types(nanomem.model_class(run.model).Config(**fields))
    elif not run.overwrite and ((out / "last.pt").exists() or (out / "best.pt").exists()):
        resume = "--resume to go on, or " if (out / "last.pt").exists() else ""
        raise UserError(f"{out} holds a run already: add {resume}--overwrite to replace it, or choose another --out")
    checkpoint.target(out / "log.csv", "log of a run", LOG.encode())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(run, world)
    with checkpoint.lock(out) if rank == 0 else contextlib.nullcontext():
        return train(run, typed, fields, saved, out, rank, world)


def train(run, typed, fields, saved, out, rank, world):
    """The page: everything is made, then loaded if a run goes on, then comes the loop. Returns the exit code."""
    last, top = out / "last.pt", out / "best.pt"
    device, dtype, compile = stream.machine(run.device, run.dtype, run.compile)
    if world > 1 and device.type == "mps":
        raise UserError("several processes need CUDA or CPUs: add --device=cpu")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    # the data, the model, the optimizers, and where they stopped
    torch.manual_seed(run.seed)
    seg = fields.get("seg", nanomem.model_class(run.model).Config.seg)
    loader, held_out, vocab, data_hash = loaders(run, typed, seg)
    fields.setdefault("vocab", -(-vocab // 64) * 64)   # a round number is faster; the last entries are no tokens
    if fields["vocab"] < vocab:
        raise UserError(f"--vocab={fields['vocab']} is too small: the data has {vocab} different tokens")
    with torch.device("meta"):                         # nothing is made yet
        footprint.check_weights(nanomem.build(run.model, **fields), device)
    model, code = nanomem.build(run.model, **fields).to(device), nanomem.code_of(run.model)
    backward = stream.replay if run.replay else stream.bptt
    optimizers = optim.optimizers_of(model, run.muon, run.lr, run.decay)
    B = run.batch // world                             # batch elements of this process
    needs = footprint.check_step(model, backward, dtype, B, run.segments, run.accum, compile)
    state, start, best, seconds = stream.detach(model.init_state(B)), 0, math.inf, 0.0
    if saved:
        with checkpoint.using(last):
            if saved["data_hash"] != data_hash:
                raise UserError(f"{run.data or 'the embedded book'} is not the data that this run was trained on")
            checkpoint.set_weights(model, saved["weights"])
            for (optimizer, _), was in zip(optimizers, saved["optimizers"], strict=True):
                checkpoint.set_optimizer(optimizer, was)
            loader.load_state_dict(saved["loader"])
            torch.set_rng_state(saved["rng"])
            for k, v in state.items():
                whole = saved["state"][k]
                assert whole.shape[1:] == v.shape[1:] and whole.dtype == v.dtype, "another state"
                state[k] = whole[rank * B:(rank + 1) * B].to(v.device).view_as(v)
            start, best, seconds = int(saved["step"]), float(saved["best"]), float(saved["seconds"])
    forward = stream.make_step(model, dtype, compile)

    def save(step, *paths):
        """All that the next step depends on. The state's batch elements come together from all processes."""
        whole = dict(state)
        for k, v in state.items() if world > 1 else ():
            parts = [torch.empty_like(v) for _ in range(world)]
            dist.all_gather(parts, v.contiguous())
            whole[k] = torch.cat(parts)
        for path in paths if rank == 0 else ():
            checkpoint.save(path, "checkpoint", name=run.model, config=asdict(model.c), run=asdict(run), step=step,
                            best=best, seconds=seconds, data_hash=data_hash, weights=dict(model.state_dict()),
                            code=code,
                            optimizers=[optimizer.state_dict() for optimizer, _ in optimizers], state=whole,
                            loader=loader.state_dict(), rng=torch.get_rng_state())

    tokens = run.batch * run.segments * model.c.seg    # in a step
    if rank == 0:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{run.model} on {run.data or 'Moby-Dick'}: {size:.2f}M parameters, "
              f"{stream.nbytes(state) / 1024:.0f} KB of state a book; {run.steps} steps of {tokens:,} tokens; "
              f"{world} x {device}, {str(dtype)[6:]}, {'compiled' if compile else 'eager'}\n{needs}")

    bar = tqdm(range(start, run.steps), initial=start, total=run.steps, unit="step", desc=run.model, disable=rank > 0)
    losses, norms, clock = [], [], time.perf_counter()
    until, saved_at, has_saved = clock + 60 * (run.minutes or math.inf), clock, bool(saved)
    with cli.catch_stop() as stop:
        for step in bar:                               # from here to the log, no line waits for the device
            for optimizer, peak in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * schedule(run, step)
            batch = stream.scored(loader.next().elements(rank * B, (rank + 1) * B).to(device), model)
            targets, loss, ends = (batch.y >= 0).sum(), 0, []
            if world > 1:
                dist.all_reduce(targets)               # a token weighs the same whichever process has it
            targets.clamp_(min=1)                      # a batch of a task may ask nothing
            for i in range(0, B, B // run.accum):
                part = slice(i, i + B // run.accum)
                begin = stream.reset(model, {k: v[part] for k, v in state.items()}, batch.fresh[part])
                total, after = backward(model, forward, batch.x[part], batch.y[part], begin, 1 / targets,
                                        share=1 / (world * run.accum))
                loss = loss + total / targets
                ends.append(after)
            state = {k: torch.cat([after[k] for after in ends]) for k in state}
            now = time.perf_counter()
            stopped, saves = bool(stop) or now > until, now > saved_at + SAVE_EVERY
            if world > 1:                              # by hand: DDP expects one backward a step, replay makes K
                for p in model.parameters():
                    if p.grad is not None:             # else it has none in any process
                        dist.all_reduce(p.grad)
                dist.all_reduce(loss)
                asked = torch.tensor([stopped, saves], dtype=torch.uint8)     # on the CPU: nothing waits for the device
                dist.all_reduce(asked, dist.ReduceOp.MAX)                     # all save and stop after the same step
                stopped, saves = asked.tolist()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), run.clip or math.inf))
            losses.append(loss)                        # a number would wait for the device
            for optimizer, _ in optimizers:
                optimizer.step()
            model.zero_grad()

            # log, evaluate, save
            done = step + 1
            evaluates = done % run.eval_interval == 0 or done == run.steps
            if not (evaluates or stopped or saves or done % run.log_interval == 0):
                continue
            losses, norms = torch.stack(losses).tolist(), torch.stack(norms).tolist()
            for n, numbers in enumerate(zip(losses, norms), done - len(losses) + 1):
                for name, v in zip(("loss", "gradient"), numbers):
                    if not math.isfinite(v):
                        raise Diverged(f"the {name} is {v} at step {n}: try a lower --lr or --muon"
                                        + (f"; {last} is the last good checkpoint" if has_saved else ""))
            spent = time.perf_counter() - clock
            seconds, speed = seconds + spent, tokens * len(losses) / spent
            mean, norm, val_loss, accuracy, problem = sum(losses) / len(losses), norms[-1], None, None, None
            if rank == 0:
                if evaluates:
                    try:
                        val_loss, accuracy = validate(model, held_out(), run.eval_batches, dtype)
                    except Exception as e:             # first save, then say so
                        val_loss, accuracy, problem = math.nan, math.nan, e
                rate = run.lr * schedule(run, step)
                if done <= start + len(losses):
                    new_log(out, start)
                    for path in (last, top) if not saved else ():
                        path.unlink(missing_ok=True)       # of the run that this one overwrites
                with open(out / "log.csv", "a", newline="") as f:
                    row = [done, mean, val_loss, accuracy, rate, norm, speed, seconds / 60]
                    csv.writer(f, lineterminator="\n").writerow(row)
            if evaluates or stopped or saves:
                better = evaluates and rank == 0 and val_loss < best
                best = val_loss if better else best
                save(done, *([top] if better else []), last)     # in this order: what a kill leaves is made good again
                has_saved, saved_at = True, time.perf_counter()
            if rank == 0:                              # after saving: the terminal may be gone
                val = f"val {val_loss:6.3f} {accuracy:6.1%}" if evaluates else " " * 17
                left = (run.steps - done) * tokens / speed / 60
                line = (f"{done:7d}  loss {mean:6.3f}  {val}  lr {rate:.1e}  grad {norm:6.2f}  "
                        f"{speed / 1e3:7.1f}k tok/s  {left:6.1f} min left")
                try:
                    bar.write(line)
                except BrokenPipeError:                # as in: | head. The next step saves, and is the last
                    stop.append(1)
            if problem:
                raise problem
            if stopped:
                break
            losses, norms, clock = [], [], time.perf_counter()
    bar.close()
    if world > 1:
        dist.barrier()                 # a process that exits while its last message is on its way may abort
        dist.destroy_process_group()
    finished = done == run.steps
    if rank == 0:
        print(f"saved {last}" if finished else f"stopped after {done} steps and saved: --resume goes on from {last}")
    return 130 if stop and not finished else 0


if __name__ == "__main__":
    cli.run(main)
