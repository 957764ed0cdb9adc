"""What a model can do: the loss on books, and right answers on synthetic tasks. What it costs is measured in cost.py.

Each function takes a model and returns plain numbers, in lists and dicts. No model is known here by name.
"""
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from . import stream
from .cli import UserError
from .data import Loader
from .tasks import TaskLoader


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Books

def token_losses(model, books, batch, segments, interleave=1, interleave_len=1, like=(), change=lambda state: state,
                 beside=False):
    """The loss of each token in nats, an array for each book, nan where nothing is scored: where this model or one of
    the models `like` has seen the target. `batch` books are read side by side, as in training, and the other arguments
    are those of train.py. `change` maps the state before each segment to the one that the segment sees. With `beside`,
    nothing is scored either where batch element b - 1 has no book any more."""
    S = model.c.seg
    loader = Loader(books, batch, segments * S, once=True, interleave=interleave, interleave_len=interleave_len * S)
    losses = [np.full(len(tokens) - 1, np.nan) for tokens in books.tokens]
    for part, nll, _ in stream.evaluate(model, loader, like=like, change=change):
        book = part.book.view(len(part.x), -1).expand_as(part.x)               # (B, T)
        scored = part.y >= 0
        if beside:
            scored = scored & (part.book >= 0).roll(1, 0).view(len(part.x), -1)
        book, position, nll, scored = (t.cpu().numpy() for t in (book, part.position, nll, scored))
        for i in np.unique(book[scored]):
            here = scored & (book == i)
            losses[i][position[here]] = nll[here]
    return losses


WORDS_BACK = (1, 64, 256, 1024, 4096, 1 << 40)   # tokens since a rare word was last seen: a column ends at each
WORD = re.compile(rb"[A-Za-z\x80-\xff]+")      # letters of ASCII, and all bytes of other characters


def count_words(books):
    """How often each word stands in these books."""
    counts = Counter()
    for tokens in books.tokens:
        counts.update(WORD.findall(books.enc.decode_bytes(tokens[1:].tolist())))
    return counts


def rare_words(books, counts, rare=1e-6):
    """The words of each book that are rare in training: of which at most the part `rare` of all words counted there
    are. They are names, mostly, and a second time only a memory can know them. For each book an array (words, 3): the
    first target and the one behind the last (a target is a place in token_losses), and the tokens since this word was
    last seen in this book, 0 the first time.

    Zoology (2312.04927) takes pairs of tokens in place of words; but two bytes are no fact.
    """
    most, size = rare * counts.total(), [len(books.enc.decode_single_token_bytes(i)) for i in range(books.enc.n_vocab)]
    found = []
    for tokens in books.tokens:
        ends = np.cumsum(np.array(size)[tokens[1:]])                           # where each token ends, in bytes
        seen, here = {}, []
        for word in WORD.finditer(books.enc.decode_bytes(tokens[1:].tolist())):
            if counts[word[0]] <= most:
                start, end = np.searchsorted(ends, [word.start(), word.end() - 1], "right")
                here.append((start, end + 1, start - seen.get(word[0], start)))
                seen[word[0]] = start
        found.append(np.array(here, int).reshape(-1, 3))
    return found


def loss_of_words(losses, words, edges):
    """The loss of rare words in nats a word, by the tokens since they were last seen: the first time, and between two
    edges. losses: {name: loss of each token, of each book}; the others are given as their difference to "loss"."""
    nats = {name: [np.array([x[i:j].sum() for i, j, _ in w]) for x, w in zip(each, words)]
            for name, each in losses.items()}
    longest, found = max(map(len, losses["loss"])), []
    for start, end in [(0, 1), *zip(edges, edges[1:])]:
        chosen = [(w[:, 2] >= start) & (w[:, 2] < end) & np.isfinite(x) for x, w in zip(nats["loss"], words)]
        part = {name: [x[here] for x, here in zip(each, chosen)] for name, each in nats.items()}
        n, mean = sum(map(len, part["loss"])), mean_of(part["loss"])
        if n:
            found.append(dict(start=start, end=min(end, longest), words=n, loss=mean,
                              by_book=[[float(x.sum()), len(x)] for x in part["loss"]],
                              **{name: increase(each, part["loss"]) for name, each in part.items() if name != "loss"}))
    return found


def loss_by_position(model, books, edges, batch, upto=0, interleave=1, training=None, **reading):
    """The loss on held-out books: of all tokens, of those between two edges of the position in the book, and by the
    position in the segment. Of each book the first `upto` tokens are scored, or all. With the `training` books, also
    of words that are rare there. `reading`: see token_losses.

    start, end        positions in the book
    tokens            number of them, in all books
    loss              nats a token
    bits_per_byte     the same, whatever the tokenizer
    word_perplexity   the same for words, which are what stands between white space
    by_book           [sum of the loss, number of scored tokens] of each book, for intervals
    empty             how much the loss increases when each segment begins with an empty memory
    another           how much it increases with another book's memory: before each segment, batch element b gets the
                      state of element b - 1, so that what the last B - 1 segments wrote is not of its book. Only
                      where there are several books, and while element b - 1 has one
    words             the same for rare words, in nats a word, by the tokens since the word was last seen, start to end
    """
    books = replace(books, tokens=[tokens[:upto + 1 if upto else None] for tokens in books.tokens])
    B = max(1, min(batch, len(books) // interleave))
    losses = lambda **how: token_losses(model, books, B, interleave=interleave, **how, **reading)
    loss = losses()
    controls = dict(empty=losses(change=lambda state: model.init_state(B)))
    if B > 1:
        controls["another"] = losses(change=lambda state: {k: v.roll(1, 0) for k, v in state.items()}, beside=True)
    longest, S = max(map(len, loss)), model.c.seg
    words = rare_words(books, count_words(training)) if training else []

    def part(start, end):
        cut = lambda losses: [x[start:end] for x in losses]
        if mean_of(cut(loss)) is None:
            return None
        text = [books.enc.decode_bytes(tokens[1 + start:1 + end].tolist()) for tokens in books.tokens]
        n, mean = sum(map(len, cut(loss))), mean_of(cut(loss))
        return dict(start=start, end=min(end, longest), tokens=n, loss=mean,
                    bits_per_byte=mean * n / math.log(2) / sum(map(len, text)),
                    word_perplexity=math.exp(min(700, mean * n / max(1, sum(len(t.split()) for t in text)))),
                    by_book=[[float(np.nansum(x)), int(np.isfinite(x).sum())] for x in cut(loss)],
                    **{name: increase(cut(x), cut(loss)) for name, x in controls.items()})

    ends = [0, *(2 ** i for i in range(S.bit_length()) if 2 ** i < S), S]
    in_segment = [dict(start=start, end=end, loss=mean_of([x[i::S] for x in loss for i in range(start, end)]))
                  for start, end in zip(ends, ends[1:])]
    return dict(books=len(books), interleave=interleave, parameters=parameters(model),
                state_bytes=stream.nbytes(model.init_state(1)), all=part(0, longest),
                by_position=list(filter(None, map(part, edges, edges[1:]))),
                in_segment=[x for x in in_segment if x["loss"] is not None],
                words=loss_of_words(dict(controls, loss=loss), words, WORDS_BACK) if training else [])


def mean_of(losses):
    """The mean over all scored tokens of some books, None if there are none."""
    losses = np.concatenate(losses)
    return float(np.nanmean(losses)) if np.isfinite(losses).any() else None


def increase(losses, before):
    """How much higher these losses are, mean over the tokens that are scored in both; None if there are none."""
    return mean_of([x - y for x, y in zip(losses, before)])


@torch.no_grad()
def passage(model, books, n=256, after=(0, 1, 2, 4, 8, 16, 32, 64), batch=64):
    """How much easier a passage is when it was read before (as M+ 2502.00592, section 4.4, but with plain books).

    There are n passages, each a segment. The model reads a passage, then `after` segments of another book (of another
    place, where there is only one), then the passage again. gain: how much lower the loss of its second half is, in
    nats a token, than if it had not been read before. interval: half of the 95% interval over passages.
    """
    S, rng, device = model.c.seg, np.random.default_rng(0), stream.device_of(model)
    long = [tokens for tokens in books.tokens if len(tokens) > (max(after) + 2) * S]
    if not long:
        raise UserError(f"a passage needs a book of {(max(after) + 2) * S + 1:,} tokens, the longest has "
                        f"{max(map(len, books.tokens)):,}: use a smaller --seg")

    def cut(i, length):
        tokens = long[i % len(long)]
        start = rng.integers(len(tokens) - length)
        return torch.from_numpy(tokens[start:start + length].astype(np.int64)).to(device)
    passages = torch.stack([cut(i, S + 1) for i in range(n)])                          # (n, S+1)
    others = torch.stack([cut(i + 1, (max(after) + 1) * S) for i in range(n)])         # (n, segments S), the next book
    gains = []
    for text, other in zip(passages.split(batch), others.split(batch)):
        losses = []
        for first in (other[:, :S], text[:, :S]):                                      # without and with the passage
            state = model(first, model.init_state(len(text)))[1]
            for gone, x in enumerate([*other[:, S:].split(S, 1), None]):
                if gone in after:
                    logits = model(text[:, :-1], state)[0][:, S // 2:]
                    loss = F.cross_entropy(logits.transpose(1, 2), text[:, S // 2 + 1:], reduction="none")
                    losses.append(loss[:, model.scored()[S // 2:]].mean(1))            # (B,)
                state = state if x is None else model(x, state)[1]
        without, with_passage = torch.stack(losses).unflatten(0, (2, -1))              # (after, B) each
        gains.append(without - with_passage)
    gains = torch.cat(gains, 1)                                                        # (after, n)
    half = 1.96 * gains.std(1) / n ** 0.5
    return [dict(after=a, gain=g, interval=h) for a, g, h in zip(after, gains.mean(1).tolist(), half.tolist())]


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic tasks

@torch.no_grad()
def answer(model, batch):
    """Run over whole texts -> correct (B, T): the likeliest token is the target; and for a model that retrieves, hits
    (B, T): one of the spans of text that the token retrieved holds the key or the value of its pair; else None."""
    state, correct, hits = model.init_state(len(batch.x)), [], []
    keys = (batch.position - batch.distance)[..., None]                                # (B, T, 1); values come next
    for (x, y), key in zip(stream.segments(model, batch.x, batch.y), keys.split(model.c.seg, 1)):
        logits, cache = model.extend(x, model.read(state))
        state = model.write(cache, state)
        correct.append(logits.argmax(-1) == y)
        found = model.retrieved(cache)
        if found:
            start, end = found[0].unbind(-1)                                           # (B, S, n); -1 where none
            hits.append(((start < key + 2) & (key < end)).any(-1))
    return torch.cat(correct, 1), torch.cat(hits, 1) if hits else None


def accuracy(model, task, T, texts, batch=64, edges=(), seed=0, least=50):
    """The share of right answers of a model in eval mode, on texts of T tokens of a task. With edges, a dict for each
    range of distances to the answer, else one for all questions; none for fewer than `least` questions.

    length       T
    start, end   of the range of distances, in tokens
    questions    number of them
    accuracy     share of right answers
    state_bytes  of the memory of one text
    hits         share of retrieval hits, if the model retrieves
    """
    texts = max(2, texts)
    loader, device = TaskLoader(task, min(batch, texts), T, seed=(seed, 2)), stream.device_of(model)
    bounds = np.array(edges or (0, T + 1))
    sums = np.zeros((3, len(bounds) + 1))                                              # questions, correct, hits
    retrieves = False
    for _ in range(texts // loader.B):
        part = stream.scored(loader.next().to(device), model)
        correct, hits = answer(model, part)
        retrieves, asked = hits is not None, part.y >= 0
        column = np.digitize(part.distance[asked].cpu().numpy(), bounds)
        for counts, true in zip(sums, (asked, correct, hits if retrieves else ~asked)):
            counts += np.bincount(column, true[asked].cpu().numpy(), len(bounds) + 1)
    found = []
    for start, end, n, right, hit in zip(bounds.tolist(), bounds[1:].tolist(), *sums[:, 1:].tolist()):
        if n >= least:
            found.append(dict(length=T, **(dict(start=start, end=end) if edges else {}), questions=int(n),
                              accuracy=right / n, state_bytes=stream.nbytes(model.init_state(1)),
                              **(dict(hits=hit / n) if retrieves else {})))
    return found
