"""The synthetic tasks: every answer stands where the distance says, and questions are drawn as described."""
import json
import re

import numpy as np
import pytest
import torch

from nanomem import suites, tasks
from nanomem.cli import UserError


def read(loader, n):
    return [loader.next() for _ in range(n)]


@pytest.mark.parametrize("name", [*tasks.TASKS, "recall:pairs=8:mixed=yes"])
def test_the_answer_stands_where_the_distance_says(name):
    batch = tasks.TaskLoader(name, 16, 128, seed=1).next()
    b, t = (batch.y >= 0).nonzero(as_tuple=True)
    assert len(b) and batch.fresh.all() and batch.x.max() < tasks.vocab_of(name)
    assert (batch.distance[batch.y < 0] == 0).all()
    back = t - batch.distance[b, t]
    assert (batch.x[b, t] == batch.x[b, back]).all()                            # the same key stood there
    assert (batch.y[b, t] == batch.x[b, back + 1]).all()                        # and its value behind it
    for b, q, p in zip(b, t, back):                                             # and nowhere in between
        assert not ((batch.x[b, p + 1:q] == batch.x[b, q]) & (batch.x[b, p + 2:q + 1] == batch.y[b, q])).any()
    assert not tasks.TaskLoader(name, 16, 128, seed=2).next().x.equal(batch.x)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_drawn_example_of_a_task_keeps_its_law(name):
    lines = re.findall(r"^ {8}(inputs |targets|distance) (.*)$", tasks.TASKS[name].__doc__, re.M)
    x, y = (re.sub(r"[| ]", "", line) for _, line in lines[:2])
    distances = [int(d) for d in re.findall(r"\d+", lines[2][1])]
    asked = [t for t, answer in enumerate(y) if answer != "_"]
    assert len(x) == len(y) and len(asked) >= 2
    for t, d in zip(asked, distances, strict=True):
        assert x[t] == x[t - d] and y[t] == x[t - d + 1] and x[t].isalpha() and y[t].isdigit()


def test_mixed_texts_have_any_number_of_different_pairs():
    x, y, _ = tasks.recall(np.random.default_rng(0), 200, 64, pairs=4, mixed=True)
    count = [len(set(x[y >= 0])) for x, y in zip(x, y)]
    assert (y >= 0).sum(1).max() == 16 - 1 and all(count.count(n) > 25 for n in (1, 2, 3, 4))


def test_every_question_of_mqar_has_its_pair_at_the_beginning():
    x, y, distances = tasks.mqar(np.random.default_rng(0), 50, 65, pairs=7)
    for x, y, d in zip(x, y, distances):
        pairs = dict(zip(x[:14:2], x[1:14:2]))
        keys, values = set(pairs), set(pairs.values())
        assert len(keys) == len(values) == 7, "two keys, or two values, are equal"
        asked = np.flatnonzero(y >= 0)
        assert asked.min() >= 14 and (asked % 2 == 0).all() and sorted(x[asked]) == sorted(keys)
        assert all(y[t] == pairs[x[t]] and x[t - d[t]] == x[t] and t - d[t] < 14 for t in asked)
        rest = np.delete(x, [*range(14), *asked])
        assert (rest == 0).all() and (np.delete(d, asked) == 0).all()
    noisy = tasks.mqar(np.random.default_rng(0), 50, 65, pairs=7, noise=True)[0]
    assert not set(noisy[:, 14:].ravel()) <= set(x) and noisy.max() < tasks.NOISE + tasks.VALUES + tasks.KEYS


def test_questions_of_mqar_come_soon_as_if_drawn_one_by_one():
    rng = np.random.default_rng(0)
    _, y, _ = tasks.mqar(rng, 4000, 40, pairs=5, power=0.3)
    slow = np.zeros(15)                                        # how often each place is taken
    for _ in range(4000):
        p = np.arange(1.0, 16) ** (0.3 - 1)
        for _ in range(5):
            place = rng.choice(15, p=p / p.sum())
            slow[place] += 1 / 4000
            p[place] = 0
    assert np.abs((y[:, 10:40:2] >= 0).mean(0) - slow).max() < 0.03
    even = (tasks.mqar(rng, 4000, 40, pairs=5, power=1)[1][:, 10:40:2] >= 0).mean(0)
    assert np.abs(even - 1 / 3).max() < 0.03


@pytest.mark.parametrize("pairs, asks, hops, notice", [(1, 1, 1, 0), (3, 2, 1, 0), (4, 3, 1, 8), (2, 2, 3, 16)])
def test_needles_are_followed_through_their_hops(pairs, asks, hops, notice):
    """From every question: find its key in the text, go on with what stands behind it, and so on to the value."""
    batch = tasks.TaskLoader(f"needle:pairs={pairs}:asks={asks}:hops={hops}:notice={notice}", 8, 256).next()
    for x, y, distances in zip(batch.x, batch.y, batch.distance):
        questions = (y >= 0).nonzero()[:, 0].tolist()
        assert sorted(x[questions].bincount().tolist())[-pairs:] == [asks] * pairs
        assert (x >= tasks.NOISE).sum() == pairs * (2 * hops + asks * (1 + (notice > 0))), "values and keys only there"
        for t in questions:
            assert x[t - notice] == x[t]
            key = x[t]
            for hop in range(hops):
                place = (x == key).nonzero()[min(hop, 1), 0].item()   # one that was led to stood there first
                key = x[place + 1]
            assert key == y[t] and place == t - distances[t]


def test_a_needle_lies_at_the_distance_asked_for():
    assert (tasks.TaskLoader("needle", 4, 64, distance=50).next().distance[:, -1] == 50).all()
    for make, why in [(lambda: tasks.TaskLoader("needle", 4, 64, distance=64), "distance 64 does not fit into 64"),
                      (lambda: tasks.TaskLoader("recall", 4, 64, pairs=65), "65 pairs that are asked for"),
                      (lambda: tasks.TaskLoader("recall", 4, 8), "2 pairs that are asked for 0 times"),
                      (lambda: tasks.TaskLoader("recall:pair=3", 4, 64), "no setting pair: did you mean pairs"),
                      (lambda: tasks.TaskLoader("recall:pairs=x", 4, 64), "takes a whole number"),
                      (lambda: tasks.TaskLoader("mqar", 4, 64, pairs=17), "17 pairs and their questions do not fit"),
                      (lambda: tasks.TaskLoader("mqar:power=1000", 4, 64), "power lies between 0 .*, got 1000"),
                      (lambda: tasks.TaskLoader("retain", 4, 64, facts=9), "9 facts .* 64 keys and 16 chunks of 4")]:
        with pytest.raises(UserError, match=why):
            make().next()


def test_delayed_pairs_are_asked_for_after_a_gap_and_no_answer_follows():
    batch = tasks.TaskLoader("delayed:pairs=2:gap=40", 8, 96).next()
    b, t = (batch.y >= 0).nonzero(as_tuple=True)
    late = t >= 16                                             # behind the pairs at the beginning
    assert late.any() and t[late].min() >= 40
    b, t = b[late & (t < 95)], t[late & (t < 95)]
    assert (batch.x[b, t + 1] != batch.y[b, t]).all()
    with pytest.raises(UserError, match="from 96 on do not fit into 96 tokens"):
        tasks.TaskLoader("delayed:gap=96", 8, 96).next()


def test_a_text_that_lasts_for_several_bptt_windows_is_one_text():
    whole, parts = tasks.TaskLoader("delayed", 4, 96), read(tasks.TaskLoader("delayed:bptt_windows=3", 4, 32), 6)
    for i, batch in enumerate(read(whole, 2)):
        three = parts[3 * i:3 * i + 3]
        for field in ("x", "y", "position", "distance"):
            assert torch.cat([getattr(p, field) for p in three], 1).equal(getattr(batch, field))
        assert (batch.position == torch.arange(96)).all()
        assert [p.fresh.tolist() for p in three] == [[True] * 4, [False] * 4, [False] * 4]
        assert all(p.book.equal(batch.book) for p in three)
    with pytest.raises(UserError, match="one BPTT window at least, got bptt_windows=0"):
        tasks.TaskLoader("delayed:bptt_windows=0", 4, 32)


@pytest.mark.parametrize("name", ["recall", "delayed:bptt_windows=3"])
def test_a_saved_position_goes_on_with_the_same_batches(name):
    loader, again = tasks.TaskLoader(name, 2, 96), tasks.TaskLoader(name, 2, 96)
    read(loader, 5)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for a, b in zip(read(loader, 9), read(again, 9)):
        assert all(s.equal(t) for s, t in zip(a, b))


def test_training_and_held_out_texts_of_a_task_are_different_ones():
    import train
    for seed in (0, 1, 2):
        loader, held_out, *_ = train.loaders(train.Run(data="recall", batch=2, segments=2, seed=seed), {}, 32)
        texts = [[tuple(batch.next().x.flatten().tolist()) for _ in range(9)] for batch in (loader, held_out())]
        assert not {*texts[0]} & {*texts[1]}


def test_settings_may_follow_the_name():
    one, two = (tasks.TaskLoader(name, 4, 64, seed=3, **more).next() for name, more in
                [("needle:distance=50", {}), ("needle", dict(distance=50))])
    assert one.x.equal(two.x) and (one.distance[:, -1] == 50).all()
    assert (tasks.TaskLoader("needle:distance=50", 4, 64, distance=9).next().distance[:, -1] == 9).all()


@pytest.mark.parametrize("name", ["recall:pairs=20", "needle:pairs=10:hops=3", "retain:facts=40", "mqar:pairs=24"])
def test_a_task_with_many_keys_has_a_larger_vocabulary(name):
    assert tasks.is_task(name) and not tasks.is_task("data/" + name)
    batch = tasks.TaskLoader(name, 64, 512).next()
    assert batch.x.max() == tasks.vocab_of(name) - 1 and tasks.vocab_of("recall") == tasks.NOISE + tasks.VALUES + 16


def test_retain_asks_once_for_each_fact_at_the_beginning_of_a_later_chunk():
    for T, facts in (64, 8), (64, 3), (2048, 16):
        batch = tasks.TaskLoader("retain", 32, T, facts=facts if facts == 3 else 0).next()
        b, t = (batch.y >= 0).nonzero(as_tuple=True)
        distance = batch.distance[b, t]
        told = t - distance
        assert (t % 4 == 0).all() and (told % 4 > 0).all() and (distance // 4 == t // 4 - told // 4 - 1).all()
        assert b.bincount().tolist() == [facts] * 32
        assert all(len(set(batch.x[i, t[b == i]].tolist())) == facts for i in range(32)), "a key is asked for twice"


def guesses(task, T, least):
    """What is right without a key: the newest value that stood behind a key, and one of all these by chance. Of the
    questions with a distance of `least`."""
    batch = tasks.TaskLoader(task, 128, T, seed=(0, 2)).next()
    newest, among = [], []
    for x, y, far in zip(batch.x.tolist(), batch.y.tolist(), batch.distance.tolist()):
        values = []
        for t in range(T):
            if t and x[t - 1] >= tasks.NOISE + tasks.VALUES > x[t] >= tasks.NOISE:
                values.append(x[t])
            if y[t] >= 0 and far[t] >= least:
                newest.append(y[t] == values[-1])
                among.append((y[t] in values) / len({*values}))
    return np.mean(newest), np.mean(among)


def test_what_guessing_gets_is_as_the_tables_and_the_readme_say():
    for task in suites.TASKS.values():
        if task.guess == suites.NEWEST:
            shares = [guesses(test, T, 0) for T, test in task.tests.items() if T <= 4096]
            assert 0.5 < np.min(shares) and np.max(shares) < 0.77
    for T, test in suites.TASKS["needle8"].tests.items():
        assert abs(guesses(test, T, 0)[0] - 0.29) < 0.02
    for name, share in dict(recall=0.15, recall_bytes=0.15, recall512=0.15, recall2=0.55).items():
        (T, test), = suites.TASKS[name].tests.items()
        assert abs(guesses(test, T, suites.TASKS[name].edges[1])[1] - share) < 0.01
