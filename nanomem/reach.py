"""How far back predictions depend on the text: change one token, and measure how later predictions move."""
import numpy as np
import torch
from torch.nn import functional as F

from . import stream
from .cli import UserError

BEFORE = 8         # segments that are read before the one in which a token is changed
FARTHEST = 16_384  # tokens that are read after it


def divergence(logits, other):
    """KL(softmax(logits) || softmax(other)) of each prediction, (B, T, V) both -> (B, T) in nats, in float64."""
    p, q = (x.float().cpu().double().log_softmax(2) for x in (logits, other))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(2).clamp(min=0)


@torch.no_grad()
def reach(model, books, n=16, farthest=FARTHEST):
    """n texts from held-out books. In each, one token anywhere in segment 8 becomes another token of the same text.
    Both texts are read on, and their predictions are compared. Returns a dict for each range of distances, 1, 2-3, 4-7,
    ..., as far as the longest book allows:

    start, end   d, tokens from the changed one to the predicted one: start <= d < end; d = 1 is the next token
    kl           KL(prediction of the text || prediction of the changed text) in nats, mean over the range and the texts
    noise        the same where no token is changed, but half of the texts are read once more in a batch of another
                 size, up to the change: what rounding makes of equal texts. The same number for all ranges
    """
    S, rng, device = model.c.seg, np.random.default_rng(0), stream.device_of(model)
    longest, read = max(map(len, books.tokens)), (BEFORE + 1) * S
    ranges = [2 ** i for i in range(farthest.bit_length()) if 2 ** i <= min(farthest, longest - read)]
    if len(ranges) < 2:
        raise UserError(f"reach needs a book of {read + 2:,} tokens, the longest has {longest:,}: use a smaller --seg")
    T = -(-(read + ranges[-1]) // S) * S
    long = [tokens for tokens in books.tokens if len(tokens) >= read + ranges[-1]]
    text = np.full((n, T), books.enc.eot_token)                                # the last segment may be padded
    for i in range(n):
        tokens = long[i % len(long)]
        start = rng.integers(max(1, len(tokens) - T + 1))
        text[i, :len(tokens) - start] = tokens[start:start + T]
    place = BEFORE * S + rng.integers(S, size=n)                               # (n,) of the changed token
    changed = text.copy()
    for i, p in enumerate(place):
        others = text[i][text[i] != text[i, p]]
        changed[i, p] = rng.choice(others) if len(others) else (text[i, p] + 1) % books.enc.n_vocab
    text, changed = (torch.from_numpy(t).to(device) for t in (text, changed))

    half, noise, sums, counts = max(1, n // 2), [], np.zeros(len(ranges)), np.zeros(len(ranges))
    state = other = model.init_state(n)
    fewer = model.init_state(half)
    for t in range(0, T, S):
        x, y = text[:, t:t + S], changed[:, t:t + S]
        logits, state = model(x, state)
        if t < BEFORE * S:                                                     # nothing is changed yet
            other, (half_logits, fewer) = state, model(x[:half], fewer)
            noise.append(divergence(logits[:half], half_logits).mean().item())
            continue
        # The same shapes as the text itself: so equal texts and states give equal logits, to the bit.
        other_logits, other = model(y, other)
        kl = divergence(logits, other_logits).numpy()
        d = np.arange(t, t + S) + 1 - place[:, None]                           # (n, S)
        column = np.digitize(d, ranges) - 1                                    # -1: before the changed token
        inside = (column >= 0) & (column < len(ranges) - 1)
        sums += np.bincount(column[inside], kl[inside], len(ranges))
        counts += np.bincount(column[inside], minlength=len(ranges))
    return [dict(start=start, end=end, kl=sums[i] / counts[i], noise=sum(noise) / len(noise))
            for i, (start, end) in enumerate(zip(ranges, ranges[1:]))]
