"""Continue a text with a trained model, its memory carried along: a token costs the same after a line and after a book.

    python sample.py out/rmt --prompt="Call me Ishmael."
    python sample.py out/rmt --file=book.txt --save-memory=book.pt      read a book once, keep what is remembered
    python sample.py out/rmt --load-memory=book.pt --prompt=" And then"  go on from there, as often as you like
    cat book.txt | python sample.py out/rmt
"""
import codecs
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

import nanomem
from nanomem import cli, data, stream, tasks
from nanomem.cli import UserError


@dataclass
class Sample:
    prompt: str = ""          # text to continue
    file: str = ""            # a file to read before the prompt, - for standard input
    tokens: int = 200         # tokens to write
    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int = 0            # choose among the k most likely tokens (0: all)
    top_p: float = 1.0        # choose among the most likely tokens that hold this much of the probability
    seed: int = 0             # of the choices
    save_memory: str = ""     # file for what is remembered at the end
    load_memory: str = ""     # file of an earlier --save-memory to go on from
    device: str = ""          # cpu, cuda, mps (without it the best there is)


def picker(s, vocab, device):
    """How a token is chosen from logits (B, V): (B, 1), never one of the rows behind the vocabulary."""
    generator = torch.Generator(device).manual_seed(s.seed)

    def pick(logits):
        logits = logits[:, :vocab]
        if s.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits, tokens = (logits / s.temperature).sort(descending=True)
        p = logits.softmax(-1)
        keep = p.cumsum(-1) - p < s.top_p                  # the first always stays
        if s.top_k:
            keep[:, s.top_k:] = False
        return tokens.gather(1, (p * keep).multinomial(1, generator=generator))
    return pick


def main(argv):
    (typed,), words = cli.parse(argv, Sample)
    s = Sample(**typed)
    if len(words) != 1:
        raise UserError("name one checkpoint: python sample.py out/rmt --prompt=TEXT")
    fits = dict(tokens=s.tokens >= 0, temperature=s.temperature >= 0, top_k=s.top_k >= 0, top_p=0 < s.top_p <= 1)
    for name, good in fits.items():
        if not good:
            raise UserError(f"--{name}={getattr(s, name)} is out of range")
    model, checkpoint = nanomem.load(words[0])
    if tasks.is_task(checkpoint["run"]["data"]):
        raise UserError(f"{words[0]} was trained on the task {checkpoint['run']['data']}, which is no text")
    enc = data.tokenizer(checkpoint["run"]["tokenizer"])
    device = stream.machine(s.device)[0]
    reader = stream.Reader(model.to(device).eval())
    try:
        with torch.no_grad():
            model.read(reader.state)
    except AssertionError as refusal:   # a model as published may need tokens that are not there yet
        raise UserError(f"{words[0]} cannot write text: {refusal}") from None

    piped = s.file == "-" or not (s.file or s.prompt or s.load_memory or sys.stdin.isatty())
    try:
        text = sys.stdin.read() if piped else data.read_text(s.file) if s.file else ""
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None
    ids = enc.encode_ordinary(text + s.prompt)
    if s.load_memory:
        reader.load(s.load_memory)
    else:
        ids = [enc.eot_token, *ids]                        # every book begins with it
    step = 64 * model.c.seg                                 # tokens between two moves of the bar
    for i in tqdm(range(0, len(ids), step), desc="reading", unit=f"x{step} tokens", disable=len(ids) <= step):
        reader(torch.tensor([ids[i:i + step]], device=device))

    print(s.prompt, end="", flush=True)
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode   # a character may be spread over several tokens
    for token in reader.generate(s.tokens, picker(s, enc.n_vocab, device)):
        if token.item() == enc.eot_token:
            break
        print(decode(enc.decode_single_token_bytes(token.item())), end="", flush=True)
    print(decode(b"", final=True))
    if s.save_memory:
        reader.save(s.save_memory)
        print(f"{reader.count:,} tokens are remembered in {s.save_memory} "
              f"({stream.nbytes(reader.state) / 1024:.0f} KB of state)", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
