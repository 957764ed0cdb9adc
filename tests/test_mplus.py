"""MemoryLLM and M+: what a read sees, what a write keeps, how it forgets, and how the store finds it again."""
import math

import pytest
import torch
from torch.nn import functional as F

import nanomem
import train
from nanomem import stream, tasks
from nanomem.models import gpt, memoryllm
from nanomem.models.gpt import norm
from nanomem.models.memoryllm import TABLE

from conftest import S, TINY, V, close, keep_embeddings, run, text, tiny

SMALL = dict(layers=3, new=4, slots=16, found=6, store=40, query=3)   # N/K = 4: the store fills within a few writes


def small(name="mplus", **fields):
    fields = {**SMALL, **fields}
    if name == "memoryllm":
        fields = {k: v for k, v in fields.items() if k in ("layers", "new", "slots", "shift")}
    model = tiny(name, **fields)
    if getattr(model.c, "M", 0):
        model.f_q.out.data *= 0.2      # no score so near to 1 that float32 sees ties
    return model


def after(model, n=12, B=2, seed=0):
    """The state after n segments."""
    return run(model, text(B=B, K=n, seed=seed))[1] if n else model.init_state(B)


def slow(model, l, x, vectors, real):
    """What layer l makes of x (S, C), one token at a time: it attends to the memory vectors (P, C) that are real and to
    the tokens up to itself; positions run on through both."""
    block, P, y = model.blocks[l], len(vectors), []
    q, k, v = queries_keys_values(block.attention, torch.cat([vectors, x]))
    for i in range(P, P + len(x)):
        j = torch.cat([real.nonzero()[:, 0], torch.arange(P, i + 1)])
        w = (torch.einsum("hd,jhd->hj", q[i], k[j]) / math.sqrt(model.c.head_dim)).softmax(-1)
        y.append(torch.einsum("hj,jhd->hd", w, v[j]).flatten())
    x = x + block.attention.out(torch.stack(y))
    return x + block.mlp(norm(x))


def queries_keys_values(attention, x):
    """Of x (n, C) at positions 0 to n: three tensors (n, H, D). Half of each key is that of the position before."""
    n, H, D = len(x), attention.c.heads, attention.c.head_dim
    q, k, v = (linear(norm(x)).view(n, H, D) for linear in (attention.q, attention.k, attention.v))
    angles = [a[:, None] for a in gpt.rope(torch.arange(n), D)]
    q, k = gpt.rotate(norm(q), angles) * attention.gain[:, 0], gpt.rotate(norm(k), angles)
    before = torch.cat([torch.zeros(1, H, D // 2), k[:-1, :, D // 2:]])
    return q, torch.cat([k[:, :, :D // 2], before], 2), v


def best(model, l, q, state):
    """Births and vectors of layer l's store (of a single batch element) that score best for queries q (m, r), oldest
    first."""
    scored = [(sum(torch.sigmoid(qi @ key).item() for qi in q) / len(q), birth.item(), vector) for vector, key, birth
              in zip(*(state[k][0, l] for k in ("store", "store_key", "store_birth"))) if birth >= 0]
    top = sorted(sorted(scored, key=lambda s: -s[0])[:model.c.K0], key=lambda s: s[1])
    return [birth for _, birth, _ in top], [vector for *_, vector in top]


# read and write

@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 3, 12])
@pytest.mark.parametrize("ask", ["lag", "self"])
def test_a_read_is_one_softmax_over_found_start_pool_and_segment(ask, n):
    model, tokens = small(ask=ask), text(B=1, K=1, seed=9)
    state, x, c = after(model, n, B=1), model.embed(tokens)[0], model.c
    logits, later = model(tokens, state)
    for l in range(c.layers):
        assert ask == "self" or close(later["query"][0, l], model.f_q(x[-c.m:], l))      # who searches next
        births, found = best(model, l, state["query"][0, l] if ask == "lag" else model.f_q(x[:c.m], l), state)
        blank = torch.zeros(c.K0 - len(found), c.width)
        real = torch.arange(c.K0 + 1) >= len(blank)
        vectors = torch.cat([blank, *[v[None] for v in found], model.start[l], state["pool"][0, l]])
        x = slow(model, l, x, vectors, torch.cat([real, state["birth"][0, l] >= 0]))
        assert births == sorted(births) and len(found) == min(c.K0, (state["store_birth"][0, l] >= 0).sum())
    assert close(logits[0], model.head(norm(x)))


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 12])
def test_a_write_puts_the_last_k_tokens_of_every_layer_at_the_end_of_its_pool(n):
    """From a pass that sees the K newest vectors and nothing else of the past, with the marker on its last K tokens."""
    model, tokens = small(), text(B=1, K=1, seed=9)
    state, x, K = after(model, n, B=1), model.embed(tokens)[0], model.c.K
    pool = model(tokens, state)[1]["pool"]
    for l in range(model.c.layers):
        x[-K:] += model.marker
        vectors = torch.cat([model.start[l], state["pool"][0, l, -K:]])
        x = slow(model, l, x, vectors, torch.arange(K + 1) < (K + 1 if n else 1))
        assert close(pool[0, l, -K:], x[-K:])


@torch.no_grad()
def test_a_write_sees_only_the_newest_k_of_the_pool_and_nothing_of_the_store():
    model, x = small(), text(K=1)
    state, K = after(model), model.c.K
    new = lambda **changed: model(x, {**state, **changed})[1]["pool"][:, :, -K:]
    other = [state["pool"].clone(), state["pool"].clone()]
    other[0][:, :, -K - 1] += 1
    other[1][:, :, -1] += 1
    assert torch.equal(new(pool=other[0]), new()) and torch.equal(new(store=state["store"] + 1), new())
    assert not close(new(pool=other[1]), new())


@torch.no_grad()
def test_memory_vectors_are_keys_and_values_only():
    """They pass no query, no output map and no MLP: S tokens do in a read, S in a write."""
    model, lengths = small().eval(), []
    for name in ("attention.out", "attention.q", "mlp"):
        model.blocks[1].get_submodule(name).register_forward_hook(lambda m, a, y: lengths.append(a[0].size(1)))
    after(model, 3)
    assert lengths == [S] * (3 * 2 * 3)


@torch.no_grad()
def test_memory_vectors_have_an_order_and_it_is_all_in_their_positions(monkeypatch):
    model, x = small("memoryllm", shift=False), text(K=1)
    state = after(model)
    mixed = dict(state, pool=state["pool"].flip(2), birth=state["birth"].flip(2))
    assert not close(model(x, state)[0], model(x, mixed)[0])
    monkeypatch.setattr(memoryllm, "rope", lambda positions, D: gpt.rope(0 * positions, D))
    assert close(model(x, state)[0], model(x, mixed)[0])


# forgetting

@torch.no_grad()
def test_a_write_drops_k_of_each_layer_and_keeps_the_order_of_the_others():
    """Births are tags: vectors travel with theirs, none is made or lost, and the store gets exactly what fell out."""
    model = small(store=400)
    state, K = after(model, 5), model.c.K
    for x in text(K=12, seed=3).split(S, 1):
        old, state = state, model(x, state)[1]
        for b in range(2):
            for l in range(model.c.layers):
                tags = lambda s, name: [t for t in s[name][b, l].tolist() if t >= 0]
                before, now, gone = tags(old, "birth"), tags(state, "birth"), set(tags(state, "store_birth"))
                assert sorted(now) == now and set(now[:-K]) < set(before) and min(now[-K:]) > max(before)
                assert set(before) - set(now) == gone - set(tags(old, "store_birth"))
                assert len(now) == len(before) - len(set(before) - set(now)) + K
                vectors = dict(zip(old["birth"][b, l].tolist(), old["pool"][b, l]))
                for name, at in (("pool", "birth"), ("store", "store_birth")):
                    for t, v in zip(state[at][b, l].tolist(), state[name][b, l]):
                        assert t not in vectors or t < 0 or torch.equal(v, vectors[t])


def survivors(t, N, K, layers=3):
    """Births in the pool after t writes, (TABLE, L, N), one batch element for each entry of the table to begin with."""
    model = nanomem.build("memoryllm", **{**TINY, "seg": K, "layers": layers}, new=K, slots=N)
    state = model.init_state(TABLE)
    state["step"] = torch.arange(TABLE)
    state["birth"] = -2 - torch.arange(N).expand_as(state["birth"])      # a pool that was filled before
    with torch.no_grad():
        for _ in range(t):
            state = model.write((None, torch.zeros(TABLE, K, dtype=torch.long), []), state)
    return state["birth"]


@pytest.mark.parametrize("N, K, t", [(64, 8, 1), (64, 8, 10), (32, 8, 4), (40, 1, 40)])
def test_a_vector_survives_t_writes_with_probability_1_minus_k_over_n_to_the_t(N, K, t):
    """Four standard errors of independent draws."""
    birth, p = survivors(t, N, K), (1 - K / N) ** t
    alive = (birth < 0).double().mean().item()
    assert abs(alive - p) <= 4 * math.sqrt(p * (1 - p) / birth.numel())
    if t == N / K:
        assert 0.316 <= p < math.exp(-1) and abs(alive - p) < 0.02
    step = torch.arange(TABLE)
    for u in range(t):
        count = (birth // K == (step + u)[:, None, None]).double().sum(2).mean()
        assert count == pytest.approx(K * (1 - K / N) ** (t - 1 - u), rel=0.1)


def test_every_slot_of_every_layer_drops_alike_and_on_its_own():
    model = nanomem.build("memoryllm", **{**TINY, "layers": 3}, new=8, slots=64)
    gone = torch.zeros(TABLE, 3, 64).scatter(2, model.table[:, :, -8:], 1)
    assert (gone.sum(2) == 8).all()
    expected = TABLE * 8 / 64
    chi2 = ((gone.sum(0) - expected) ** 2 / (expected * (1 - 8 / 64))).sum(1) * 63 / 64
    assert chi2.max() < 63 + 4.5 * math.sqrt(2 * 63)                       # 64 slots, 63 degrees of freedom
    both = (gone[:, 0] * gone[:, 1]).sum(1).mean()                         # two layers share 8 * 8 / 64 by chance
    assert abs(both - 1) < 4 / math.sqrt(TABLE)


# the store

@torch.no_grad()
def test_the_store_keeps_the_youngest_of_all_that_was_dropped():
    """Against a list, over 200 writes: what dropped out is added, and above M the smallest births go."""
    model = small(store=13, layers=2)
    state, listed = model.init_state(1), [[], []]
    for x in text(B=1, K=200).split(S, 1):
        old, state = state, model(x, state)[1]
        for l in range(2):
            pool = {t.item(): v for t, v in zip(old["birth"][0, l], old["pool"][0, l]) if t >= 0}
            listed[l] += [(t, v) for t, v in pool.items() if t not in state["birth"][0, l]]
            listed[l] = sorted(listed[l], key=lambda s: s[0])[-13:]
            found = {t.item(): v for t, v in zip(state["store_birth"][0, l], state["store"][0, l]) if t >= 0}
            assert sorted(found) == [t for t, _ in listed[l]] and all(torch.equal(found[t], v) for t, v in listed[l])


@torch.no_grad()
def test_the_key_of_every_stored_vector_is_its_projection():
    model = small()
    state = after(model, 30)
    assert (state["store_birth"] >= 0).all() and close(state["store_key"], model.f_k(state["store"]))


@torch.no_grad()
def test_the_best_are_found_and_come_oldest_first_however_they_are_stored():
    model, x = small(), text(B=1, K=1, seed=9)
    for n in (3, 5, 30):
        state = after(model, n, B=1)
        order = torch.randperm(model.c.M)
        mixed = {**state, **{k: state[k][:, :, order] for k in ("store", "store_key", "store_birth")}}
        assert close(model(x, mixed)[0], model(x, state)[0])
        for l in range(model.c.layers):
            births, vectors = best(model, l, state["query"][0, l], state)
            vectors_, birth = model.find(l, state["query"][:, l], mixed)
            assert births == sorted(births) and close(vectors_[birth >= 0], torch.stack(vectors))


@torch.no_grad()
def test_an_empty_store_or_none_of_it_is_memoryllm():
    plus, llm, none = small(), small("memoryllm"), small(found=0)
    for model in (llm, none):
        model.load_state_dict(plus.state_dict(), strict=False)
    tokens = text(K=12)
    assert torch.equal(run(llm, tokens)[0], run(none, tokens)[0])
    state = plus.init_state(2)
    for x in tokens.split(S, 1):
        logits, out = plus(x, state)
        expect, pool = llm(x, {k: state[k] for k in ("pool", "birth", "step")})
        assert close(logits, expect, 1e-5) and close(out["pool"], pool["pool"], 1e-5)
        state = {**out, **{k: plus.init_state(2)[k] for k in ("store", "store_key", "store_birth")}}
    assert not close(plus(x, out)[0], llm(x, {k: out[k] for k in ("pool", "birth", "step")})[0])


@torch.no_grad()
def test_what_is_remembered_has_one_size():
    model = small()
    one, many = after(model, 1), after(model, 200, B=2)
    assert stream.nbytes(one) == stream.nbytes(many)
    assert (many["birth"] >= 0).all() and (many["birth"][:, :, -1] == many["step"][:, None] * 4 - 1).all()


@torch.no_grad()
def test_what_drops_out_is_a_function_of_the_number_of_writes():
    """So the same document gives the same memory in any batch, after resume, and in replay."""
    model, tokens = small(), text(B=3)
    state, order = after(model, B=3), torch.tensor([2, 0, 1])
    assert torch.equal(state["birth"][0], state["birth"][1])
    logits, out = run(model, tokens, state)
    moved, other = run(model, tokens[order], {k: v[order] for k, v in state.items()})
    assert close(moved, logits[order]) and close(other, {k: v[order] for k, v in out.items()})


# the search: its gradient, its loss, and when it asks

def test_gradient_goes_one_write_deep_and_never_into_the_store():
    model, seen = small(), []
    state = stream.detach(after(model))
    keep_embeddings(model, seen)
    one = model(text(K=1, seed=5), state)[1]
    two = model(text(K=1, seed=6), one)[1]
    logits = model(text(K=1, seed=7), two)[0]
    assert not any(two[k].requires_grad for k in ("store", "store_key", "query"))
    read1, write1, read2, write2, *_ = seen
    grad = lambda y, *of: [g is not None and bool(g.abs().sum() > 0) for g in
                           torch.autograd.grad(y.sum(), of, retain_graph=True, allow_unused=True)]
    assert grad(logits, write1, write2, model.marker, read1, read2) == [True, True, True, False, False]
    assert grad(two["pool"][:, :, -model.c.K:], write1, write2) == [False, True]   # what a write sees is detached


def test_the_search_learns_from_its_own_loss_and_nothing_else_does():
    model, tokens = small(), text(K=3)
    logits, state = run(model, tokens)
    searcher = [*model.f_q.parameters(), *model.f_k.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in searcher)]
    for goal, mine, not_mine in (state["aux"].sum(), searcher, others), (logits.sum(), others, searcher):
        grads = lambda ps: torch.autograd.grad(goal, ps, retain_graph=True, allow_unused=True)
        assert all(g is not None and g.abs().sum() > 0 for g in grads(mine))
        assert all(g is None for g in grads(not_mine))


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 12])
def test_the_loss_wants_what_attention_looks_at_and_nothing_else(n):
    """One query and one vector at a time: the likelihood of its label, each of the two labels half of the loss."""
    model, x = small(), text(B=1, K=1)
    before, c = after(model, n, B=1), model.c
    layers, likely = model.extend(x, model.read(before))[1][2], {True: [], False: []}
    for l, (*_, inputs) in enumerate(layers):
        real, pool = before["birth"][0, l] >= 0, before["pool"][0, l]
        found = model.find(l, before["query"][:, l], before)[0][0]         # half of the start's key is of the last one
        q, k, _ = queries_keys_values(model.blocks[l].attention, torch.cat([found, model.start[l], pool, inputs[0]]))
        q, k = q[c.K0 + 1 + c.N:], k[c.K0:c.K0 + 1 + c.N]
        w = torch.einsum("ihd,jhd->hij", q, k[F.pad(real, (1, 0), value=True)]) / math.sqrt(c.head_dim)
        w = w.softmax(-1).mean(0)[:, 1:]                                   # (S, vectors that are real)
        for i in range(0, S - c.m + 1, c.m):
            for j, vector in enumerate(pool[real]):
                s = torch.sigmoid(model.f_q(inputs[0, i:i + c.m], l) @ model.f_k(vector, l)).mean()
                right = bool(w[i:i + c.m, j].mean() > 3 / c.N)
                likely[right].append((s if right else 1 - s) + 1e-5)
    assert bool(likely[True]) == bool(likely[False]) == (n > 0)
    expected = sum(-torch.stack(p).log().mean() for p in likely.values() if p) / 2
    assert close(model(x, before)[1]["aux"], torch.as_tensor(expected).view(1))
    assert model.eval()(x, before)[1]["aux"] == 0                           # not needed


@torch.no_grad()
def test_a_segment_that_searches_for_itself_leaks_into_its_first_tokens_only():
    """As published: the query shows all of its tokens to each of them, and `scored` says which logits are honest."""
    tokens = text(B=1, K=1)[0]
    changed = tokens.repeat(S, 1)
    changed[torch.arange(S), torch.arange(S)] = (tokens + 1) % V
    for query in (1, 5):
        model = small(ask="self", query=query)
        state = {k: v.expand(S, *v.shape[1:]) for k, v in after(model, 30, B=1).items()}
        moved = (model(changed, state)[0] - model(tokens.repeat(S, 1), state)[0]).abs().amax(-1) > 1e-6
        assert model.scored().tolist() == [i >= query - 1 for i in range(S)]
        assert not moved.tril(-1)[:, model.scored()].any()
        assert moved.tril(-1).any() == (query > 1)
        assert small(query=query).scored().all()


@torch.no_grad()
def test_a_segment_that_searches_for_itself_needs_its_query_in_one_call():
    model, tokens = small(ask="self", query=5), text(K=1, seed=8)
    state = after(model, 30)
    logits, out = model(tokens, state)
    cache, parts = model.read(state), []
    for part in tokens.split([5, 20, 7], 1):
        y, cache = model.extend(part, cache)
        parts.append(y)
    assert close(torch.cat(parts, 1), logits) and close(model.write(cache, state), out)
    with pytest.raises(AssertionError, match="first 5 tokens of a segment, so they must come in one call, got 3"):
        model.extend(tokens[:, :3], model.read(state))


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_store_can_live_on_the_host():
    model, tokens = small().cuda(), text(K=4).cuda()
    state = {k: v.cuda() for k, v in stream.detach(after(small(), 30)).items()}
    there = run(model, tokens, state)
    here = run(model, tokens, dict(state, store=state["store"].cpu()))
    assert here[1]["store"].device.type == "cpu" and torch.equal(here[0], there[0])
    assert all(torch.equal(v.cpu(), there[1][k].cpu()) for k, v in here[1].items())


@pytest.mark.parametrize("fields, why", [
    (dict(new=33), "new must fit into a segment of 32 and a pool of 264, got 33"),
    (dict(new=8, slots=4), "a pool of 4, got 8"), (dict(new=0, slots=4), "a pool of 4 slots needs new > 0"),
    (dict(new=8, store=7), "a store must hold the 8 vectors of a write, got store 7"),
    (dict(query=0), "query must lie between 1 and 32 tokens, got 0"), (dict(ask="both"), "lag or self, got both"),
    (dict(found=-2), "found counts vectors, got -2")])
def test_wrong_settings_are_refused_with_the_numbers(fields, why):
    with pytest.raises(nanomem.UserError, match=why):
        nanomem.build("mplus", **TINY, **fields)


# what it is for

class Oracle(nanomem.model_class("mplus")):
    """M+ with a search that knows in which segment the fact stood that each segment asks for."""

    def score(self, l, query, state):
        told = self.told[torch.arange(len(self.told)), state["step"], None]
        return (state["store_birth"][:, l] // self.c.K == told).float()


def retained(model, chunks=128, batches=2):
    """Accuracy on the task retain for facts told less than 8 writes ago, and for those told 32 to 126 ago."""
    right, S = [[], []], model.c.seg
    loader, same = (tasks.TaskLoader("retain", 64, chunks * S, seed=(1, 2)) for _ in range(2))
    for _ in range(batches):
        batch = same.next()
        model.told = (torch.arange(0, batch.x.size(1), S) - batch.distance[:, ::S]) // S     # (B, segments)
        for batch, _, correct in stream.evaluate(model, loader, 1):
            t, asked = batch.distance // S, batch.y >= 0
            right[0] += correct[asked & (t < 8)].tolist()
            right[1] += correct[asked & (t >= 32)].tolist()
    return [sum(r) / len(r) for r in right]


@pytest.mark.slow
def test_what_fell_out_of_the_pool_is_found_in_the_store(tmp_path):
    """Trained on 16 segments, asked over 128: N/K is 8 writes, the store lasts for 128."""
    assert train.main("""--model=mplus --data=retain --ask=self --query=1 --seg=4 --segments=16 --layers=2 --heads=2
        --width=64 --batch=64 --lr=3e-3 --steps=400 --eval_interval=400 --eval_batches=4 --device=cpu""".split()
                      + [f"--out={tmp_path}"]) == 0
    model = nanomem.load(tmp_path)[0]
    random, oracle = nanomem.load(tmp_path, search="random")[0], Oracle(model.c)
    oracle.load_state_dict(model.state_dict())
    (near, far), guess, told = retained(model), retained(random), retained(oracle)
    assert near > 0.85 and far > 0.5 and guess[1] < 0.15 and told[1] > 0.9


@torch.no_grad()
def test_the_cache_says_of_which_tokens_the_found_vectors_were_made():
    """The vectors of a write are made of the last K tokens of its segment, in order."""
    model, tokens = small(), text(B=2, K=10, seed=9)
    c, state = model.c, model.init_state(2)
    for x in tokens.split(c.seg, 1):
        cache = model.extend(x, model.read(state))[1]
        state = model.write(cache, state)
    spans, weights = model.retrieved(cache)
    before = cache[0]
    for l in range(c.layers):
        births = best(model, l, before["query"][1, l], {k: v[1:] for k, v in before.items()})[0]
        expected = [segment * c.seg + c.seg - c.K + i for segment, i in (divmod(n, c.K) for n in births)]
        found = spans[1, 3, l * c.K0:(l + 1) * c.K0].tolist()
        assert [a for a, _ in found if a >= 0] == expected and all(b == a + 1 for a, b in found if a >= 0)
    assert births and weights.isnan().all() and weights.shape == spans.shape[:3] == (2, c.seg, c.layers * c.K0)
