"""Grouped cross-attention: what chunks find, when they may read it, and how the loss on tokens teaches the choice."""
import math

import pytest
import torch
from torch.nn import functional as F

import nanomem
import train
from nanomem import stream, tasks
from nanomem.cli import UserError
from nanomem.models.gca import gumbel
from nanomem.models.gpt import norm, rope

from conftest import S, TINY, V, close, run, text, tiny

M, N = 8, S // 8   # tokens in a chunk of a TINY model, chunks in a segment


def gca(**fields):
    return tiny("gca", **{"chunk": M, **fields}).eval()


def memory(model, n, B=2, seed=0):
    """A state as after n chunks, of noise."""
    torch.manual_seed(seed)
    state = {k: torch.randn_like(v) if v.is_floating_point() else torch.full_like(v, n)
             for k, v in model.init_state(B).items()}
    return state


def retrieved(model, tokens, state=None):
    """The numbers of the chunks that each chunk looked at, (B, chunks, G, k)."""
    state, found = state or model.init_state(len(tokens)), []
    for x in tokens.split(model.c.seg, 1):
        _, cache = model.extend(x, model.read(state))
        state = model.write(cache, state)
        found.append(cache["picks"])
    return torch.cat(found, 1)


def find(model, ask, state):
    """What the chunks of a segment find in a state, before the segment's own chunks are there."""
    return model.find(ask, 0, 0, model.read(state))


# reading

@pytest.mark.parametrize("sink", [False, True])
def test_cross_attention_is_a_loop_over_chunks_heads_positions_and_picks(sink):
    model = gca(sink=sink).double()
    cross, (B, n, u, k, H, D) = model.cross[0], (2, 3, 5, 4, 2, 16)
    torch.manual_seed(0)
    x, kv = torch.randn(B, n, u, H * D).double(), torch.randn(B, n, k, H, M, 2 * D).double()
    w = torch.rand(B, n, k).double()
    found, inputs = [], [t.requires_grad_() for t in (x, kv, w)]
    for way in ("fast", "loop"):
        y = cross(x, kv, w)
        if way == "loop":
            q, y = cross.q(x), torch.zeros(B, n, u, H * D).double()
            for b, t, h, i, j in torch.cartesian_prod(*map(torch.arange, (B, n, H, u, k))).tolist():
                head = slice(h * D, (h + 1) * D)
                z = (kv[b, t, j, h, :, :D] @ q[b, t, i, head] / D ** 0.5).exp()
                p = z / (z.sum() + sink)
                y = y.index_put((torch.tensor(b), torch.tensor(t), torch.tensor(i), torch.arange(D) + h * D),
                                w[b, t, j] * (p @ kv[b, t, j, h, :, D:]), accumulate=True)
            y = cross.out(y)
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(*found))


@torch.no_grad()
def test_the_first_two_chunks_read_nothing_and_the_third_does():
    """The first has nothing before it; the second reads what the first asked for, when there was nothing."""
    model = gca()
    deaf = gca()
    for cross in deaf.cross:
        cross.out.weight.zero_()
    a, b = run(model, text())[0], run(deaf, text())[0]
    assert torch.equal(a[:, :2 * M], b[:, :2 * M])
    assert (a - b).abs().amax((0, 2)).unflatten(0, (-1, M)).amax(1)[2:].min() > 1e-4


@torch.no_grad()
def test_a_chunk_is_read_from_the_second_chunk_after_it_on():
    """With every other path cut, a changed token is felt at its own position, nowhere in the next chunk, and everywhere
    after that: what a landmark asks for is read by the chunk behind it, and it cannot ask for its own chunk."""
    model, tokens = gca(topk=12, bank=12), text()
    for block in model.blocks:
        block.attention.out.weight.zero_()
    for t in (0, 5, 7, 40, S + 3, 2 * S - 1):
        other, c = tokens.clone(), t // M
        other[:, t] = (other[:, t] + 1) % V
        moved = (run(model, tokens)[0] - run(model, other)[0]).abs().amax((0, 2))
        moved[t] = 0
        assert moved[:(c + 2) * M].max() == 0
        assert moved[(c + 2) * M:].min() > 0


@torch.no_grad()
def test_a_chunk_is_encoded_once_both_ways_with_its_key_at_the_landmark():
    model, h, other = gca(), torch.randn(2, 1, 3, M + 1, TINY["width"]), torch.arange(M)
    h, more = h[:1], h[:1].clone()
    more[..., M - 1, :] += 1                                                   # the last token
    key, kv = model.encode(h[0])
    z = norm(model.encoder(norm(h[0, 0]), rope(torch.arange(M + 1), 16), mask=torch.ones(M + 1, M + 1).bool())[0])
    assert close(key[0], z[:, M]) and close(kv[0].transpose(1, 2).flatten(2), model.kv(z[:, :M]))
    assert ((model.encode(more[0])[1] - kv).abs().amax((1, 2, 4)) > 1e-4).all(), "a token that looks ahead"


@torch.no_grad()
@pytest.mark.parametrize("bypass", [True, False])
def test_what_is_retrieved_goes_into_the_mlp_only_unless_there_is_no_bypass(bypass):
    model, deaf = gca(bypass=bypass), gca(bypass=bypass)
    for cross in deaf.cross:
        cross.out.weight.zero_()
    for m in (model, deaf):
        for block in m.blocks[m.c.lower:]:
            block.mlp.out.weight.zero_()
    assert close(run(model, text())[0], run(deaf, text())[0], 1e-6) == bypass


@torch.no_grad()
def test_the_upper_layers_are_a_loop_over_groups_each_of_which_retrieves_anew():
    """Layer 0 does not see the bank; layers 1 and 2 are a group each, and the landmarks that ask are those that the
    layer before put out. What is encoded, found and read has loops of its own."""
    model, tokens = gca(layers=3, groups=2, topk=2, window=0), text(K=1)
    state, T = memory(model, 20), N * (M + 1)
    angles, at = rope(torch.arange(T), 16), torch.arange(T).view(N, M + 1)     # positions of a chunk, the landmark last
    x = torch.zeros(2, T, TINY["width"])
    x[:, at[:, :M].flatten()], x[:, at[:, M]] = model.embed(tokens), model.landmark
    x, _ = model.blocks[0](x, angles)
    key, kv = model.encode(x[:, at])
    cache, asks = dict(model.read(state), key=torch.cat([state["key"], key], 1), new=kv), []
    for g, (block, cross) in enumerate(zip(model.blocks[1:], model.cross)):
        asks.append(norm(x[:, at[:, M]]) * model.gain[g])
        ask = torch.cat([state["ask"][:, g, None], asks[g][:, :-1]], 1)        # chunk t reads what chunk t - 1 asks
        kv, w, _ = model.find(ask, 0, g, cache)
        x = x + block.attention(norm(x), angles)[0]
        with_chunks = x.clone()
        for t in range(N):
            with_chunks[:, at[t]] += cross(norm(x[:, None, at[t]]), kv[:, t, None], w[:, t, None])[:, 0]
        x = x + block.mlp(norm(with_chunks))
    logits, after = model(tokens, state)
    assert close(logits, model.head(norm(x[:, at[:, :M].flatten()])), 1e-5)
    assert close(after["ask"], torch.stack([ask[:, -1] for ask in asks], 1), 1e-5)


# choosing

@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 3, 20, 37])
def test_the_chunks_found_are_the_k_best_of_those_that_are_kept(n):
    """By brute force: the bank has 20 places, and the segment that comes needs N of them for itself."""
    model = gca(bank=20, topk=3)
    state, asks = memory(model, n), torch.randn(2, N, TINY["width"])
    kv, w, picks = find(model, asks, state)
    for b in range(2):
        for t in range(N):
            kept = range(max(0, n + N - 20), min(n, n + t - 1))  # the asking chunk n + t - 1 is not among them
            place = lambda e: e - n + 20                         # the newest stands last
            score = {e: float(asks[b, t] @ state["key"][b, place(e)]) / TINY["width"] ** 0.5 for e in kept}
            best = sorted(kept, key=score.get, reverse=True)[:3]
            assert picks[b, t].tolist() == best + [-1] * (3 - len(best))
            mix = [math.exp(score[e]) / sum(math.exp(score[i]) for i in best) for e in best] + [0.0] * (3 - len(best))
            assert torch.allclose(w[b, t], torch.tensor(mix), atol=1e-6)
            for j, e in enumerate(best):
                assert torch.equal(kv[b, t, j], state["bank"][b, place(e)])


@torch.no_grad()
def test_the_order_of_the_chunks_in_the_bank_says_nothing():
    """Other places for the same chunks: no position is read with them, however long ago they were. Only the last one
    has to stay, which may not be found by its own question."""
    model, x = gca(bank=12, topk=2), text(K=1)
    state = run(model, text(K=3))[1]
    order = torch.cat([torch.arange(N), torch.arange(N, 11).flip(0), torch.tensor([11])])    # the first N will go
    other = dict(state, key=state["key"][:, order], bank=state["bank"][:, order])
    assert close(model(x, other)[0], model(x, state)[0], 1e-5)
    assert not close(model(x, dict(state, key=state["key"][:, order]))[0], model(x, state)[0], 1e-3)


@torch.no_grad()
def test_random_and_recent_differ_in_the_choice_only():
    tokens = text()
    for way in ("random", "recent"):
        model = gca(retrieval=way, topk=3)
        picks = retrieved(model, tokens)[:, :, 0]                                   # (B, chunks, k)
        for t in range(3 * N):
            kept = [e for e in picks[0, t].tolist() if e >= 0]
            before = range(max(0, t - 1))
            assert len(set(kept)) == len(kept) == min(3, len(before)) and set(kept) <= set(before)
            if way == "recent":
                assert kept == list(before)[::-1][:3]
        _, w, _ = find(model, torch.randn(2, N, TINY["width"]), memory(model, 9))
        assert torch.allclose(w, torch.tensor(1 / 3))
        assert torch.equal(picks, retrieved(model, tokens)[:, :, 0])


# learning to choose

@pytest.mark.parametrize("topk", [1, 2, 4])
def test_the_loss_on_tokens_moves_each_score_by_how_much_its_chunk_helped(topk):
    """dL/ds_j = w_j (f_j - sum_i w_i f_i), with f_j what the loss says about the answer of chunk j. With one chunk
    there is nothing to compare it with, and nothing is learned."""
    model, mixed = gca(topk=topk).double(), []
    state = {k: v.double() if v.is_floating_point() else v for k, v in run(gca(topk=topk), text(K=2))[1].items()}
    state = {k: v.detach() for k, v in state.items()}
    state["ask"].requires_grad_()

    def keep(module, args):
        args[2].retain_grad()
        mixed.append(args[2])
    model.cross[0].register_forward_pre_hook(keep)
    logits, _ = model(text(K=1), state)
    F.cross_entropy(logits[:, :M].flatten(0, 1), text(K=1)[:, 1:M + 1].flatten()).backward()
    w, f = mixed[0][:, 0].detach(), mixed[0].grad[:, 0]                            # of the first chunk, (B, k)
    _, _, picks = find(model, state["ask"].detach(), state)
    ds = w * (f - (w * f).sum(1, keepdim=True))
    place = picks[:, 0] - state["n"][:, None] + model.c.M
    key = state["key"].gather(1, place[..., None].expand(-1, -1, TINY["width"]))
    assert torch.allclose(state["ask"].grad[:, 0], torch.einsum("bk,bkc->bc", ds, key) / TINY["width"] ** 0.5)
    assert (state["ask"].grad.abs().max() > 1e-6) == (topk > 1)


def test_noise_explores_in_training_only_and_repeats():
    model, tokens = gca(topk=2), text()
    before, calm = torch.get_rng_state(), retrieved(model, tokens)
    model.train()
    noisy = retrieved(model, tokens)
    assert not torch.equal(noisy, calm) and torch.equal(noisy, retrieved(model, tokens))
    assert torch.equal(before, torch.get_rng_state()), "a state does not know this randomness"
    state, ask = memory(model, 9), torch.randn(2, N, TINY["width"])
    _, w, picks = find(model, ask, state)
    keys = state["key"][torch.arange(2)[:, None, None], picks - 9 + model.c.M]
    s = (ask[:, :, None] * keys).sum(-1) / TINY["width"] ** 0.5
    assert torch.allclose(w, s.softmax(-1), atol=1e-6), "the weights have no noise"


def test_the_noise_is_gumbel_whatever_the_numbers():
    i, e = torch.arange(1000)[:, None], torch.arange(1000)
    for shift in (0, 10 ** 6):
        z = gumbel(i + shift, e + shift)
        assert z.isfinite().all() and abs(z.mean() - 0.5772) < 0.01 and abs(z.std() - 1.2825) < 0.01
        for other in (gumbel(i + shift + 1, e + shift), gumbel(i + shift, e + shift + 1)):
            assert abs(torch.corrcoef(torch.stack([z.flatten(), other.flatten()]))[0, 1]) < 0.01


@pytest.mark.slow
@torch.no_grad()
def test_it_learns_to_find_needles_and_finds_them_in_64_times_the_text(tmp_path):
    """From the loss on the answers alone, in windows of 64 tokens; then what was fetched for questions in 4,096."""
    task = "needle:pairs=2:asks=3:notice=4"
    with torch.enable_grad():
        train.main(["--model=gca", f"--data={task}", "--seg=64", "--segments=1", "--chunk=4", "--layers=2", "--heads=2",
                    "--width=32", "--no-bypass", "--batch=32", "--lr=4e-3", "--steps=300", "--eval_interval=300",
                    "--eval_batches=1", f"--out={tmp_path}"])
    model = nanomem.load(tmp_path, seg=1024, bank=1024)[0].eval()
    batch = tasks.TaskLoader(task, 16, 4096, seed=9).next()
    b, t = (batch.y >= 0).nonzero(as_tuple=True)
    needle = (t - batch.distance[b, t]) // 4
    found = retrieved(model, batch.x)[b, t // 4, 0] == needle[:, None]           # (questions, k)
    (_, _, hit), = stream.evaluate(model, tasks.TaskLoader(task, 16, 4096, seed=9), 1)
    assert found.any(1).float().mean() > 0.95 and hit[b, t].float().mean() > 0.6


# segments

@torch.no_grad()
@pytest.mark.parametrize("fields", [dict(), dict(window=5), dict(window=20, sink=True), dict(layers=3, groups=2),
                                    dict(layers=5, groups=3, topk=2)], ids=str)
def test_segments_of_any_length_are_one_pass(fields):
    """The same weights, segments of 1, 2, 4 and 12 chunks: nothing but speed depends on where segments end."""
    tokens, found = text(), []
    for chunks in (1, 2, 4, 12):
        model = gca(seg=chunks * M, bank=24, **fields)
        found.append(run(model, tokens)[0])
    assert all(close(y, found[-1]) for y in found)


def test_for_a_long_text_the_bank_holds_it_and_segments_are_longer_where_that_changes_nothing():
    assert gca(window=-4).for_length(4096) == dict(bank=4096 // M, chunk=M, seg=1024)
    assert gca(window=0).for_length(4096) == dict(bank=4096 // M, chunk=M, seg=S)    # here the segment is the window


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 5, S, 40])
def test_without_its_bank_it_is_the_sliding_window(window):
    model, other = gca(topk=0, window=window), tiny("window", window=window)
    other.load_state_dict(model.state_dict(), strict=False)
    assert close(run(model, text())[0], run(other, text())[0])


@torch.no_grad()
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fields", [dict(bank=3 * N), dict(bank=3 * N + 1, groups=2, layers=4), dict(bank=4, chunk=16),
                                    dict(bank=3 * N, retrieval="random"), dict(bank=3 * N, retrieval="recent")],
                         ids=["full", "two groups", "few", "random", "recent"])
def test_a_bank_that_overflows_within_a_call_shows_every_segment_what_it_held_by_then(fields, train):
    model = gca(**fields).train(train)
    state = after = model.init_state(2)
    for seed in range(3):
        tokens = text(K=model.parallel, seed=seed)
        logits, state = model(tokens, state)
        expected, after = run(model, tokens, after)
        assert close(logits, expected) and close(state, after)


def test_the_bank_may_lie_in_the_memory_of_the_cpu():
    model = nanomem.build("gca", **TINY, host=True).to("meta")
    assert {k: v.device.type for k, v in model.init_state(2).items() if v.device.type != "meta"} == {"bank": "cpu"}


@pytest.mark.parametrize("fields, why", [
    (dict(chunk=5), "32 tokens is no whole number of chunks of 5"), (dict(chunk=0), "chunk counts tokens, got 0"),
    (dict(bank=3), "bank of 3 chunks cannot hold the 4 of a segment"), (dict(topk=-1), "topk counts chunks, got -1"),
    (dict(groups=2), "1 upper layers are not 2 equal groups"), (dict(retrieval="best"), "random or recent, got best")])
def test_settings_that_cannot_be_are_refused(fields, why):
    with pytest.raises(UserError, match=why):
        nanomem.build("gca", **TINY, **fields)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_cache_says_which_spans_of_the_text_each_token_looked_at(k):
    """With the most recent k chunks, these are the chunks 2 to k + 1 before the token's own: a chunk looks at what the
    one before it found among those before that."""
    model, tokens = gca(topk=k, retrieval="recent"), text(B=3)
    state = run(model, tokens[:, :S])[1]
    cache = model.read(state)
    for part in tokens[:, S:2 * S].split([5, 20, 7], 1):
        cache = model.extend(part, cache)[1]
    spans, weights = model.retrieved(cache)
    assert spans.shape == (3, S, k, 2) and close(weights.sum(2), torch.ones(3, S))
    assert torch.equal(weights > 0, spans[..., 0] >= 0)
    for t in range(S):
        chunk = (S + t) // M
        expected = [(e * M, e * M + M) for e in range(chunk - 2, chunk - 2 - k, -1) if e >= 0]
        assert [tuple(s) for s in spans[0, t].tolist()] == expected + [(-1, -1)] * (k - len(expected))
