"""See the memory: one page that shows a text, each token coloured by what memory is worth there.

    python sample.py out/hmt --file=book.txt --look=look.html

gain = loss with an empty memory - loss with the memory that the model has, in nats. With an empty memory each segment
begins with the model's initial state. look.html is the page without its data; it loads nothing from anywhere.
"""
import base64
import codecs
import html
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from . import checkpoint, stream
from .cli import UserError

HERE = Path(__file__).parent
MARK = "<!doctype html><!-- a look page of nanomem -->"   # how a page begins: other files are never replaced
LIKELIEST, BEST, PLACES = 3, 20, 12   # tokens of a prediction, tokens in the list, and weighted places of a token


def target(path):
    """The file that the page will replace. Raises UserError where that is a file of another kind."""
    return checkpoint.target(path, "look page", MARK.encode())


# ----------------------------------------------------------------------------------------------------------------------
# What the model says at each token

def prediction(logits, y, vocab):
    """logits (B, S, V) and targets y (B, S) -> loss (B, S) in nats, the likeliest tokens and their probabilities
    (B, S, 3), none of them behind the vocabulary."""
    logp = logits.float().log_softmax(-1)
    p, tokens = logp[..., :vocab].topk(LIKELIEST)
    return -logp.gather(2, y[..., None])[..., 0], tokens, p.exp()


@torch.no_grad()
def predictions(model, ids, vocab):
    """ids: an end-of-text token and a text of N tokens. Returns what the model predicts with its memory and with an
    empty one, each as loss (N,), likeliest tokens and their probabilities (N, 3), and what it looked at (see Places),
    None for a model that chooses no places."""
    c, N, device = model.c, len(ids) - 1, stream.device_of(model)
    padded = F.pad(torch.tensor(ids, device=device), (0, -N % c.seg), value=ids[0])
    x, y = (t.view(-1, c.seg) for t in (padded[:-1], padded[1:]))              # (segments, S)
    B = max(1, min(8192 // c.seg, 2 ** 23 // (c.seg * c.vocab)))               # 8k tokens or 32 MB of logits in a call
    empty, memory, places = [], [], Places()
    for xs, ys in zip(x.split(B), y.split(B)):                                 # no segment waits for another
        logits, _ = model.extend(xs, model.read(model.init_state(len(xs))))
        empty.append(prediction(logits, ys, vocab))
    state = model.init_state(1)
    segments = zip(x[:, None], y[:, None]) if state else []                    # (1, S); or nothing is remembered
    for xs, ys in tqdm(segments, "reading", len(x), unit=" segments", disable=len(x) < 64 or not state):
        logits, cache = model.extend(xs, model.read(state))
        memory.append(prediction(logits, ys, vocab))
        found, state = model.retrieved(cache), model.write(cache, state)
        if found:
            places.add(*found)
    join = lambda parts: [torch.cat(part).flatten(0, 1)[:N].cpu().numpy() for part in zip(*parts)]
    return join(memory or empty), join(empty), places if places.index else None


class Places:
    """The spans of text that each token looked at. Tokens that looked at the same share a set of spans."""

    def __init__(self):
        self.index = []   # the number of the set of each token
        self.sets = []    # spans (n, 2), in tokens of the text without the end-of-text token in front; shares (n,)
        self.last = None

    def add(self, spans, weights):
        """What retrieved(cache) returns for a segment of one text: spans (1, S, n, 2), weights (1, S, n)."""
        for span, weight in zip(spans[0].cpu().numpy(), weights[0].cpu().numpy()):
            same = self.last and np.array_equal(self.last[0], span) and np.array_equal(self.last[1], weight, True)
            if not same:
                self.sets.append(self.summary(span, weight))
            self.index.append(len(self.sets) - 1)
            self.last = span, weight

    @staticmethod
    def summary(span, weight):
        """The same spans of several layers or heads become one. Of those with a weight the heaviest are kept, the
        heaviest first; of the others all, those that touch as one."""
        real = span[:, 1] > 1                                                  # not -1, nor the end-of-text token only
        span, which = np.unique(span[real], axis=0, return_inverse=True)
        share = np.bincount(which.ravel(), weight[real], len(span))
        span = np.maximum(span - 1, 0)
        if not np.isnan(share).any():
            order = (-share).argsort(kind="stable")[:PLACES]
            return span[order], share[order]
        begins = np.flatnonzero(np.append(True, span[1:, 0] > span[:-1, 1]))
        return np.stack([span[begins, 0], np.maximum.reduceat(span[:, 1], begins)], 1), share[begins]


# ----------------------------------------------------------------------------------------------------------------------
# The page

def pieces(enc, tokens):
    """The text in pieces of whole characters, which may be made of several tokens: their texts, and how many tokens
    each has."""
    decoder, texts, counts, text, n = codecs.getincrementaldecoder("utf-8")("replace"), [], [], "", 0
    for token in tokens:
        text, n = text + decoder.decode(enc.decode_single_token_bytes(token)), n + 1
        if text and not decoder.getstate()[0]:                                 # no character is open
            texts.append(text)
            counts.append(n)
            text, n = "", 0
    return texts, np.array(counts)


def name_of(enc, token):
    """A token as people read it: its characters, or its bytes if they are only a part of some."""
    if token == enc.eot_token:
        return "end of text"
    whole = enc.decode_single_token_bytes(token)
    try:
        return whole.decode()
    except UnicodeDecodeError:
        return f"byte{'s' * (len(whole) > 1)} {whole.hex(' ').upper()}"


def packed(a, kind):
    """An array as base64 of little-endian whole numbers, which the page reads as a typed array."""
    top = np.iinfo(kind).max
    return base64.b64encode(np.clip(np.rint(a), 0, top).astype(np.dtype(kind).newbyteorder("<")).tobytes()).decode()


def content(model, enc, tokens):
    """What the page needs to know, as a dict for JSON. Arrays have an entry for each piece. `best` are the pieces that
    gained most in the second half of a segment: there an empty memory, too, knows half a segment of text."""
    memory, empty, places = predictions(model, [enc.eot_token, *tokens], enc.n_vocab)
    if not np.isfinite([memory[0], empty[0]]).all():
        raise UserError("the model predicts no numbers (NaN): its weights are damaged")
    texts, counts = pieces(enc, tokens)
    first = np.cumsum(counts) - counts                                         # the first token of each piece
    loss, loss_empty = (np.add.reduceat(x[0], first) for x in (memory, empty))
    used, which = np.unique(np.stack([memory[1], empty[1]])[:, first], return_inverse=True)
    gain = np.where(first % model.c.seg < model.c.seg // 2, 0, loss_empty - loss)
    best = [i for i in (-gain).argsort(kind="stable")[:BEST].tolist() if gain[i] > 0]
    found = dict(tokens=len(tokens), segment=model.c.seg, state_bytes=stream.nbytes(model.init_state(1)),
                 loss=float(memory[0].mean()), loss_empty=float(empty[0].mean()), text="".join(texts), best=best,
                 characters=packed([len(t.encode("utf-16-le")) // 2 for t in texts], "u2"),    # as JavaScript counts
                 counts=packed(counts, "u1"), losses=packed(1000 * np.stack([loss, loss_empty]), "u2"),
                 likeliest=packed(which, "u2"), names=[name_of(enc, token) for token in used.tolist()],
                 chances=packed(255 * np.stack([memory[2], empty[2]])[:, first], "u1"), places=None)
    if places:
        spans, shares = (np.concatenate(part) for part in zip(*places.sets))
        found["places"] = dict(
            set=packed(np.array(places.index)[first], "u4"), weighted=bool(not np.isnan(shares).any()),
            ends=packed(np.cumsum([len(s) for s, _ in places.sets]), "u4"), first=packed(spans[:, 0], "u4"),
            length=packed(spans[:, 1] - spans[:, 0], "u2"), share=packed(255 * np.nan_to_num(shares), "u1"))
    return found


def write(path, model, name, enc, text, source):
    """Write the page of a text that the model of this name reads; `source` is what the text is called. Returns its
    content."""
    tokens = enc.encode_ordinary(text)
    if not tokens:
        raise UserError("there is no text to look at: name one with --file=book.txt")
    found = dict(content(model, enc, tokens), model=name, source=source)
    page, _, rest = (HERE / "look.html").read_text(encoding="utf-8").partition("{{data}}")
    page = page.replace("<!doctype html>", MARK, 1).replace("{{title}}", html.escape(f"{name} reads {source}"))
    page += json.dumps(found, separators=(",", ":")).replace("<", "\\u003c") + rest    # no tag of the text is one
    checkpoint.write_whole(target(path), lambda scratch: scratch.write_text(page, encoding="utf-8", errors="replace"))
    return found                                           # replace: a file's name may be no text
