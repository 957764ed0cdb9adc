"""The pictures of bench.py, as SVG files, from what was measured. They are read on white and on black paper."""
import contextlib

import numpy as np

from .report import column_of, far_shares, interval, range_of, reach_columns, results_of, shares_right, state_of
from .suites import TASKS

INK, COLORS = "#7d8590", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")   # Okabe and Ito
MOST_LINES = len(COLORS)


@contextlib.contextmanager
def figure(path, width, height, columns=1):
    """Axes to draw on. Saved to the path afterwards."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with pyplot.rc_context({**grey, "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "nanomem",
                            "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                            "axes.titlesize": 11, "axes.facecolor": "none"}):
        fig, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
        yield axes
        fig.savefig(path, transparent=True, metadata=dict(Date=None))
        pyplot.close(fig)


def heat_map(path, title, models, columns, values, label, xlabel, ends, log=False):
    """A cell for each model and column. values: {model: a number for each column, None where there is none}; label
    makes a number the text of its cell. The colours are even in the values, or in their logarithms, between the
    `ends`."""
    grid = np.array([[np.nan if v is None else v for v in values[model]] for model in models], float)
    with np.errstate(divide="ignore"):
        shade = np.where(grid > 0, np.log10(grid), np.nan) if log else grid
    low, high = ends
    with figure(path, 0.5 + 0.08 * max(map(len, models)) + 0.62 * len(columns), 1.1 + 0.27 * len(models)) as axes:
        axes.imshow(shade, cmap="cividis", aspect="auto", vmin=low, vmax=high)
        for (i, j), v in np.ndenumerate(grid):
            if np.isfinite(v):
                dark = shade[i, j] < (low + high) / 2
                on = INK if not np.isfinite(shade[i, j]) else "white" if dark else "black"
                axes.text(j, i, label(v), ha="center", va="center", color=on, fontsize=9)
        axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(models)), yticklabels=models,
                 xlabel=xlabel)
        axes.figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


def apart(places, gap):
    """The places, moved so that each is at least `gap` from the next: for labels that would overlap."""
    order, moved = np.argsort(places), np.array(places, float)
    for _ in range(200):
        for i, j in zip(order, order[1:]):
            missing = gap - (moved[j] - moved[i])
            if missing > 1e-9:
                moved[i] -= missing / 2
                moved[j] += missing / 2
    return moved


def lines(path, title, columns, series, xlabel, ylabel):
    """A line for each of {name: [(value, low, high) for each column]}, with its interval shaded and its name at its
    end; 0 is drawn too."""
    with figure(path, 8.6, 4.2) as axes:
        x, ends = np.arange(len(columns)), [s[-1][0] for s in series.values()]
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        every = np.array(list(series.values()))
        span = max(every.max(), 0) - min(every.min(), 0)
        for (name, s), color, place in zip(series.items(), COLORS, apart(ends, 0.06 * span)):
            value, low, high = np.transpose(s)
            axes.plot(x, value, color=color, linewidth=2, marker="o", markersize=4)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.text(x[-1] + 0.12, place, name, color=color, va="center")
        axes.set(xticks=x, xticklabels=columns, xlim=(-0.2, len(x) - 0.3), xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, pad=8)


def points(axes, title, places, xlabel, ylabel):
    """A point for each of {name: (bytes, value)}."""
    xy = np.array(list(places.values()), float)
    axes.set_xscale("symlog", base=2, linthresh=2 ** 10)
    axes.margins(y=0.12)
    axes.scatter(xy[:, 0], xy[:, 1], color=COLORS[0], s=18)
    ticks = [0, *(2 ** i for i in range(10, 25, 2) if 2 ** i <= 4 * xy[:, 0].max())]
    axes.set_xticks(ticks, ["0", *(f"{t // 1024} KB" if t < 2 ** 20 else f"{t // 2 ** 20} MB" for t in ticks[1:])])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, pad=8)


def name_points(axes, places):
    """Write each name beside its point, where nothing else is; with a line to it if that is not at the same height.
    When all else is drawn: from then on it is known where that is."""
    axes.figure.draw_without_rendering()
    names, xy, print_points = list(places), np.array(list(places.values()), float), 72 / axes.figure.dpi
    at = axes.transData.transform(xy) * print_points
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]                      # left, low, right, high
    taken.append((-np.inf, -np.inf, axes.bbox.x0 * print_points, np.inf))      # and what is left of the axis
    free = lambda box: not any(box[0] < right and left < box[2] and box[1] < high and low < box[3]
                               for left, low, right, high in taken)
    for i in np.argsort(-xy[:, 0]):                                            # from the right
        (x, y), wide, spots = at[i], 5.5 * len(names[i]), []
        for up in (0, -11, 11, -22, 22, -33, 33):
            away, low, high = 6 + 0.4 * abs(up), y + up - 5, y + up + 5
            spots += [("left", away, up, (x + away, low, x + away + wide, high)),
                      ("right", -away, up, (x - away - wide, low, x - away, high))]
        align, right, up, box = next((spot for spot in spots if free(spot[-1])), spots[0])
        taken.append(box)
        axes.annotate(names[i], xy[i], (right, up), textcoords="offset points", ha=align, va="center", fontsize=9,
                      arrowprops=dict(arrowstyle="-", color=INK, linewidth=0.5) if up else None)


def bars(path, title, values, label, xlabel):
    """A bar for each of {name: value}, with its value at its end."""
    with figure(path, 8.6, 1.0 + 0.24 * len(values)) as axes:
        y = np.arange(len(values))[::-1]
        axes.barh(y, list(values.values()), color=COLORS[0], height=0.7)
        for place, v in zip(y, values.values()):
            axes.text(v, place, " " + label(v), va="center", fontsize=9)
        axes.set(yticks=y, yticklabels=list(values), xlabel=xlabel, ylim=(-0.6, len(values) - 0.4))
        axes.set_title(title, pad=8)


# ----------------------------------------------------------------------------------------------------------------------
# What bench.py draws, from models = {model: {task: what was measured, merged over seeds}}

def accuracy_map(models, task, path):
    """How much of a task each model answers, by distance or by length, beside the bytes of its state. First who
    answers most of all questions but the nearest."""
    results = results_of(models, task)
    results = dict(sorted(results.items(), key=lambda item: -shares_right(item[1][1:] or item[1]).mean()))
    columns = [column_of(part) for part in max(results.values(), key=len)]
    values = {}
    for name, r in results.items():
        found = {column_of(part): part["accuracy"] for part in r}
        values[f"{name}  {state_of(r)}"] = [found.get(column) for column in columns]
    far = "tokens back to the answer" if "start" in next(iter(results.values()))[0] else "tokens in the text"
    heat_map(path, f"{task}: right answers, % (left: state of one text)", list(values), columns, values,
             lambda v: f"{100 * v:.0f}", far, ends=(0, 1))


def far_map(models, path):
    """How much of each task each model answers, of all questions but the nearest; None if there is only one task."""
    done, shares = far_shares(models)
    if len(done) < 2:
        return None
    heat_map(path, "Right answers, %, of all questions but the nearest", list(shares),
             [task.replace("_", "\n") for task in done], shares, lambda v: f"{100 * v:.0f}", "task", ends=(0, 1))
    return path


def compared(models):
    """The results on books that have a seed in common with gpt's; {} without gpt's."""
    results = results_of(models, "books")
    seeds = {*results["gpt"]["all"]["by_book"]} if "gpt" in results else set()
    return {name: r for name, r in results.items() if seeds & {*r["all"]["by_book"]}}


def books_lines(models, path):
    """Loss minus gpt's by position, of the models that are best in the end; None without gpt's."""
    results = compared(models)
    base = results.pop("gpt", None)
    if not results:
        return None
    best = sorted(results, key=lambda name: results[name]["all"]["loss"])[:MOST_LINES]
    series = {name: [interval(ours["by_book"], theirs["by_book"])
                     for ours, theirs in zip(results[name]["by_position"], base["by_position"])] for name in best}
    which = "" if len(best) == len(results) else f", the best {len(best)} of {len(results)} models"
    lines(path, f"Held-out books: loss minus gpt's{which} (shaded: 95% over books and seeds)",
          [range_of(part) for part in base["by_position"]], series, "position in the book, tokens", "nats a token")
    return path


def against_bytes(models, path):
    """What a memory is worth against its size in that test: far recall, and the gain over gpt on books. None where
    there is neither recall of two models nor gpt's books and another's."""
    recall, books, panels = results_of(models, "recall"), compared(models), []
    if len(recall) > 1:
        panels.append(("recall from before the segment", "right answers, %",
                       {name: (max(part.get("state_bytes", 0) for part in r), 100 * shares_right(r[1:]).mean())
                        for name, r in recall.items()}))
    if len(books) > 1:
        gpt = books["gpt"]["all"]["by_book"]
        panels.append(("books: gain over gpt", "nats a token",
                       {name: (r["state_bytes"], interval(gpt, r["all"]["by_book"])[0]) for name, r in books.items()}))
    if not panels:
        return None
    with figure(path, 9.6 if len(panels) > 1 else 7.2, 4.4, columns=len(panels)) as all_axes:
        for axes, (title, ylabel, places) in zip(np.atleast_1d(all_axes), panels):
            points(axes, title, places, "bytes of state for one text", ylabel)
        for axes, (*_, places) in zip(np.atleast_1d(all_axes), panels):
            name_points(axes, places)
    return path


def reach_map(models, path):
    """How far back the predictions of each model depend on the text."""
    results = results_of(models, "reach")
    columns = reach_columns(max(results.values(), key=len))
    values = {name: [x["kl"] for x in r] + [None] * (len(columns) - len(r)) for name, r in results.items()}
    label = lambda v: f"{v:.0e}".replace("e+00", "").replace("e-0", "e-") if v else "0"
    heat_map(path, "How much one changed token moves later predictions: KL in nats (colours: 1e-8 to 1)",
             list(results), columns, values, label, "d: the predictions are d to 2d - 1 tokens later", log=True,
             ends=(-8, 0))


def reading_bars(models, path):
    """The time to read a million tokens, at the speed that was measured after the longest text."""
    last = {name: r["reading"][-1] for name, r in results_of(models, "cost").items()}
    after = next(iter(last.values()))["after"]
    bars(path, f"Seconds to read a million tokens, one text, at the speed after {after:,}",
         {name: 1000 * x["read_ms"] for name, x in last.items()}, lambda v: f"{v:.0f}", "seconds")


def draw(models, folder):
    """A picture of each kind for which there are results. Returns the names of the files."""
    names = []
    for task in TASKS:
        if results_of(models, task):
            accuracy_map(models, task, f"{folder}/{task}.svg")
            names.append(f"{task}.svg")
    names += [f"{name}.svg" for name, made in (("tasks", far_map), ("books", books_lines), ("memory", against_bytes))
              if made(models, f"{folder}/{name}.svg")]
    if results_of(models, "reach"):
        reach_map(models, f"{folder}/reach.svg")
        names.append("reach.svg")
    if results_of(models, "cost"):
        reading_bars(models, f"{folder}/cost.svg")
        names.append("cost.svg")
    return names
