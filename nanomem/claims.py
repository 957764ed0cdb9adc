"""What the papers say, and whether it holds here, from what bench.py has measured.

Each check takes {model: {task: what was measured, merged over seeds}} and returns what was found, as text, and whether
the claim holds, None where that cannot be told (an interval holds 0, seeds of one model lie among those of the other,
or both answer nearly everything); or None if this was not measured.
"""
import numpy as np

from .report import columns_of, interval, shares_right, table

CEILING = 0.95   # of the questions: two models that answer more cannot be told apart


def above(a, *others):
    """Whether all seeds of a are above all of each other: False if one of the others is above a, None if that cannot be
    told. Where there is one seed, nobody knows how much seeds differ: then it takes a gap."""
    gap = lambda b: 0 if min(len(a), len(b)) > 1 else 0.05
    if any(max(a) < min(b) - gap(b) for b in others):
        return False
    return True if all(min(a) > max(b) + gap(b) for b in others) else None


def less_on_books(one, other):
    """The check that a model's loss on books is lower than another one's. Open where the interval holds 0, or where
    there is none: a single book and seed."""
    def check(models):
        found = [models.get(name, {}).get("books") for name in (one, other)]
        seeds = {*found[0]["all"]["by_book"]} & {*found[1]["all"]["by_book"]} if all(found) else ()
        if seeds:
            mean, low, high = interval(*(books["all"]["by_book"] for books in found))
            said = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
            ends = "one book" if np.isnan(low) else f"{low:+.3f} to {high:+.3f}"
            return (f"{mean:+.3f} nats a token ({ends}), {said}",
                    True if high < 0 else False if low > 0 else None)
    return check


def replay_saves_bytes_for_little_time(models):
    measured = models.get("memformer", {}).get("replay")
    if measured:
        four = next(x for x in measured["replay"] if x["K"] == 4)
        size, time = four["bytes_over_bptt"], four["time_over_bptt"]
        return f"{size:.2f}x the bytes, {time:.2f}x the time", size < 0.5 and time < 1.2


def gradient_through_more_segments_helps(models):
    found = [columns_of(models, name, "delayed")
             for name in ("memformer", *[f"memformer:segments={K}" for K in (4, 2, 1)])]
    if all(found):
        most, *fewer = (shares_right(columns[1:]) for columns in found)
        return (f"{most.mean():.0%} of old questions with gradient through 8 segments, "
                + ", ".join(f"{x.mean():.0%}" for x in fewer) + " through 4, 2, 1", above(most, *fewer))


def a_store_keeps_longer(models):
    pool, store = (columns_of(models, name, "retain") for name in ("memoryllm", "mplus"))
    if pool and store:
        a, b, longest = half_life(pool), half_life(store), store[-1]["start"]
        after = f"after {b:.0f}" if b < float("inf") else f"at none of up to {longest:,}"
        return f"accuracy halves after {a:.0f} tokens, with the store {after}", min(b, longest) >= 8 * a


def half_life(columns):
    """Tokens at which the accuracy is below half of that in the first column, inf if it never is."""
    return next((part["start"] for part in columns if part["accuracy"] < columns[0]["accuracy"] / 2), float("inf"))


def eidetic_tokens_help(models):
    names = "mamba", "hybrid", "bmojo_f", "bmojo:state=8:window=16:eidetic=32"
    found = [columns_of(models, name, "mqar") for name in names]
    if all(found):
        every, far = ([shares_right(columns[i:]) for columns in found] for i in (0, 1))
        text = lambda shares: ", ".join(f"{x.mean():.0%}" for x in shares)
        return f"{text(every)} of all questions; beyond the window {text(far)}", above(every[-1], *every[:-1])


def a_needle_is_found_far_away(models):
    columns = columns_of(models, "gca", "needle")
    if columns and columns[-1]["length"] >= 64_000:
        far = columns[-1]
        return (f"{far['accuracy']:.0%} right, {far['hits']:.0%} retrieved in {far['length']:,} tokens",
                far["accuracy"] > 0.95)


def recalls_more(one, other, task="recall_bytes"):
    """The check that a model answers more questions from before the segment than another one. In recall_bytes, both
    have states of the same size."""
    def check(models):
        found = [columns_of(models, name, task) for name in (one, other)]
        if all(found):
            a, b = (shares_right(columns[1:]) for columns in found)
            close = min(a.mean(), b.mean()) > CEILING
            return (f"{a.mean():.0%} from before the segment, {other} {b.mean():.0%} ({task})",
                    None if close else above(a, b))
    return check


def recalls_as_much(one, other, task="recall", by=0.02):
    """The check that a model answers as many questions from before the segment as another one, but for this part."""
    def check(models):
        found = [columns_of(models, name, task) for name in (one, other)]
        if all(found):
            a, b = (shares_right(columns[1:]).mean() for columns in found)
            return f"{a:.0%} from before the segment, {other} {b:.0%} ({task})", a > b - by
    return check


def each_part_helps(models):
    parts = "titans", "titans:momentum=no", "titans:forget=no"
    found = [columns_of(models, name, "recall") for name in parts]
    if all(found):
        whole, *without = (shares_right(columns[1:]) for columns in found)
        close = min(whole.mean(), *(x.mean() for x in without)) > CEILING
        return (f"{whole.mean():.1%} from before the segment, without momentum {without[0].mean():.1%}, without "
                f"forgetting {without[1].mean():.1%}", None if close else above(whole, *without))


CLAIMS = (
    ("Full attention", "on books eight segments beat the last one (window)", less_on_books("full", "window")),
    ("HMT", "on books a search in old memories beats the newest memory (RMT)", less_on_books("hmt", "rmt")),
    ("Memformer", "replay through 4 segments: 0.45x the bytes of plain back-propagation, 1.11x its time",
     replay_saves_bytes_for_little_time),
    ("Memformer", "a gradient through all segments teaches it to remember more", gradient_through_more_segments_helps),
    ("M+", "keeps 8 times longer than MemoryLLM (160k tokens, not 20k)", a_store_keeps_longer),
    ("M+", "on books the long-term store lowers the loss of MemoryLLM", less_on_books("mplus", "memoryllm")),
    ("B'MOJO", "on books fading tokens beat layers in turn (hybrid)", less_on_books("bmojo_f", "hybrid")),
    ("B'MOJO", "on books eidetic tokens improve on fading tokens alone", less_on_books("bmojo", "bmojo_f")),
    ("B'MOJO", "recalls more than Mamba, hybrid and its own fading memory", eidetic_tokens_help),
    ("GCA", "finds a needle in 1,000 times the length of training", a_needle_is_found_far_away),
    ("Gated DeltaNet", "recalls more than Mamba-2", recalls_more("deltanet", "mamba")),
    ("Infini-attention", "recalls what the segment does not hold", recalls_more("infini", "gpt", "recall")),
    ("Titans", "recalls more than Gated DeltaNet", recalls_more("titans", "deltanet")),
    ("Titans", "momentum and forgetting both help", each_part_helps),
    ("Landmark attention", "recalls as full attention does", recalls_as_much("landmark", "full")),
)


def claims_table(models):
    rows = []
    for paper, says, check in CLAIMS:
        found = check(models)
        if found:
            text, holds = found
            rows.append([paper, says, text, {True: "holds", False: "does not hold here", None: "open"}[holds]])
    return [f"What the papers say:\n\n{table(['paper', 'says', 'found here', ''], rows)}"] if rows else []
