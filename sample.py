"""Continue a text with a trained model, its memory carried along: a token costs the same after a line and after a book.

    python sample.py out/rmt --prompt="Call me Ishmael."
    python sample.py out/rmt --file=book.txt --tokens=0 --save-memory=book.pt    read a book once, keep the memory
    python sample.py out/rmt --load-memory=book.pt --prompt=" And then"  go on from there, as often as you like
    cat book.txt | python sample.py out/rmt --prompt="And then"          without --file, what is piped comes first
    python sample.py out/rmt --file=book.txt --look=look.html            a page that shows where memory is worth what
"""
import codecs
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import nanomem
from nanomem import checkpoint, cli, data, look, stream, tasks
from nanomem.cli import UserError


@dataclass
class Sample:
    prompt: str = ""          # text to continue
    file: str = ""            # a file to read before the prompt, - for standard input
    tokens: int = 200         # tokens to write
    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int = 0            # choose among the k most likely tokens (0: all)
    top_p: float = 1.0        # choose among the most likely tokens that together have this probability
    seed: int = 0             # of the choices
    save_memory: str = ""     # file for what is remembered at the end
    load_memory: str = ""     # file of an earlier --save-memory to go on from
    look: str = ""            # file for a page that shows what memory is worth at each token of the text
    device: str = ""          # cpu, cuda, mps (without it the best there is)


def picker(s, vocab, device):
    """How a token is chosen from logits (B, V): (B, 1), never one of the entries behind the vocabulary."""
    generator = torch.Generator(device).manual_seed(s.seed)

    def pick(logits):
        logits = logits[:, :vocab]
        if s.temperature < 1e-6:                           # 0, or too small to divide by
            return logits.argmax(-1, keepdim=True)
        logits, tokens = (logits / s.temperature).sort(descending=True)
        p = logits.softmax(-1)
        if not p.isfinite().all():
            raise UserError("the model predicts no numbers (NaN): its weights or this memory are damaged")
        keep = p.cumsum(-1) - p < s.top_p
        keep[:, :1] = True
        if s.top_k:
            keep[:, s.top_k:] = False
        return tokens.gather(1, (p * keep).multinomial(1, generator=generator))
    return pick


def standard_input(s):
    """What comes through a pipe or from a redirected file, else ""."""
    if s.file == "-" and sys.stdin:
        return sys.stdin.read()
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):          # no such thing as standard input
        return ""
    text = sys.stdin.read() if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else ""
    if text and s.prompt:                                  # in a loop of a shell it may be what the next turns need
        print(f"note: {len(text):,} characters of standard input come before the prompt", file=sys.stderr)
    return text


def main(argv):
    (typed,), words = cli.parse(argv, Sample)
    s = Sample(**typed)
    if len(words) != 1:
        raise UserError("name one checkpoint: python sample.py out/rmt --prompt=TEXT")
    fits = dict(tokens=s.tokens >= 0, temperature=s.temperature >= 0, top_k=s.top_k >= 0, top_p=0 < s.top_p <= 1)
    for name, good in fits.items():
        if not good:
            raise UserError(f"--{name}={getattr(s, name)} is out of range")
    if s.save_memory:
        checkpoint.target(s.save_memory, "memory", b"PK", b"nanomem memory")     # rather now than after an hour
    if s.look:
        look.target(s.look)
        if s.save_memory or s.load_memory:
            raise UserError("--look reads a text from its beginning: leave --load-memory and --save-memory out")
    device = stream.machine(s.device)[0]
    model, saved = nanomem.load(words[0])
    with checkpoint.using(words[0]):
        task, enc = saved["run"]["data"], data.tokenizer(saved["run"]["tokenizer"])
    if tasks.is_task(task):
        raise UserError(f"{words[0]} was trained on the task {task}, which is no text")
    reader = stream.Reader(model.to(device).eval())
    try:
        with torch.no_grad():                              # a model as published may need tokens that are not there yet
            model.extend(torch.tensor([[enc.eot_token]], device=device), model.read(reader.state))
    except AssertionError as refusal:
        raise UserError(f"{words[0]} cannot write text: {refusal}") from None

    try:
        text = (data.read_text(s.file) if s.file not in ("", "-") else standard_input(s)) + s.prompt
        text.encode()
    except UnicodeError:
        raise UserError("the prompt or standard input is not UTF-8 text") from None
    if s.look:
        source = Path(s.file).name if s.file not in ("", "-") else "a prompt"
        found = look.write(s.look, model, saved["name"], enc, text, source)
        print(f"{found['tokens']:,} tokens: {found['loss']:.3f} nats a token, {found['loss_empty']:.3f} with an empty "
              f"memory. Open {s.look} in a browser")
        return 0
    ids = enc.encode_ordinary(text)
    if s.load_memory:
        reader.load(s.load_memory)
        if len(reader.tokens) != 1:
            raise UserError(f"{s.load_memory} is the memory of {len(reader.tokens)} texts side by side, not of one")
    else:
        ids = [enc.eot_token, *ids]                        # every book begins with it
    step = 64 * model.c.seg                                # tokens between two moves of the bar
    for i in tqdm(range(0, len(ids), step), desc="reading", unit=f"x{step} tokens", disable=len(ids) <= step):
        reader(torch.tensor([ids[i:i + step]], device=device))

    decode = codecs.getincrementaldecoder("utf-8")("replace").decode   # a character may be spread over several tokens
    unread = None
    with cli.catch_stop() as stop:                         # Ctrl-C ends the text, not what was read before
        try:
            print(s.prompt, end="", flush=True)
            for token in reader.generate(s.tokens, picker(s, enc.n_vocab, device)):
                if token.item() == enc.eot_token:
                    break
                print(decode(enc.decode_single_token_bytes(token.item())), end="", flush=True)
                if stop:                                   # what is remembered was printed
                    break
            print(decode(b"", final=True), flush=True)
        except BrokenPipeError as e:                       # as in: | head. What was read is saved all the same
            unread = e
    if s.save_memory:
        reader.save(s.save_memory)
        print(f"{reader.count:,} tokens are remembered in {s.save_memory} "
              f"({stream.nbytes(reader.state) / 1024:.0f} KB of state)", file=sys.stderr)
    if unread:
        raise unread
    return 130 if stop else 0


if __name__ == "__main__":
    cli.run(main)
