"""report.py: intervals, means over seeds, tables and claims, from plain dicts."""
import numpy as np
import pytest

from nanomem import report
from nanomem.claims import claims_table


def test_an_interval_holds_the_mean_and_none_is_left_when_the_books_agree():
    theirs = [[10.0 * n, n] for n in (5, 7, 100)]
    mean, low, high = report.interval({1: [[nats - n / 2, n] for nats, n in theirs]}, {1: theirs})
    assert mean == low == high == -0.5
    mean, low, high = report.interval({1: [[nats + d, n] for (nats, n), d in zip(theirs, (9, -9, 3))]}, {1: theirs})
    assert low < mean < high and abs(mean - 3 / 112) < 1e-12


def losses(*each, first=1):
    """Two books of 50 and 100 tokens, with these losses of the seeds first, first + 1, ..."""
    return {seed: [[loss * n, n] for n in (50, 100)] for seed, loss in enumerate(each, first)}


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_an_interval_is_as_wide_as_the_seeds_differ(seeds):
    """The mean of S seeds varies by their variance over S, which S - 1 of S seeds estimate without bias."""
    assert report.interval(losses(*[1.0] * seeds), losses(*[2.0] * seeds)) == (-1.0, -1.0, -1.0)
    rng = np.random.default_rng(0)
    ours = rng.normal(1.0, 0.1, seeds)
    mean, low, high = report.interval(losses(*ours), losses(*[2.0] * seeds), draws=20_000)
    assert abs(mean - (ours.mean() - 2)) < 1e-12
    half = 1.96 * ours.std(ddof=1) / seeds ** 0.5
    assert 0.6 * 2 * half < high - low < 1.1 * 2 * half                        # few seeds have few different means


def test_one_book_with_one_seed_has_no_interval():
    ours, theirs = {1: [[50.0, 100]]}, {1: [[60.0, 100]]}
    mean, *ends = report.interval(ours, theirs)
    assert mean == -0.1 and np.isnan(ends).all()
    assert report.difference(dict(by_book=ours), dict(by_book=theirs)) == "-0.100"
    models = dict(full=dict(books=dict(all=dict(by_book=ours))), window=dict(books=dict(all=dict(by_book=theirs))))
    assert "| open" in claims(models) and "holds" not in claims(models)


def test_seeds_are_compared_by_number_and_only_those_of_both():
    ours, theirs = losses(9.0, 1.0), losses(2.0, 7.0, first=2)                 # seeds 1 and 2, and seeds 2 and 3
    assert report.interval(ours, theirs) == (-1.0, -1.0, -1.0)
    assert np.isnan(report.interval(losses(1.0), theirs)).all()
    part = lambda by_book: dict(by_book=by_book)
    assert report.difference(part(losses(1.0)), part(theirs)) == ""


@pytest.mark.parametrize("start, end, said", [(0, 512, "0-512"), (512, 1024, "512-1k"), (4096, 1 << 40, "4k and more")])
def test_a_column_says_where_it_begins_and_ends(start, end, said):
    assert report.range_of(dict(start=start, end=end)) == said


def result(task, model, seed, measured, **more):
    return dict(task=task, model=model, seed=seed, measured=measured, settings=dict(train=f"{task} {model} {seed}"),
                machine="a CPU", torch="2", minutes=1.0, train_minutes=2.0, **more)


def test_seeds_become_a_mean_and_accuracies_are_kept_too():
    results = [result("recall", "rmt", seed, [dict(length=9, questions=n, accuracy=a)])
               for seed, n, a in ((1, 60, 0.25), (2, 80, 0.75))] + [result("recall", "gpt", 1, [])]
    models = report.collect(results)
    assert models == dict(rmt=dict(recall=[dict(length=9, questions=70, accuracy=0.5, each=[0.25, 0.75])]),
                          gpt=dict(recall=[]))
    text = report.tables(models, dict(recall="by tokens"))
    assert "50% (25% to 75%)" in text and "| gpt " not in text
    assert report.merged({1: dict(a=[1, 2, 3], b="x"), 2: dict(a=[3, 4], b="x")}) == dict(a=[2, 3], b="x")
    assert report.merged({1: dict(time_over=None, by_book=[[5, 1]]), 3: dict(time_over=0.5, by_book=[[6, 1]])}) == dict(
        time_over=None, by_book={1: [[5, 1]], 3: [[6, 1]]})


def test_minutes_of_a_training_that_serves_two_tasks_count_once():
    results = [result(task, "rmt", 1, {}) for task in ("books", "passage")]
    for r in results:
        r["settings"] = dict(train="the same")
    assert "4.0 minutes" in report.head(results, "python bench.py")
    assert report.head(results, "python bench.py").startswith("python bench.py\na CPU, torch 2; seed 1; ")


def books(loss, per_book=(0, 0), **more):
    """A result of books: two books of 300 tokens, each with a loss of its own."""
    def part(start, end):
        n = end - start
        return dict(start=start, end=end, tokens=2 * n, loss=loss, bits_per_byte=2.0, word_perplexity=9.0, empty=0.125,
                    another=0.5, by_book={1: [[n * (loss + x), n] for x in per_book]})
    return dict(books=2, interleave=1, parameters=1000, state_bytes=2048, all=part(0, 300),
                by_position=[part(0, 256), part(256, 300)], in_segment=[dict(start=0, end=1, loss=loss)],
                words=[dict(start=n, end=n + 1, words=70, loss=20 * loss, by_book={1: [[20 * loss * 35, 35]] * 2})
                       for n in (0, 1)], search={}, **more)


def cost():
    reading = [dict(after=n, read_ms=0.5, decode_ms=2.0, held=100, peak=2 ** 21) for n in (1024, 2048)]
    return dict(parameters=1000, state_bytes=2048, compiled=False, training_tokens_per_s=12345.6, reading=reading,
                speed_over_nanogpt=1.5, share_of_product=0.3, training_peak=2 ** 20, read_growth=1.0,
                decode_growth=1.25)


def test_the_first_table_fits_a_page_and_its_words_are_plain():
    recall = [dict(length=128, start=n, end=n + 16, questions=99, accuracy=1.0) for n in range(0, 128, 16)]
    models = {name: dict(books=books(5.5), recall=recall, cost=cost()) for name in ("gpt", "memoryllm", "hmt_split")}
    first = report.first_table(models)
    assert all(len(line) <= 120 for line in first.splitlines())
    assert all(column in first for column in ("loss", "- gpt", "recall 0-15", "48-63", "state", "ms/token"))
    text = report.tables(models, dict(recall="by tokens back to the answer"))
    for title in ("Loss increase when the memory is empty", "Loss increase with another book's memory",
                  "Loss minus gpt's by position in the book (95% interval over books",
                  "Accuracy on recall, by tokens back to the answer"):
        assert title in text


def test_one_table_holds_the_far_questions_of_the_tasks_that_most_models_did():
    columns = lambda *each: [dict(start=i, end=i + 1, accuracy=a, questions=q) for i, (a, q) in enumerate(each)]
    recall, short = columns((1, 99), (0.5, 30), (0.1, 10)), columns((1, 9), (0.25, 9))
    models = {"gpt": dict(recall=recall), "rmt": dict(recall=short), "hmt": dict(recall=short, hops=short),
              "rmt:seg=16:segments=4": dict(needle=short), "gca:chunk=4:bypass=no": dict(needle=short),
              "gca:chunk=4:bypass=no/retrieval=random": dict(needle=columns((1, 9), (0, 9))),
              "hmt:seg=16:segments=4": dict(needle=recall), "hmt:bank=2": dict(recall=short),
              "hmt:bank=2:seg=16:segments=4": dict(needle=recall)}
    assert report.far_shares(models) == (["recall", "needle"], dict(
        gpt=[0.4, None], rmt=[0.25, 0.25], hmt=[0.25, 0.4], gca=[None, 0.25], **{"hmt:bank=2": [0.25, 0.4]}))
    text, = report.far_table(models)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert cells[0] == ["model", "recall", "needle"] and cells[2:] == [
        ["gpt", "40%", ""], ["rmt", "25%", "25%"], ["hmt", "25%", "40%"], ["gca", "", "25%"],
        ["hmt:bank=2", "25%", "40%"]]
    assert text in report.tables(models, {})
    assert report.far_table(dict(gpt=dict(recall=recall), rmt=dict(recall=short))) == []   # one task: its own table


def test_a_model_that_was_not_measured_leaves_a_gap():
    text = report.first_table(dict(gpt=dict(books=books(5.5)), xl=dict(cost=cost(), books=books(5.0)), rmt={}))
    gpt, xl = text.splitlines()[-2:]
    assert gpt.startswith("| gpt ") and xl.startswith("| xl ") and "12.3k" in xl and gpt.count("|") == xl.count("|")
    text = report.first_table(dict(gpt=dict(books=books(5.5)), xl=dict(cost=cost())))       # each has its own columns
    assert [c.strip() for c in text.splitlines()[-4].split("|")[1:-1]] == [
        "model", "params", "loss", "- gpt", "state", "train tok/s", "ms/token"]
    assert report.first_table(dict(gpt=dict(retain=[]))) is None and report.tables(dict(gpt={}), {}) == ""


def test_a_difference_that_may_be_none_is_marked():
    models = dict(gpt=dict(books=books(5.0)), xl=dict(books=books(4.5)), rmt=dict(books=books(5.0, (-0.5, 0.5))))
    text = next(t for t in report.books_tables(models) if t.startswith("Loss minus gpt's"))
    assert "-0.500 (-0.500 -0.500) " in text and "+0.000 (-0.500 +0.500)~" in text


def claims(models):
    return "".join(claims_table(models))


def curve(*accuracies):
    return [dict(start=4 * 2 ** i, accuracy=a) for i, a in enumerate(accuracies)]


MPLUS = "mplus:ask=self:query=1:store=512"   # as the task retain has it


def test_a_store_keeps_longer_or_not():
    models = {"memoryllm": dict(retain=curve(1, 0.9, 0.4, 0.1, 0, 0)),
              MPLUS: dict(retain=curve(1, 1, 1, 1, 1, 1)), f"{MPLUS}/search=random": dict(retain=curve(0, 0))}
    assert "after 16 tokens, with the store at none of up to 128" in claims(models)
    assert "does not hold" not in claims(models)
    models[MPLUS] = dict(retain=curve(1, 0.9, 0.8, 0.7, 0.4))
    assert "after 16 tokens, with the store after 64" in claims(models) and "does not hold" in claims(models)
    models[MPLUS] = dict(retain=curve(1, 1, 1, 1, 1))                          # up to 64 tokens: not 8 times as many
    assert "none of up to 64" in claims(models) and "does not hold" in claims(models)


def test_an_ablation_is_not_taken_for_the_model_of_a_paper():
    recall = dict(recall_bytes=[dict(start=i, accuracy=0.5 * i, questions=9) for i in (0, 1)])
    assert claims({"deltanet:rule=gated": recall, "mamba:conv=no": recall, "titans:momentum=no": recall}) == ""
    assert "Gated DeltaNet" in claims(dict(deltanet=recall, mamba=recall))


def test_eidetic_tokens_help_or_not():
    answers = lambda near, far: dict(mqar=[dict(accuracy=near, questions=30), dict(accuracy=far, questions=70)])
    models = {"mamba:state=8": answers(0.24, 0.24), "hybrid:state=8:window=16": answers(1, 0.2),
              "bmojo_f:state=8:window=16": answers(1, 0.1), "bmojo:state=8:window=16:eidetic=32": answers(1, 1),
              "bmojo:state=8:window=16:eidetic=32:select=random": answers(0, 0)}
    assert "24%, 44%, 37%, 100% of all questions; beyond the window 24%, 20%, 10%, 100% | holds |" in claims(models)
    models["mamba:state=8"] = answers(1, 1)
    assert "| open |" in claims(models)
    models["bmojo:state=8:window=16:eidetic=32"] = answers(0.9, 0.9)
    assert "does not hold" in claims(models)


def test_a_claim_on_a_task_is_open_where_seeds_of_one_lie_among_those_of_the_other():
    seeds = lambda *each: dict(recall_bytes=[dict(start=i, accuracy=sum(each) / len(each), each=[*each], questions=9)
                                             for i in (0, 1)])
    says = lambda a, b: claims(dict(deltanet=seeds(*a), mamba=seeds(*b)))
    assert "| open |" in says((0.5, 0.9), (0.1, 0.6)) and "holds |" in says((0.7, 0.9), (0.1, 0.6))
    assert "does not hold" in says((0.2, 0.3), (0.4, 0.6))
    assert "| open |" in says((0.54,), (0.5,)) and "holds |" in says((0.56,), (0.5,))     # one seed: not by a little


@pytest.mark.parametrize("length, measured", [(65_536, True), (4096, False)])
def test_a_needle_is_found_far_away_or_that_was_not_measured(length, measured):
    needle = [dict(length=64, accuracy=0.9, hits=0.9), dict(length=length, accuracy=1, hits=1)]
    text = claims({"gca:chunk=4:bypass=no": dict(needle=needle)})
    assert ("100% right, 100% retrieved in 65,536 tokens" in text) == measured and bool(text) == measured


def test_a_model_beats_another_on_books_or_not():
    models = dict(rmt=dict(books=books(5.0)), hmt=dict(books=books(4.5)))
    assert "-0.500 nats a token (-0.500 to -0.500), one seed" in claims(models)
    assert "does not hold" not in claims(models)
    models["hmt"]["books"]["all"]["by_book"] = {1: [[300 * 6.0, 300], [300 * 4.0, 300]]}
    assert "(-1.000 to +1.000), one seed | open |" in claims(models)
    models["hmt"]["books"]["all"]["by_book"] = {1: [[300 * 6.0, 300]] * 2}
    assert "does not hold" in claims(models)
    models["hmt"]["books"]["all"]["by_book"] = {2: [[300 * 4.0, 300]] * 2}     # no seed that rmt has
    assert claims(models) == ""


def test_one_model_recalls_more_than_another_or_not():
    columns = lambda *each: [dict(start=i, accuracy=a, questions=q) for i, (a, q) in enumerate(each)]
    names = deltanet, mamba = "deltanet:state=52", "mamba:state=60"            # with states of the same size
    models = {deltanet: dict(recall_bytes=columns((0, 9), (0.9, 30), (0.5, 10))),
              mamba: dict(recall_bytes=columns((1, 9), (0.5, 40)))}
    assert "80% from before the segment, mamba 50% (recall_bytes)" in claims(models)
    assert "does not hold" not in claims(models)
    models[deltanet]["recall_bytes"] = columns((1, 9), (0.54, 40))
    assert "54% from" in claims(models) and "| open |" in claims(models)
    models[deltanet]["recall_bytes"] = columns((1, 9), (0.44, 40))
    assert "does not hold" in claims(models)
    for name in names:                                                         # both know nearly all
        models[name]["recall_bytes"] = columns((0, 9), (0.97, 40))
    assert "mamba 97% (recall_bytes) | open |" in claims(models)
    other = dict(recall=columns((0, 9), (1, 9)))                               # with states of other sizes: no claim
    assert claims(dict(deltanet=other, mamba=other)) == "" and "Landmark" in claims(dict(landmark=other, full=other))


def test_gradient_through_more_segments_helps_or_not():
    columns = lambda far: dict(delayed=[dict(start=i, accuracy=a, questions=9) for i, a in enumerate((0, far))])
    models = {"memformer:segments=4": columns(0.6), "memformer:segments=2": columns(0.4),
              "memformer:segments=1": columns(0.7), "memformer": columns(0.9)}
    assert "90% of old questions with gradient through 8 segments, 60%, 40%, 70% through 4, 2, 1" in claims(models)
    assert "does not hold" not in claims(models)
    models["memformer:segments=1"] = columns(1)
    assert "does not hold" in claims(models)


def test_each_part_of_titans_helps_or_not():
    columns = lambda far: dict(recall=[dict(start=i, accuracy=a, questions=9) for i, a in enumerate((1, far))])
    models = {"titans:momentum=no": columns(0.8), "titans:forget=no": columns(0.7), "titans": columns(0.9)}
    assert "90.0% from before the segment, without momentum 80.0%, without forgetting 70.0%" in claims(models)
    assert "does not hold" not in claims(models)
    models["titans:momentum=no"] = columns(0.96)
    assert "does not hold" in claims(models)
    models.update({name: columns(1) for name in models})
    assert " open |" in claims(models)


def test_replay_stands_beside_the_paper():
    ways = {way: [dict(K=K, peak=peak * K ** (way == "bptt"), ms=1.0, bytes_over_bptt=0.4, time_over_bptt=1.15)
                  for K in (2, 4, 32)] for way, peak in (("bptt", 100), ("checkpointed", 100), ("replay", 100))}
    models = dict(memformer=dict(replay=ways))
    text, = report.replay_table(models)
    assert text.count("| memformer |") == text.count("| the paper |") == 3 and "0.45x, 1.11x" in text
    assert "0.40x the bytes, 1.15x the time" in claims(models) and "does not hold" not in claims(models)
    ways["replay"][1]["time_over_bptt"] = 1.5
    assert "does not hold" in claims(models)
    assert claims(dict(gpt=dict(replay=ways))) == ""                             # memformer's claim, not gpt's
    assert report.replay_table({}) == []


def test_reach_has_a_column_for_each_distance_and_two_digits():
    part = lambda start, kl: dict(start=start, end=2 * start, kl=kl, noise=0.0)
    models = dict(gpt=dict(reach=[part(512, 0.0123), part(1024, 0)]),
                  rmt=dict(reach=[part(512, 1.26e-5), part(1024, 2e-9)]))
    head, _, gpt, rmt = report.reach_table(models)[0].splitlines()[-4:]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["model", "512", "1k", "rounding"]
    assert gpt.split("|")[2:-1] == ["   0.012 ", "     0 ", "        0 "] and " 1.3e-05 " in rmt and " 2e-09 " in rmt
    assert report.reach_table(dict(gpt={})) == []


def test_an_interval_of_two_or_three_seeds_is_too_narrow_by_as_much_as_the_readme_says():
    """14 books; losses differ by 0.02 nats between books and by 0.011 between seeds; the truth is 0."""
    rng = np.random.default_rng(1)
    for S, share in (2, 0.85), (3, 0.88):
        held = 0
        for _ in range(200):
            nats = rng.normal(0, 0.02, 14) + rng.normal(0, 0.011, (S, 1))
            ours, theirs = ({s: [[x, 1] for x in one] for s, one in enumerate(of)} for of in (nats, 0 * nats))
            _, low, high = report.interval(ours, theirs, draws=400)
            held += low <= 0 <= high
        assert abs(held / 200 - share) < 0.06
