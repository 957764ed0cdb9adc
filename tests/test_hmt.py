"""Hierarchical Memory Transformer: the bank, the search, and which query may look at what."""
import math

import pytest
import torch
from torch.nn import functional as F

import nanomem
from nanomem import stream, tasks
from nanomem.cli import UserError

from conftest import S, TINY, V, close, keep_embeddings, run, size, text, tiny

CAUSAL = ["prev", "split"]
QUERIES = [*CAUSAL, "paper"]
J = S // 2   # tokens of the query


def plain_gain(model):
    """The model as the paper has it, without a gain, so that it can be compared with RMT."""
    with torch.no_grad():
        model.gain.fill_(1)
    return model


def states(model, tokens):
    """The state before every segment, and the one behind the last."""
    found = [model.init_state(len(tokens))]
    for x in tokens.split(S, 1):
        found.append(model(x, found[-1])[1])
    return found


def full(model, B=2, seed=0):
    """A state with a full bank of memories that differ."""
    torch.manual_seed(seed)
    bank = torch.randn(B, model.c.bank, model.c.M, model.c.width)
    n = torch.full((B,), model.c.bank)
    return dict(bank=bank, n=n, ids=torch.randint(V, (B, model.c.tail)))


# what it shares with RMT

@torch.no_grad()
@pytest.mark.parametrize("query", ["prev", "paper"])
def test_the_first_two_segments_are_rmt_and_with_a_bank_of_one_all_of_them(query):
    tokens = text(K=4)
    for bank, same in ((1, [True] * 4), (4, [True, True, False, False])):
        hmt, rmt = plain_gain(tiny("hmt", query=query, bank=bank)), tiny("rmt")
        rmt.load_state_dict(hmt.state_dict(), strict=False)
        pairs = zip(run(hmt, tokens)[0].split(S, 1), run(rmt, tokens)[0].split(S, 1))
        assert [torch.equal(a, b) for a, b in pairs] == same
    assert nanomem.build("hmt").c.k == nanomem.build("rmt").c.k and nanomem.build("hmt").c.M == nanomem.build("rmt").c.M


@torch.no_grad()
@pytest.mark.parametrize("query", QUERIES)
def test_the_search_is_not_felt_before_there_is_a_choice(query):
    model, tokens = tiny("hmt", query=query), text(K=3)
    before = run(model, tokens)[0]
    for p in (model.prompt, model.query.weight, model.key.weight):
        p.add_(torch.randn_like(p))
    moved = (run(model, tokens)[0] - before).abs().amax((0, 2)).split(S)
    assert moved[0].max() == moved[1].max() == 0 and moved[2].max() > 1e-4


@torch.no_grad()
def test_a_segment_is_one_causal_pass_with_what_the_slow_search_finds():
    """Eq. 1-5 by hand for one text: one memory after another, keys and all."""
    for query in QUERIES:
        model, tokens = tiny("hmt", query=query, mem=3, sensory=2), text(B=1, K=4)
        kept, before = [], None
        logits, end = run(model, tokens)
        for n, x in enumerate(tokens.split(S, 1)):
            half = before[:, -J:] if query == "prev" and n else x[:, :J]
            rows = torch.cat([model.prompt[None], model.embed(half), model.prompt[None]], 1)
            q = model.query(model.backbone(rows)[0][0, -1])
            P = []
            for i in range(3):
                if not kept:
                    P.append(model.mem[i])
                    continue
                w = torch.stack([q @ model.key(memory[i]) / TINY["width"] ** 0.5 for memory in kept]).softmax(0)
                P.append(sum(a * memory[i] for a, memory in zip(w, kept)))
            P = model.gain * torch.stack(P)[None]
            sensory = model.embed(before[:, -2:]) if n else torch.zeros(1, 2, TINY["width"])
            e = model.embed(x)
            newest = model.gain * (kept[-1] if kept else model.mem)[None]
            parts = [newest, sensory, e[:, :J], P, e[:, J:], P] if query == "split" else [P, sensory, e, P]
            h = model.backbone(torch.cat(parts, 1))[0][0]
            rest = torch.cat([h[5:5 + J], h[-3 - S + J:-3]])
            assert close(logits[0, n * S:(n + 1) * S], model.head(rest))
            kept.append(h[-3:])
            before = x
        assert close(end["bank"][0, -4:], torch.stack(kept))


# causality

@torch.no_grad()
def test_the_published_query_leaks_and_the_positions_that_leak_are_not_scored():
    """Change one token at a time: which logits before it move? In segments 0 and 1 there is nothing to choose from."""
    model, tokens = tiny("hmt", query="paper"), text(B=1, K=4)
    changed = tokens.repeat(4 * S, 1)
    changed[torch.arange(4 * S), torch.arange(4 * S)] = (tokens[0] + 1) % V
    moved = (run(model, tokens.repeat(4 * S, 1))[0] - run(model, changed)[0]).abs().amax(-1) > 1e-6
    leaks = moved.tril(-1).any(0).view(4, S)                        # (segment, logit)
    contaminated = (torch.arange(4)[:, None] >= 2) & (torch.arange(S) < J - 1)
    assert torch.equal(leaks, contaminated)
    assert not (leaks & model.scored()).any() and model.scored().sum() == S - (J - 1)


@pytest.mark.parametrize("query", QUERIES)
def test_only_the_published_query_leaves_anything_out(query):
    assert tiny("hmt", query=query).scored().all() == (query != "paper")


def test_what_is_not_scored_counts_in_no_loss_and_in_no_score():
    model, rmt = tiny("hmt", query="paper"), tiny("rmt")
    loader = lambda: tasks.TaskLoader("recall", 4, 3 * S)
    batch = stream.scored(loader().next(), model)
    out = ~model.scored().repeat(3)
    assert (batch.y[:, out] == -1).all() and torch.equal(batch.y[:, ~out], loader().next().y[:, ~out])
    for other, like in ((model, []), (rmt, [model])):               # the other one is compared on the same positions
        ours, nll, _ = next(stream.evaluate(other, loader(), like=like))
        assert torch.equal(ours.y, batch.y) and (nll[ours.y < 0] == 0).all() and (nll[ours.y >= 0] > 0).all()
    logits = run(model, batch.x)[0][batch.y >= 0]
    total, _ = stream.bptt(model, stream.make_step(model), batch.x, batch.y, model.init_state(4), 1)
    assert close(total, F.cross_entropy(logits, batch.y[batch.y >= 0], reduction="sum"))


def test_the_published_query_refuses_to_stream():
    model = tiny("hmt", query="paper")
    with pytest.raises(AssertionError, match="cannot stream: use prev or split"):
        stream.Reader(model)(text(B=1)[:, :S + 1])


# the bank

@torch.no_grad()
@pytest.mark.parametrize("query", QUERIES)
def test_the_oldest_memory_leaves_the_bank(query):
    model, tokens = tiny("hmt", query=query, bank=2), text(K=5)
    found = states(model, tokens)
    assert [s["n"].tolist() for s in found] == [[i, i] for i in range(6)]
    for older, newer in zip(found, found[1:]):
        assert torch.equal(newer["bank"][:, 0], older["bank"][:, 1])
        assert not close(newer["bank"][:, 1], older["bank"][:, 1])


@torch.no_grad()
@pytest.mark.parametrize("query", QUERIES)
def test_the_order_of_the_bank_says_nothing_to_the_search(query):
    model, x = tiny("hmt", query=query, bank=7), text(K=1)
    state, order = full(model), torch.randperm(7)
    shuffled = dict(state, bank=state["bank"][:, order])
    assert close(*(model.recall(s, model.weights(s, x)) for s in (state, shuffled)), 1e-5)
    assert close(model.weights(state, x)[:, :, order], model.weights(shuffled, x), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("query", QUERIES)
def test_what_is_found_lies_between_the_memories_it_is_mixed_of(query):
    model, x = plain_gain(tiny("hmt", query=query, bank=7)), text(K=1)
    state = full(model)
    w = model.weights(state, x)
    P = model.recall(state, w)
    assert (w >= 0).all() and torch.allclose(w.sum(-1), torch.ones(2, model.c.M), atol=1e-6)
    low, high = state["bank"].amin(1), state["bank"].amax(1)
    assert (P >= low - 1e-6).all() and (P <= high + 1e-6).all()


@torch.no_grad()
def test_the_search_is_an_argmax_at_one_end_and_a_mean_at_the_other():
    model = plain_gain(tiny("hmt", bank=7))
    state = full(model)
    w = model.weights(state)
    same = dict(state, bank=state["bank"][:, :1].expand(-1, 7, -1, -1))
    assert close(model.recall(same, model.weights(same)), same["bank"][:, 0], 1e-5)    # nothing to choose: any finds it
    model.query.weight *= 1e4
    assert torch.equal(model.weights(state), F.one_hot(w.argmax(-1), 7).float())
    model.query.weight.zero_()
    uniform = plain_gain(tiny("hmt", bank=7, search="uniform"))
    for mean in (m.recall(state, m.weights(state)) for m in (model, uniform)):
        assert close(mean, state["bank"].mean(1), 1e-5)
    half = dict(state, n=state["n"] * 0 + 3)                         # only what is filled
    assert close(uniform.recall(half, uniform.weights(half)), state["bank"][:, -3:].mean(1), 1e-5)


@torch.no_grad()
def test_a_new_search_finds_what_is_like_the_query():
    """Wq = Wk at the start: the score is a likeness of the summary and the memory."""
    torch.manual_seed(0)
    model = nanomem.build("hmt", **{**TINY, "width": 128}, bank=7)
    state = full(model)
    prompt, half = model.prompt.expand(2, 1, -1), model.embed(state["ids"][:, -J:])
    S_n = model.backbone(torch.cat([prompt, half, prompt], 1))[0][:, -1]
    state["bank"][:, 3] = S_n[:, None]
    assert (model.weights(state)[:, :, 3] > 0.9).all()


# gradients

def search_gradients(model):
    found = (model.prompt.grad, model.query.weight.grad, model.key.weight.grad)
    return [grad is not None and bool(grad.abs().sum() > 0) for grad in found]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_search_learns_only_from_three_segments_on(query, K):
    """The one memory of a two-segment window has weight 1, whatever asks for it. The first memory always learns."""
    model = tiny("hmt", query=query)
    run(model, text(K=K))[0][:, -S:].sum().backward()
    assert search_gradients(model) == [K >= 3] * 3
    assert model.mem.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("query", QUERIES)
def test_a_bank_that_is_carried_over_trains_the_search_in_a_window_of_one(query):
    model, tokens = tiny("hmt", query=query), text(K=4)
    state = stream.detach(run(model, tokens[:, :3 * S])[1])
    model(tokens[:, 3 * S:], state)[0].sum().backward()
    assert search_gradients(model) == [True] * 3


@pytest.mark.parametrize("K", [1, 2, 3])
def test_gradient_reaches_back_through_the_window_and_no_further(K):
    """The depth of back-propagation is the window; detaching changes no logit. (`paper`, because `prev` reads the end
    of the segment before again.)"""
    model, seen, tokens = tiny("hmt", query="paper"), [], text(K=5)
    whole = run(model, tokens)[0]
    keep_embeddings(model, seen)
    state = stream.detach(run(model, tokens[:, :(5 - K) * S])[1])
    logits, _ = run(model, tokens[:, (5 - K) * S:], state)
    assert torch.equal(logits, whole[:, (5 - K) * S:])
    logits[:, -S:].sum().backward()
    assert [y.grad is not None and bool(y.grad.abs().sum() > 0) for y in seen] == [False] * (5 - K) + [True] * K


# cost

def test_the_extra_parameters_are_two_maps_a_prompt_the_first_memory_and_a_gain():
    C = TINY["width"]
    assert size("hmt", **TINY, mem=7) - size("gpt", **TINY) == 2 * C * C + C + 7 * C + 1


@torch.no_grad()
@pytest.mark.parametrize("query", QUERIES)
def test_every_segment_costs_the_same_whatever_was_read(query):
    """M + k + S + M rows in the segment, M more if it is split, and half a segment between two prompts to search."""
    model, rows = tiny("hmt", query=query, mem=5, sensory=3, bank=3), []
    model.blocks[0].register_forward_hook(lambda m, a, y: rows.append(a[0].size(1)))
    run(model, text(K=6))
    assert rows == [J + 2, 5 + 3 + S + 5 + (5 if query == "split" else 0)] * 6
    model.c.search = "uniform"
    rows.clear()
    run(model, text(K=2))
    assert len(rows) == 2, "a mean needs no summary"


def test_settings_that_make_no_memory_are_refused():
    for fields, why in ((dict(query="next"), "query is one of prev, split, paper, got next"),
                        (dict(search="best"), "search is learned or uniform, got best"),
                        (dict(bank=0), "bank must hold at least one memory, got 0"), (dict(mem=-2), "got -2"),
                        (dict(sensory=S + 1), f"part of the {S} tokens before, got {S + 1}")):
        with pytest.raises(UserError, match=why):
            nanomem.build("hmt", **{**TINY, **fields})


# no free lunch

@pytest.mark.parametrize("query", QUERIES)
def test_pure_noise_cannot_be_predicted_but_by_looking(query):
    """A hundred steps on random tokens with a bank of random memories: what is scored stays at chance, and the
    published query learns to tell by its choice of a memory which token it has seen."""
    torch.manual_seed(0)
    model = nanomem.build("hmt", vocab=4, layers=1, heads=2, width=32, seg=4, mem=1, sensory=0, bank=6, query=query)
    state = full(model, B=128)
    state["bank"] = state["bank"][:1].expand(128, -1, -1, -1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(100):
        x = torch.randint(4, (128, 5))
        state["ids"] = torch.randint(4, state["ids"].shape)
        losses.append(F.cross_entropy(model(x[:, :4], state)[0].transpose(1, 2), x[:, 1:], reduction="none").mean(0))
        losses[-1].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    loss = torch.stack(losses[50:]).mean(0)
    assert (loss[model.scored()] > math.log(4) - 0.01).all()
    assert query != "paper" or (loss[~model.scored()] < math.log(4) - 0.1).all()


@torch.no_grad()
@pytest.mark.parametrize("query", ["prev", "split"])
def test_the_cache_says_which_segments_were_mixed_and_how_much_of_each(query):
    model, tokens = tiny("hmt", query=query, bank=3), text(K=6)
    state, first = model.init_state(2), S // 2 if query == "split" else 0
    for k, x in enumerate(tokens.split(S, 1)):
        cache = model.extend(x, model.read(state))[1]
        spans, weights = model.retrieved(cache)
        expected = model.weights(state, x).mean(1)                             # (B, N)
        chosen = (torch.arange(k - 3, k) >= 0) & (expected > 1 / max(1, min(k, 3)))
        assert k < 2 or chosen[1].any() and not chosen[1].all()
        assert [tuple(span) for span in spans[1, S - 1].tolist()] == [
            (i * S, i * S + S) if c else (-1, -1) for i, c in zip(range(k - 3, k), chosen[1])]
        assert close(weights[:, first:], (expected * chosen)[:, None].expand(-1, S - first, -1))
        assert (spans[:, :first] == -1).all() and (weights[:, :first] == 0).all()
        state = model.write(cache, state)
    assert tiny("hmt", query=query, search="uniform").retrieved(cache) is None
