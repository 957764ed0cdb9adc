"""The tables of bench.py, from the contents of result files.

Most functions take models = {model: {task: what measure.py returned}}.
"""
import numpy as np

from .suites import TASKS

PAPER = dict(bptt=(16177, 1.00), checkpointed=(9885, 0.48), replay=(7229, 0.90))   # MB, speed: 2010.06891, table 3


def merged(runs):
    """The results {seed: result} as one: the mean of each number, of an accuracy also `each`, and by_book as {seed:
    by_book}. Of lists, the first entries that all seeds have. Where a seed has None, so has the result."""
    one, results = next(iter(runs.values())), runs.values()
    if isinstance(one, dict):
        same = {k: {seed: r[k] for seed, r in runs.items()} for k in one if all(k in r for r in results)}
        each = dict(each=list(same["accuracy"].values())) if "accuracy" in same else {}
        return {**{k: of if k == "by_book" else merged(of) for k, of in same.items()}, **each}
    if isinstance(one, list):
        return [merged(dict(zip(runs, same))) for same in zip(*results)]
    if all(r == one for r in results):
        return one
    return None if None in results else sum(results) / len(runs)


def collect(results):
    """The contents of result files -> {model: {task: what was measured, merged over seeds}}, in their order."""
    models = {}
    for r in results:
        models.setdefault(r["model"], {}).setdefault(r["task"], {})[r["seed"]] = r["measured"]
    return {model: {task: merged(runs) for task, runs in by_task.items()} for model, by_task in models.items()}


def head(results, command):
    """Two lines over the report: the command, and machines, seeds and minutes."""
    machines = sorted({f"{r['machine']}, torch {r['torch']}" for r in results})
    seeds = sorted({r["seed"] for r in results})
    settings = [(r["settings"].get("train"), r["settings"].get("search")) for r in results]
    trained = {which: r["train_minutes"] for which, r in zip(settings, results)}    # several may share a training
    minutes = sum(r["minutes"] for r in results) + sum(trained.values())
    return (f"{command}\n{'; '.join(machines)}; seed {', '.join(map(str, seeds))}; {minutes:.1f} minutes, those of all "
            "processes together")


def interval(ours, theirs, draws=2000):
    """The difference of two losses in nats and its 95% interval over books and seeds: books, and the seeds that both
    models have, are drawn again and again, with replacement. Both models read the same books, with the same seed in the
    same order, so it is their differences that are drawn. ours and theirs: {seed: [nats, scored] of each book}. All
    three are nan if no seed is common to both; with a single one, the interval is over books alone, and nan for a
    single book. Two seeds say little about how much seeds differ: their interval holds the truth in 85% of all cases,
    that of three in 88% (simulated: 14 books, deviations of 0.02 nats between books and of 0.011 between seeds)."""
    seeds, rng = sorted({*ours} & {*theirs}), np.random.default_rng(0)
    if not seeds:
        return np.nan, np.nan, np.nan
    (x, n), (y, _) = (np.moveaxis(np.array([z[seed] for seed in seeds], float), 2, 0) for z in (ours, theirs))
    more, n, S = x - y, n[0], len(seeds)                                       # (seeds, books), (books,)
    mean = more.mean(0)
    if more.size == 1:
        return mean.sum() / n.sum(), np.nan, np.nan
    wider = mean + (more - mean) * (S / max(1, S - 1)) ** 0.5                  # draws of S vary too little, by (S-1)/S
    books, chosen = rng.integers(len(n), size=(draws, len(n))), rng.integers(S, size=(draws, S))
    drawn = np.take_along_axis(wider[chosen].mean(1), books, 1).sum(1) / np.maximum(n[books].sum(1), 1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return mean.sum() / n.sum(), low, high


def difference(ours, theirs, digits=3):
    """The loss of one part of the books minus another model's, with its interval, if there is one; ~ where that holds
    0. "" if they have no seed in common."""
    mean, low, high = interval(ours["by_book"], theirs["by_book"])
    if np.isnan(mean):
        return ""
    if np.isnan(low):
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} ({low:+.{digits}f} {high:+.{digits}f}){'~' if low <= 0 <= high else ' '}"


def table(head, rows):
    """A Markdown table whose columns line up. Rows may be shorter than the head."""
    lines = [[str(cell) for cell in line] + [""] * (len(head) - len(line)) for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))] for line in lines]
    lines.insert(1, ["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(n):
    """Bytes as people write them."""
    return f"{n:.0f} B" if n < 1024 else f"{n / 1024:.1f} KB" if n < 2 ** 20 else f"{n / 2 ** 20:.1f} MB"


def range_of(part):
    """The head of a column of books: a range of positions or distances; one that ends nowhere is "4k and more"."""
    ends = [f"{n / 1024:.0f}k" if n >= 1024 else str(n) for n in (part["start"], part["end"])]
    return "-".join(ends) if part["end"] < 1 << 40 else f"{ends[0]} and more"


def column_of(part):
    """The head of a column of a task: a range of distances, or the length of the text."""
    return f"{part['start']}-{part['end'] - 1}" if "start" in part else f"{part['length']:,}"


def percent(part):
    """The mean accuracy, of several seeds also the lowest and the highest, and behind a colon the retrieval hits."""
    each = part.get("each", [0])
    ends = f" ({min(each):.0%} to {max(each):.0%})" if len(each) > 1 else ""
    return f"{part['accuracy']:.0%}{ends}" + (f": {part['hits']:.0%}" if "hits" in part else "")


def shares_right(columns):
    """The share of right answers in these columns of a task, for each seed."""
    each = [part.get("each", [part["accuracy"]]) for part in columns]
    return np.average(each, axis=0, weights=[part["questions"] for part in columns])


def as_typed(model):
    """A model without the settings that a task gives it: "rmt:seg=16:segments=4", as it is in needle, is rmt."""
    for t in TASKS.values():
        if model in t.models:
            return model.partition(":")[0]
        if t.others and model.endswith(t.others):
            return model.removesuffix(t.others)
    return model


def columns_of(models, name, task):
    """What was measured of a model with its usual settings in a task, or as it is; None if it was not measured."""
    own = [model for model in TASKS[task].models if f"{model}:".startswith(f"{name}:") and "/" not in model]
    return next((models[model][task] for model in (name, *own[:1], name + TASKS[task].others)
                 if models.get(model, {}).get(task)), None)


def far_shares(models):
    """The tasks that most models did, and {model: its share of right answers in each, None where it was not measured},
    of all questions but the nearest, those in the first column: what a memory answers."""
    names = dict.fromkeys(map(as_typed, models))
    found = {task: {name: shares_right(columns[1:]).mean() for name in names
                    if len(columns := columns_of(models, name, task) or ()) > 1} for task in TASKS}
    most = [task for task in TASKS if 2 * len(found[task]) > len(names)]
    return most, {name: [found[task].get(name) for task in most] for name in names
                  if any(name in found[task] for task in most)}


def results_of(models, task):
    """{model: its result}, of the models that have one."""
    return {name: results[task] for name, results in models.items() if results.get(task)}


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def first_table(models):
    """A line for each model, with the main figures of books, recall and cost. None if none of them was measured."""
    rows, gpt = {}, models.get("gpt", {}).get("books")
    for name, results in models.items():
        cells = rows[name] = {}
        books, recall, cost = (results.get(task) for task in ("books", "recall", "cost"))
        if books or cost:
            cells["params"] = f"{(books or cost)['parameters'] / 1e6:.2f}M"
        if books:
            cells["loss"] = f"{books['all']['loss']:.3f}"
            if gpt:
                more = interval(books["all"]["by_book"], gpt["all"]["by_book"])[0]
                cells["- gpt"] = "" if np.isnan(more) else f"{more:+.3f}"
        for i, part in enumerate(recall[:4] if recall else []):
            cells["recall " * (i == 0) + column_of(part)] = f"{part['accuracy']:.0%}"
        if books or cost:
            cells["state"] = size((books or cost)["state_bytes"])
        if cost:
            cells["train tok/s"] = f"{cost['training_tokens_per_s'] / 1e3:.1f}k"
            cells["ms/token"] = f"{cost['reading'][-1]['decode_ms']:.2f}"
    left, right = ("params", "loss", "- gpt"), ("state", "train tok/s", "ms/token")
    found = dict.fromkeys(column for cells in rows.values() for column in cells)
    columns = [c for c in (*left, *(c for c in found if c not in left + right), *right) if c in found]
    if not columns:
        return None
    meaning = dict(loss="nats a token on held-out books, and minus gpt's with the same seeds (- gpt)",
                   recall="accuracy by tokens back to the answer", state="bytes of memory for one text",
                   ms="to decode a token after a long text")
    legend = [f"{word}: {text}" for word, text in meaning.items() if any(c.startswith(word) for c in columns)]
    body = [[name, *(cells.get(c, "") for c in columns)] for name, cells in rows.items() if cells]
    return ";\n".join(legend) + f".\n\n{table(['model', *columns], body)}"


def by_model(title, results, columns, cells, last=None):
    """[] without results, else [title and table]: a line for each model. columns(result) and cells(result) are lists;
    last(result) is one more line."""
    if not results:
        return []
    longest = max(results.values(), key=lambda r: len(columns(r)))         # some models may have fewer columns
    rows = [[name, *cells(r)] for name, r in results.items()] + ([["", *last(longest)]] if last else [])
    return [f"{title}:\n\n{table(['model', *columns(longest)], rows)}"]


def books_tables(models):
    results = results_of(models, "books")
    if not results:
        return []
    base = "gpt" if "gpt" in results else next(iter(results))
    more = lambda r: f"{r['parameters'] / results[base]['parameters'] - 1:+.1%}"
    parts = lambda r: [r["all"], *r["by_position"]]
    heads = lambda r: ["all", *map(range_of, r["by_position"])]

    count = results[base]["books"]
    found = by_model(f"Held-out books ({count}): size, and loss in three units", results,
                     lambda r: ["seeds", "parameters", f"to {base}'s", "state", "nats/token", "bits/byte",
                                "word perplexity"],
                     lambda r: [len(r["all"]["by_book"]), f"{r['parameters']:,.0f}", more(r), size(r["state_bytes"]),
                                f"{r['all']['loss']:.3f}", f"{r['all']['bits_per_byte']:.3f}",
                                f"{r['all']['word_perplexity']:.0f}"])
    found += by_model("Loss in nats a token by position in the book", results, heads,
                      lambda r: [f"{part['loss']:.3f}" for part in parts(r)])
    if count > 1:
        others = {name: r for name, r in results.items() if name != base}
        found += by_model(f"Loss minus {base}'s by position in the book (95% interval over books and seeds; ~ where it "
                          "holds 0)", others, heads, lambda r: list(map(difference, parts(r), parts(results[base]))))
    for key, title in dict(empty="when the memory is empty", another="with another book's memory").items():
        found += by_model(f"Loss increase {title}, by position in the book",
                          {name: r for name, r in results.items() if key in r["all"]}, heads,
                          lambda r: ["" if part[key] is None else f"{part[key]:.3f}" for part in parts(r)])
    words = {name: r for name, r in results.items() if r.get("words")}
    if words:
        base = base if base in words else next(iter(words))
        found += by_model(
            f"Words that are rare in the training books: {base}'s loss in nats a word, and the other models' minus "
            f"{base}'s, by the tokens since the word was last seen (95% interval over books and seeds; last line: "
            "words)", words, lambda r: ["first time", *map(range_of, r["words"][1:])],
            lambda r: [f"{x['loss']:.2f}" for x in r["words"]] if r is words[base] else
            [difference(x, y, 2) for x, y in zip(r["words"], words[base]["words"])],
            lambda r: [f"{x['words']:,.0f}" for x in r["words"]])
    return found + by_model("Loss by position in the segment", results,
                            lambda r: [f"{x['start']}-{x['end'] - 1}" for x in r["in_segment"]],
                            lambda r: [f"{x['loss']:.3f}" for x in r["in_segment"]])


def rates_table(models):
    tried = {name: r.get("rates") or r.get("books", {}).get("search") for name, r in models.items()}
    return by_model("Loss on held-out text after a tenth of the steps, by what the rates were multiplied with; "
                    "the best one is taken", {name: r for name, r in tried.items() if r}, list,
                    lambda r: [f"{loss:.3f}" for loss in r.values()])


def passage_table(models):
    return by_model("Loss decrease of a passage that was read before, by the segments of another book in between (nats "
                    "a token, 95% interval over passages)", results_of(models, "passage"),
                    lambda r: [x["after"] for x in r], lambda r: [f"{x['gain']:.3f} ±{x['interval']:.3f}" for x in r])


def reach_columns(r):
    return [f"{x['start'] // 1024}k" if x["start"] >= 1024 else str(x["start"]) for x in r]


def reach_table(models):
    return by_model("Reach on held-out books: how much one changed token moves the predictions d to 2d - 1 tokens "
                    "later, mean KL in nats, by d; rounding: the same for equal texts", results_of(models, "reach"),
                    lambda r: [*reach_columns(r), "rounding"],
                    lambda r: [f"{kl:.2g}" for kl in (*(x["kl"] for x in r), r[0]["noise"])])


def state_of(r):
    """The most bytes of state of a model in a task, as text; "" in results that do not say."""
    return size(max(part["state_bytes"] for part in r)) if "state_bytes" in r[0] else ""


RETRIEVED = ("; behind a colon the share of questions for which the key or the value of the pair was retrieved, where "
             "the model retrieves")


def task_table(models, task, about):
    results = results_of(models, task)
    retrieves = any("hits" in part for r in results.values() for part in r)
    return by_model(f"Accuracy on {task}, {about}{RETRIEVED * retrieves} (last line: number of questions)", results,
                    lambda r: ["state", *map(column_of, r)], lambda r: [state_of(r), *map(percent, r)],
                    lambda r: ["", *[f"{part['questions']:,.0f}" for part in r]])


def far_table(models):
    done, shares = far_shares(models)
    return by_model("All tasks: right answers, of all questions but the nearest, those in a table's first column",
                    shares if len(done) > 1 else {}, lambda r: done,
                    lambda r: ["" if share is None else f"{share:.0%}" for share in r])


def cost_tables(models):
    results = results_of(models, "cost")
    found = by_model("After so many tokens: ms a token to read on, ms a token to decode, bytes held, peak bytes",
                     results, lambda r: [f"{x['after']:,}" for x in r["reading"]],
                     lambda r: [f"{x['read_ms']:.2f} ms, {x['decode_ms']:.2f} ms, {size(x['held'])}, {size(x['peak'])}"
                                for x in r["reading"]])
    return found + by_model("Time a token after the longest text, over that after the shortest; and training speed "
                            "over that of nanoGPT's model, same shape, plain PyTorch, and over that of a large "
                            "matrix product; peak bytes of a training step", results,
                            lambda r: ["read", "decode", "train " + ("compiled" if r["compiled"] else "eager"),
                                       "of a product", "step"],
                            lambda r: [f"{r['read_growth']:.2f}x", f"{r['decode_growth']:.2f}x",
                                       f"{r['speed_over_nanogpt']:.2f}x", f"{r['share_of_product']:.0%}",
                                       size(r["training_peak"])])


def race_table(models):
    results = results_of(models, "race")
    rows = [[name, f"{r['steps'][-1]['tokens'] / 1e6:.1f}M",
             ", ".join(f"{loss:.3f} at {rate}" for rate, loss in r["rates"].items()),
             f"{r['steps'][-1]['ours'][1]:.3f}", f"{r['tokens_over']:.2f}x",
             "not reached" if r["time_over"] is None else f"{r['time_over']:.2f}x"]
            for name, r in results.items()]
    head = ["model", "tokens", "nanoGPT's last loss", "ours", "our tokens/s", "our time to nanoGPT's last loss"]
    title = ("Against nanoGPT's model and recipe, at each of these learning rates, the best of which counts; on the "
             "same tokens and shapes, step by step in turn; times and speed over nanoGPT's")
    return [f"{title}:\n\n{table(head, rows)}"] if rows else []


def replay_table(models):
    results = results_of(models, "replay")
    if not results:
        return []
    columns = [f"K={x['K']}" for x in next(iter(results.values()))["bptt"]]
    rows = [[name, way, *[f"{size(x['peak'])}, {x['ms']:.0f} ms" for x in r[way]],
             *[f"{x['bytes_over_bptt']:.2f}x, {x['time_over_bptt']:.2f}x" for x in (r[way][1], r[way][-1])],
             f"{r[way][-1]['peak'] / r[way][1]['peak']:.2f}x"] for name, r in results.items() for way in PAPER]
    for way, (megabytes, speed) in PAPER.items():
        cells = dict.fromkeys(columns, "") | {"K=4": f"{megabytes:,} MB"}
        rows.append(["the paper", way, *cells.values(), f"{megabytes / 16177:.2f}x, {1 / speed:.2f}x"])
    return ["Peak bytes and time of forward and backward through K segments, beside weights and gradients; both over "
            f"those of bptt; and the bytes at {columns[-1]} over those at {columns[1]}. The paper's: 2010.06891, table "
            "3, 12 layers of width 512, all that the GPU held:\n\n"
            + table(["model", "way", *columns, f"{columns[1]} over bptt", f"{columns[-1]} over bptt", "growth"], rows)]


def tables(models, about):
    """All tables, as text. about: {task: what its table shows}."""
    parts = [first_table(models), *far_table(models), *books_tables(models), *passage_table(models),
             *reach_table(models), *rates_table(models)]
    for task, text in about.items():
        parts += task_table(models, task, text)
    return "\n\n".join(filter(None, [*parts, *cost_tables(models), *race_table(models), *replay_table(models)]))
