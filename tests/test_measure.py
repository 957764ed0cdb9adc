"""measure.py: what it measures on tiny models and texts, against slower ways and against what must be so."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import nanomem
from nanomem import data, measure, reach, suites
from nanomem.cli import UserError
from nanomem.data import Batch

from conftest import run, tiny

S, EDGES = 32, suites.POSITIONS


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of four small books, two for validation."""
    folder = tmp_path_factory.mktemp("books") / "shards"
    texts = [(str(i), f"Book {i}. " * (60 * i)) for i in range(1, 5)]
    data.write_shards(folder, data.tokenizer("bytes"), dict(train=texts[:2], validation=texts[2:]))
    return folder


@pytest.fixture
def books(shards):
    return data.open_shards(shards, "validation")


def by_position(model, books, **more):
    return measure.loss_by_position(model, books, EDGES, **{**dict(batch=8, segments=2), **more})


# books

@torch.no_grad()
def test_every_token_is_scored_once_and_the_units_agree(books):
    model = tiny("rmt", vocab=320)
    found, few = by_position(model, books), by_position(model, books, upto=100)
    nats = 0.0
    for tokens in books.tokens:                               # the slow way: a book at a time
        ids, state = torch.tensor(tokens.astype(np.int64))[None], model.init_state(1)
        for i in range(0, ids.size(1) - 1, S):
            x, y = ids[:, i:i + S], ids[:, i + 1:i + 1 + S]
            logits, state = model(F.pad(x, (0, S - x.size(1))), state)
            nats += F.cross_entropy(logits[0, :y.size(1)], y[0], reduction="sum").item()
    texts = [books.enc.decode_bytes(tokens[1:].tolist()) for tokens in books.tokens]
    n = sum(map(len, texts))
    assert few["all"]["tokens"] == 100 * len(books) and len(books.tokens[0]) > 101
    assert found["all"]["tokens"] == n and abs(found["all"]["loss"] - nats / n) < 1e-4
    assert abs(found["all"]["bits_per_byte"] - nats / n / np.log(2)) < 1e-4     # one byte a token
    assert abs(found["all"]["word_perplexity"] / np.exp(nats / sum(len(text.split()) for text in texts)) - 1) < 1e-3
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(part["tokens"] for part in found["by_position"]) == n
    assert sum(tokens for _, tokens in found["all"]["by_book"]) == n


def test_a_model_without_memory_does_not_care_about_interleaved_books(books):
    one, two = (by_position(tiny("gpt", vocab=320), books, interleave=n) for n in (1, 2))
    assert abs(one["all"]["loss"] - two["all"]["loss"]) < 1e-6
    assert np.allclose(one["all"]["by_book"], two["all"]["by_book"])


def test_an_empty_memory_or_another_books_changes_nothing_where_there_is_none(books):
    found = {name: by_position(tiny(name, vocab=320), books)["all"] for name in ("gpt", "xl")}
    assert found["gpt"]["empty"] == found["gpt"]["another"] == 0
    assert abs(found["xl"]["empty"]) > 1e-3 and abs(found["xl"]["another"]) > 1e-3


@pytest.mark.parametrize("segments", [1, 3])
def test_what_memory_is_worth_is_the_loss_of_a_loop_with_other_states(books, segments):
    """Before each segment, also within a BPTT window: of two elements those of each other, or those of no text."""
    model = tiny("rmt", vocab=320)
    loss = by_position(model, books, segments=segments, upto=3 * S)["all"]
    tokens = torch.stack([torch.tensor(t[:3 * S + 1].astype(np.int64)) for t in books.tokens])        # (2, 3S+1)
    for name, change in dict(another=lambda state: {k: v.flip(0) for k, v in state.items()},
                             empty=lambda state: model.init_state(2)).items():
        state, nats = model.init_state(2), 0.0
        with torch.no_grad():
            for i in range(0, 3 * S, S):
                x, y = tokens[:, i:i + S], tokens[:, i + 1:i + 1 + S]
                logits, state = model(x, change(state))
                nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        assert abs(loss["loss"] + loss[name] - nats / (6 * S)) < 1e-5


def test_a_single_book_has_no_other_memory(books):
    books.names, books.tokens = books.names[:1], books.tokens[:1]
    assert "another" not in by_position(tiny("rmt", vocab=320), books)["all"]


def test_a_book_that_has_ended_is_no_other_book(books):
    books.tokens = [books.tokens[0][:41], books.tokens[1][:301]]
    short, long = measure.token_losses(tiny("rmt", vocab=320, seg=16), books, 2, segments=2, beside=True)
    assert np.isfinite(short).all() and np.isfinite(long[:64]).all() and np.isnan(long[64:]).all()
    found = measure.loss_by_position(tiny("rmt", vocab=320, seg=16), books, (0, 64, 300), 2, segments=2)
    near, far = found["by_position"]
    assert near["another"] > 0 and far["another"] is None and far["loss"] > 0


def test_text_without_a_space_has_a_loss_too(books):
    books.tokens = [np.array([256, *b"x" * 400], "<u2")] * 2
    found = measure.loss_by_position(tiny("gpt", vocab=320, seg=16), books, (0, 400), 2, segments=2)["all"]
    assert found["tokens"] == 800 and found["word_perplexity"] > 1e300


def test_no_model_is_scored_where_one_has_seen_the_target(books):
    like = [tiny("hmt", vocab=320, seg=16, query="paper")]
    for x in measure.token_losses(tiny("gpt", vocab=320, seg=16), books, 2, 2, like=like):
        assert (np.isnan(x) == (np.arange(len(x)) % 16 < 7)).all()


@pytest.mark.parametrize("name", ["bytes", "gpt2-4k"])
def test_rare_words_are_found_with_the_place_where_they_were_last(name):
    enc = data.tokenizer(name)
    plain = data.from_texts(enc, [("plain", "the whale and the sea " * 9)])
    book = data.from_texts(enc, [("one", "the Queequeg, and\nthe sea: Queequeg! Daggoo"), ("two", "Queequeg")])
    one, two = measure.rare_words(book, measure.count_words(plain))
    text = lambda i, word: enc.decode(book.tokens[i][1 + word[0]:1 + word[1]].tolist()).strip()
    assert [text(0, w) for w in one] == ["Queequeg", "Queequeg", "Daggoo"] and text(1, two[0]) == "Queequeg"
    assert one[:, 2].tolist() == [0, one[1, 0] - one[0, 0], 0] and two[0, 2] == 0     # another book says nothing
    losses = [np.arange(len(tokens) - 1.0) for tokens in book.tokens]                 # a token costs its place
    found = measure.loss_of_words(dict(loss=losses, empty=[x + 1 for x in losses]), [one, two], (1, 1000))
    sums = [sum(range(*word[:2])) for word in (*one, *two)]
    assert [x["words"] for x in found] == [3, 1]
    assert found[1]["loss"] == sums[1] and found[0]["loss"] == pytest.approx((sums[0] + sums[2] + sums[3]) / 3)
    assert found[0]["by_book"] == [[sums[0] + sums[2], 2], [sums[3], 1]]
    assert found[1]["empty"] == one[1, 1] - one[1, 0]                                 # one nat more for each token


def test_rare_words_may_not_be_rare_in_training(books):
    found = by_position(tiny("gpt", vocab=320), books, training=books)
    assert found["words"] == [] and by_position(tiny("gpt", vocab=320), books)["words"] == []


def test_a_passage_helps_as_long_as_it_can_be_seen(books):
    """gpt sees no earlier segment; two layers of a window that is a segment long see two of them, and no further."""
    gains = {name: [x["gain"] for x in measure.passage(tiny(name, vocab=320, seg=16), books, 8, (0, 1, 2, 4))]
             for name in ("gpt", "window", "rmt")}
    assert gains["gpt"] == [0, 0, 0, 0] and gains["window"][0] != 0 and gains["window"][2:] == [0, 0]


@torch.no_grad()
def test_a_passage_gains_what_its_second_half_costs_less_after_itself(books):
    """A passage at a time, drawn as there: after itself and a segments of the next book, and after others alone."""
    model, n, after, rng = tiny("rmt", vocab=320, seg=16), 3, (0, 2), np.random.default_rng(0)
    def cut(i, length):
        tokens = books.tokens[i % 2]
        start = rng.integers(len(tokens) - length)
        return torch.tensor(tokens[start:start + length].astype(np.int64))[None]
    passages = [cut(i, 17) for i in range(n)]
    others = [cut(i + 1, 3 * 16) for i in range(n)]
    expected = np.zeros(2)
    for text, other in zip(passages, others):
        for sign, first in ((1, other[:, :16]), (-1, text[:, :16])):
            for j, a in enumerate(after):
                state = run(model, torch.cat([first, other[:, 16:16 + 16 * a]], 1))[1]
                logits = model(text[:, :16], state)[0][0, 8:]
                expected[j] += sign * F.cross_entropy(logits, text[0, 9:]).item() / n
    assert np.allclose([x["gain"] for x in measure.passage(model, books, n, after)], expected, atol=1e-5)


# tasks

class Copier(torch.nn.Module):
    """Retrieves the span of four tokens in which the answer stands, or another one, and answers from it or with 0."""

    def __init__(self, batch, right):
        super().__init__()
        self.c, self.batch, self.right = nanomem.build("gpt", vocab=64, seg=8).c, batch, right
        self.head = torch.nn.Linear(1, 1)

    def init_state(self, B):
        return dict(n=torch.zeros(B, dtype=torch.long))

    def read(self, state):
        return state["n"], None

    def extend(self, tokens, cache):
        n = cache[0]
        here = slice(int(n[0]), int(n[0]) + tokens.size(1))
        answer = torch.where(self.right[:, here], self.batch.y[:, here].clamp(min=0), 0)
        where = (self.batch.position - self.batch.distance)[:, here] // 4 * 4
        start = torch.where(self.right[:, here], where, -1)[..., None].expand(-1, -1, 2).clone()
        start[..., 0] = -1                                                     # one of two retrieves nothing
        return F.one_hot(answer, 64).float(), (n, torch.stack([start, torch.where(start < 0, -1, start + 4)], -1))

    def write(self, cache, state):
        return dict(n=state["n"] + self.c.seg)

    def retrieved(self, cache):
        return cache[1], torch.ones(cache[1].shape[:3])

    def scored(self):
        return torch.ones(8, dtype=torch.bool)


def test_the_hits_of_all_segments_come_in_order():
    B, T = 2, 32
    position = torch.arange(T).expand(B, T)
    distance, y = torch.randint(1, 8, (B, T)).minimum(position), torch.randint(1, 64, (B, T))
    batch = Batch(y, y, torch.ones(B, dtype=torch.bool), position, distance, torch.arange(B))
    right = torch.rand(B, T) < 0.5
    correct, hits = measure.answer(Copier(batch, right), batch)
    assert torch.equal(correct, right) and torch.equal(hits, right)


@pytest.mark.parametrize("start, end, hit", [(4, 5, False), (5, 6, True), (6, 7, True), (7, 8, False), (0, 9, True),
                                             (-1, -1, False)])
def test_a_hit_is_the_key_or_the_value(start, end, hit):
    """A pair at 5 and 6 is asked for at 12."""
    model = tiny("rmt", seg=16, vocab=128).eval()
    model.retrieved = lambda cache: (torch.tensor([start, end]).expand(1, 16, 1, 2), None)
    x, position = torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None]
    batch = Batch(x, x, torch.ones(1, dtype=torch.bool), position, torch.where(position == 12, 12 - 5, 0), x[:, 0])
    assert measure.answer(model, batch)[1][0, 12] == hit


def test_what_gca_retrieves_is_looked_up_in_its_cache():
    """Chosen as the most recent ones, the chunks that are retrieved are known: the k before the chunk before."""
    model = tiny("gca", seg=16, chunk=4, topk=2, bank=64, retrieval="recent", vocab=128).eval()
    x = torch.randint(64, (2, 64))
    position = torch.arange(64).expand(2, 64)
    for back in (4, 8, 12, 20):
        distance = torch.full_like(x, back).minimum(position)
        batch = Batch(x, x, torch.ones(2, dtype=torch.bool), position, distance, torch.arange(2))
        key = position - distance
        age = position // 4 - torch.stack([key, key + 1]) // 4                 # of the chunk of key or value, in chunks
        expected = ((age >= 2) & (age <= 3)).any(0)
        assert torch.equal(measure.answer(model, batch)[1], expected)
    assert measure.answer(tiny("rmt", vocab=128), batch)[1] is None


def test_accuracy_is_counted_by_the_distance_to_the_answer():
    """The columns of a task add up to the number of its questions, and those that hold few are left out."""
    model, settings = tiny("gpt", seg=16, vocab=128).eval(), dict(T=64, texts=64, batch=32)
    whole, = measure.accuracy(model, "recall", **settings)
    parts = measure.accuracy(model, "recall", edges=(0, 8, 16, 32, 64), least=1, **settings)
    assert sum(p["questions"] for p in parts) == whole["questions"] and "start" not in whole
    assert abs(sum(p["questions"] * p["accuracy"] for p in parts) / whole["questions"] - whole["accuracy"]) < 1e-9
    assert [p["start"] for p in parts] == [0, 8, 16, 32] and "hits" not in whole
    few = measure.accuracy(model, "recall", edges=(0, 8, 16, 32, 64), least=parts[0]["questions"], **settings)
    assert few == [p for p in parts if p["questions"] >= parts[0]["questions"]] != parts


# reach

def reaches(name, books, **fields):
    return reach.reach(tiny(name, vocab=320, seg=8, **fields), books, 4, 512)


def test_what_a_model_cannot_hold_moves_nothing(books):
    """gpt sees its segment. Two layers of a window of W tokens, whose keys know the token before, see 2 (W + 1)."""
    for name, holds in dict(gpt=8, window=2 * 9 + 1).items():
        found = reaches(name, books)
        assert [(x["start"], x["end"]) for x in found] == [(2 ** i, 2 ** i * 2) for i in range(9)]
        assert all((x["kl"] > 0) == (x["start"] <= holds) for x in found) and found[0]["kl"] > 1e-6


def test_a_memory_reaches_further_than_rounding(books):
    for name in ("rmt", "full", "gca"):
        found = reaches(name, books)
        assert found[5]["kl"] > max(1e-15, 10 * found[5]["noise"]) and found[0]["noise"] < 1e-9


@torch.no_grad()
def test_reach_is_the_divergence_of_two_texts_read_one_after_the_other(books):
    """The slow way: a text of one token and then the others, changed at one place, both read from their beginning."""
    class Recorder(torch.nn.Module):
        """Keeps what it is given, in order."""
        def __init__(self, model):
            super().__init__()
            self.model, self.c, self.head, self.given = model, model.c, model.head, []
            self.init_state = model.init_state

        def forward(self, tokens, state):
            self.given.append(tokens)
            return self.model(tokens, state)
    model = tiny("rmt", vocab=320, seg=8)
    recorder = Recorder(model)
    found = reach.reach(recorder, books, 4, 64)
    before = recorder.given[:2 * reach.BEFORE:2]                     # every second call is the half batch of `noise`
    after = recorder.given[2 * reach.BEFORE:]
    text, changed = (torch.cat(before + after[i::2], 1) for i in (0, 1))
    differ = text != changed
    assert (differ.sum(1) == 1).all() and not differ[:, :8 * reach.BEFORE].any()
    assert differ[:, 8 * reach.BEFORE:8 * reach.BEFORE + 8].any(1).all()
    assert len({*differ.long().argmax(1).tolist()}) > 1
    p, q = (run(model, t)[0].double().softmax(2) for t in (text, changed))
    kl = (p * (p / q).log()).sum(2)
    for x in found:
        place = differ.long().argmax(1)
        values = [kl[b, place[b] + d - 1].item() for b in range(4) for d in range(x["start"], x["end"])]
        assert abs(x["kl"] - np.mean(values)) < 1e-9 + 1e-4 * np.mean(values)


def test_a_book_that_is_too_short_for_reach_is_refused(books):
    with pytest.raises(UserError, match="reach needs a book of 9,002 tokens"):
        reach.reach(tiny("gpt", vocab=320, seg=1000), books)
