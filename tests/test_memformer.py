"""Memformer: what its reader, its writer and its forgetting must do."""
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import nanomem
import test_laws
import train
from nanomem import cost, stream, tasks
from nanomem.cli import UserError
from nanomem.footprint import LiveBytes
from nanomem.models.gpt import norm, rope
from nanomem.optim import optimizers_of

from conftest import S, TINY, V, close, keep_embeddings, run, text, tiny

OPTIONS = [{}, dict(bidir=True), dict(back=True), dict(bidir=True, back=True)]
IDS = ["plain", "bidir", "back", "bidir+back"]


def writer(tau=0.25, M=5, T=8, seed=0):
    """A writer in float64 with random weights, slots of RMS 1 and hidden states to write."""
    torch.manual_seed(seed)
    model = tiny("memformer", mem=M, tau=tau, seed=seed).double()
    mem = model.writer.normalise(torch.randn(2, M, 32, dtype=torch.double))
    return model.writer, mem, torch.randn(2, T, 32, dtype=torch.double)


# the laws hold for its options too

@pytest.mark.parametrize("law", [
    partial(test_laws.test_the_state_is_a_flat_dict_of_fixed_shape, dtype=torch.bfloat16),
    test_laws.test_a_reader_predicts_what_the_loop_predicts,
    test_laws.test_no_token_sees_the_future, test_laws.test_a_document_gives_the_same_memory_in_any_batch,
    test_laws.test_a_fresh_element_starts_from_nothing_and_the_others_go_on,
    test_laws.test_gradient_reaches_every_parameter, test_laws.test_replay_gives_the_gradients_of_bptt])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=IDS[1:])
def test_the_laws_hold_with_options(law, options):
    law(tiny("memformer", **options))


@torch.no_grad()
def test_back_sees_the_segment_before_and_nothing_older_but_through_memory():
    """One causal pass over two segments, in which every position reads the same slots."""
    model, tokens = tiny("memformer", back=True), text()
    _, state = run(model, tokens[:, :2 * S])
    slots = [reader.keys_values(state["mem"]) for reader in model.readers]
    h, _ = model.backbone(model.embed(tokens[:, S:]), slots)
    assert close(model(tokens[:, 2 * S:], state)[0], model.head(h[:, S:]))
    plain = tiny("memformer")
    first = model(tokens[:, :S], model.init_state(2))[0]                     # nothing was read yet: nothing to see
    assert close(first, plain(tokens[:, :S], plain.init_state(2))[0])


@torch.no_grad()
def test_with_bidir_what_is_written_of_a_token_depends_on_later_ones():
    for options, moves in (({}, False), (dict(bidir=True), True)):
        model, x = tiny("memformer", **options), text(K=1)
        other = x.clone()
        other[:, -1] = (other[:, -1] + 1) % V
        seen = [model.finished(model.extend(t, model.read(model.init_state(2)))[1][-1])[:, 0] for t in (x, other)]
        assert (not torch.equal(*seen)) == moves


# the reader

@torch.no_grad()
def test_every_token_reads_all_slots_whatever_their_order():
    model = tiny("memformer", mem=7)
    reader, mem, x = model.readers[0], torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    q = reader.query(x)
    k, v = reader.kv(mem).chunk(2, -1)
    slow = torch.cat([(q[..., a] @ k[..., a].mT / 4).softmax(-1) @ v[..., a] for a in (slice(16), slice(16, 32))], -1)
    assert close(reader(x, reader.keys_values(mem)), reader.out(slow))
    shuffled = reader.keys_values(mem[:, torch.randperm(7)])
    assert close(reader(x, shuffled), reader(x, reader.keys_values(mem)))


@torch.no_grad()
def test_a_block_is_attention_then_the_memory_then_an_mlp_each_of_a_norm():
    model, x = tiny("memformer"), text(K=1)
    state = run(model, text(seed=1))[1]
    h, angles = model.embed(x), rope(torch.arange(S), 16)
    for block, reader in zip(model.blocks, model.readers):
        h = h + block.attention(norm(h), angles)[0]
        h = h + reader(norm(h), reader.keys_values(state["mem"]))
        h = h + block.mlp(norm(h))
    assert close(model(x, state)[0], model.head(norm(h)))


@torch.no_grad()
def test_the_slots_are_projected_once_a_segment():
    model, calls = tiny("memformer"), []
    model.readers[0].kv.register_forward_hook(lambda *_: calls.append(1))
    cache = model.read(model.init_state(2))
    for x in text(K=1).split(4, 1):
        cache = model.extend(x, cache)[1]
    assert len(calls) == 1


# the writer

@torch.no_grad()
def test_a_slot_attends_to_itself_and_the_tokens_in_a_loop_and_in_one_masked_call():
    write, mem, h = writer()
    M, T, D = 5, 8, 16
    slow = torch.empty_like(mem)
    for b in range(2):
        for i in range(M):
            for a in (slice(0, D), slice(D, 2 * D)):                         # a head
                q, own = write.query(mem[b, i])[a], write.key(mem[b, i])[a]
                u = torch.stack([q @ own, *(q @ write.key(h[b, j])[a] for j in range(T))]) / math.sqrt(D) / 0.25
                w = u.exp() / u.exp().sum()
                slow[b, i, a] = w[0] * mem[b, i, a] + sum(w[1 + j] * write.value(h[b, j])[a] for j in range(T))
    expected = slow + write.v
    expected = expected / expected.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(write(mem, h), expected, atol=1e-10)

    heads = lambda x: x.view(2, -1, 2, D).transpose(1, 2)
    z = F.scaled_dot_product_attention(
        heads(write.query(mem)), heads(torch.cat([write.key(mem), write.key(h)], 1)),
        heads(torch.cat([mem, write.value(h)], 1)),
        attn_mask=torch.cat([torch.eye(M), torch.ones(M, T)], 1).bool(), scale=1 / (0.25 * D ** 0.5))
    assert torch.allclose(write.normalise(z.transpose(1, 2).flatten(2)), expected, atol=1e-10)


@torch.no_grad()
def test_the_writer_computes_in_full_precision_under_autocast():
    model = tiny("memformer")
    state = run(model, text())[1]
    cache = model.extend(text(K=1), model.read(state))[1]
    with torch.autocast("cpu", torch.bfloat16):
        low = model.write(cache, state)
    assert close(low, model.write(cache, state), 1e-6)


@torch.no_grad()
def test_no_slot_sees_another_one():
    write, mem, h = writer()
    other = mem.clone()
    other[:, 3] += 1
    moved = (write(mem, h) != write(other, h)).any(-1)
    assert moved.tolist() == [[False, False, False, True, False]] * 2


@torch.no_grad()
def test_slots_have_no_order_and_twins_stay_twins():
    write, mem, h = writer()
    order = torch.randperm(5)
    before = write(mem, h)[:, order]
    write.v.copy_(write.v[order])
    assert torch.allclose(write(mem[:, order], h), before, atol=1e-12)
    write.v[1], mem[:, 1] = write.v[0], mem[:, 0]
    after = write(mem, h)
    assert torch.equal(after[:, 0], after[:, 1])


@torch.no_grad()
def test_tokens_have_no_order_but_what_the_backbone_gave_them():
    write, mem, h = writer()
    assert torch.allclose(write(mem, h[:, torch.randperm(8)]), write(mem, h), atol=1e-12)


@torch.no_grad()
def test_the_temperature_runs_from_softmax_to_the_largest():
    write, mem, h = writer(tau=1)
    plain = write.weights(mem, h)
    write.c.tau = 1e-4
    cold = write.weights(mem, h)
    assert torch.allclose(cold, F.one_hot(plain.argmax(-1), 9).double(), atol=1e-6)
    write.c.tau = 0.5
    assert torch.allclose(write.weights(mem, h), plain.square() / plain.square().sum(-1, keepdim=True))


@torch.no_grad()
def test_the_weights_of_a_segment_are_those_it_is_written_with():
    model, x = tiny("memformer", bidir=True), text()[:, S:2 * S]
    _, state = run(model, text()[:, :S])
    w, seen = model.weights(x, state), []
    model.writer.register_forward_hook(lambda m, args, y: seen.append(m.weights(*args)))
    model(x, state)
    assert w.shape == (2, 2, model.c.M, 1 + S) and close(w.sum(-1), torch.ones(2, 2, model.c.M)) and close(w, seen[0])


# forgetting

@torch.no_grad()
def test_slots_keep_their_norm_for_a_thousand_segments():
    model, tokens = tiny("memformer", seg=4), text(B=1, K=125)
    state = model.init_state(1)
    rms = lambda: state["mem"].square().mean(-1).sqrt()
    assert (rms() - 1).abs().max() < 1e-5
    for x in tokens.split(4, 1):
        _, state = model(x, state)
        assert (rms() - 1).abs().max() < 1e-5
    assert state["mem"].shape == (1, 8, 32) and state["mem"].dtype == torch.float32
    model.writer.v.zero_()
    assert model.writer.normalise(torch.zeros(1, 8, 32)).isfinite().all()


def retaining(beta):
    """A writer whose slots look at themselves alone, and whose v has beta times their norm."""
    write, mem, _ = writer()
    with torch.no_grad():
        write.query.weight.copy_(write.key.weight * 1e6)
        write.v.mul_(beta / write.v.square().mean(-1, keepdim=True).sqrt())
    return write, mem, torch.zeros(2, 8, 32, dtype=torch.double)


@torch.no_grad()
def test_a_slot_that_looks_only_at_itself_is_unchanged():
    write, mem, h = retaining(0.0)
    assert torch.allclose(write(mem, h), mem, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 3.2])
def test_a_slot_that_is_not_refreshed_turns_towards_its_forgetting_vector(beta):
    """tan a' = sin a / (cos a + beta), a the angle between slot and v."""
    write, mem, h = retaining(beta)

    def angle():
        u, v = F.normalize(mem, dim=-1), F.normalize(write.v, dim=-1)
        return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))    # exact where a is small too
    angles = [angle()]
    for _ in range(math.ceil(math.log(1e3) / math.log(1 + beta))):
        mem = write(mem, h)
        angles.append(angle())
        expected = torch.atan2(angles[-2].sin(), angles[-2].cos() + beta)
        assert torch.allclose(angles[-1], expected, rtol=1e-6, atol=1e-9) and (angles[-1] < angles[-2]).all()
    assert torch.allclose(angles[-1] / angles[-2], torch.tensor(1 / (1 + beta)).double(), rtol=1e-2)
    if beta == 1:
        assert torch.allclose(angles[1], angles[0] / 2, atol=1e-9)


@torch.no_grad()
def test_memory_begins_at_the_forgetting_vectors():
    model = tiny("memformer")
    assert close(model.init_state(3)["mem"], F.normalize(model.writer.v, dim=-1).expand(3, -1, -1) * 32 ** 0.5)


@torch.no_grad()
def test_at_the_start_a_slot_weighs_as_much_as_the_whole_segment_and_slots_differ():
    torch.manual_seed(0)
    for seg, width in ((16, 64), (128, 128)):
        model = nanomem.build("memformer", vocab=V, layers=2, heads=2, width=width, seg=seg)
        state = model.init_state(4)
        for x in torch.randint(V, (4, 8 * seg)).split(seg, 1):
            kept = model.weights(x, state)[..., 0]
            _, state = model(x, state)
        assert 0.2 < kept.mean() < 0.8
        u = F.normalize(state["mem"], dim=-1)
        M = model.c.M
        assert ((u @ u.mT).sum((1, 2)) - M).max() / (M * (M - 1)) < 0.9          # the mean cosine between two slots


def test_forgetting_vectors_do_not_decay():
    model = nanomem.build("memformer", **TINY)
    groups = [group for optimizer, _ in optimizers_of(model) for group in optimizer.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model.writer.v)] == 0 and decay[id(model.writer.key.weight)] > 0


# back-propagation through time

def gradients(way, model, begin, tokens=text(K=6)):
    model.zero_grad()
    loss, state = way(model, stream.make_step(model), tokens, tokens.roll(-1, 1), begin(), 1 / tokens.numel())
    return loss, state, {n: p.grad for n, p in model.named_parameters()}


def furthest(one, two):
    return max((one[n] - two[n]).norm() / (one[n].norm() + 1e-12) for n in one)


@pytest.mark.parametrize("dtype, tolerance", [(torch.double, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("way", [stream.replay, cost.checkpointed], ids=["replay", "checkpoint"])
def test_replay_and_checkpoints_are_exact(way, dtype, tolerance):
    """One batch element goes on and one begins, so that v learns from the first memory as well."""
    model = tiny("memformer").to(dtype)
    carried = stream.detach(run(model, text())[1])
    begin = lambda: stream.reset(model, carried, torch.tensor([True, False]))
    (loss, state, grad), (loss2, state2, grad2) = (gradients(w, model, begin) for w in (stream.bptt, way))
    assert furthest(grad, grad2) < tolerance and torch.allclose(loss, loss2) and close(state, state2, tolerance)
    assert grad["writer.v"].norm() > 0


def test_without_back_propagation_through_memory_the_writer_learns_nothing():
    model = tiny("memformer")
    cut = lambda x, y, state, step=stream.make_step(model): step(x, y, stream.detach(state))
    _, _, whole = gradients(stream.bptt, model, lambda: model.init_state(2))
    model.zero_grad()
    tokens = text(K=6)
    stream.bptt(model, cut, tokens, tokens.roll(-1, 1), model.init_state(2), 1 / tokens.numel())
    assert all(p.grad is None for p in model.writer.parameters())
    grad, full = model.readers[0].kv.weight.grad, whole["readers.0.kv.weight"]
    assert (grad - full).norm() > 0.1 * full.norm()


def test_an_element_that_begins_anew_sends_no_gradient_into_the_memory_before():
    model = tiny("memformer")
    mem = run(model, text())[1]["mem"].detach().requires_grad_()
    begin = stream.reset(model, dict(mem=mem), torch.tensor([True, False]))
    gradients(stream.bptt, model, lambda: begin)
    assert mem.grad[0].abs().sum() == 0 and mem.grad[1].abs().sum() > 0


@pytest.mark.parametrize("K", [1, 2, 5])
def test_a_question_teaches_the_writing_of_k_segments_and_no_more(K):
    """A loss on the last of five segments moves the embeddings of every segment since the memory was detached."""
    model, seen, tokens = tiny("memformer"), [], text(K=5)
    keep_embeddings(model, seen)
    state = stream.detach(run(model, tokens[:, :(5 - K) * S])[1]) if K < 5 else None
    run(model, tokens[:, (5 - K) * S:], state)[0][:, -S:].sum().backward()
    assert [y.grad is not None and bool(y.grad.abs().sum() > 0) for y in seen] == [False] * (5 - K) + [True] * K
    assert (model.writer.key.weight.grad is None) == (K == 1)


def test_the_activations_of_replay_do_not_grow_and_its_buffer_is_k_memories():
    model = tiny("memformer")
    tokens = {K: text(K=K) for K in (4, 16)}

    def peak(way, K):
        once = lambda: way(model, stream.make_step(model), tokens[K], tokens[K], model.init_state(2), 1.0)
        once()
        with LiveBytes() as live:
            once()
        return live.peak
    assert 3.7 < peak(stream.bptt, 16) / peak(stream.bptt, 4) < 4.3
    grown = peak(stream.replay, 16) - peak(stream.replay, 4)
    assert 0 <= grown - 12 * 2 * stream.nbytes(model.init_state(1)) < 0.02 * peak(stream.replay, 4)


def test_in_bfloat16_gradients_are_finite_and_memory_stays_float32():
    model, tokens = tiny("memformer", bidir=True), text()
    _, state = stream.replay(model, stream.make_step(model, torch.bfloat16), tokens, tokens, model.init_state(2), 0.01)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert state["mem"].dtype == torch.float32 and (state["mem"] != state["mem"].bfloat16()).any()


@pytest.mark.slow
def test_compiled_replay_is_two_graphs():
    from torch._dynamo.utils import counters
    model, tokens = tiny("memformer"), text(K=6)
    _, _, eager = gradients(stream.bptt, model, lambda: model.init_state(2))
    torch._dynamo.reset(), counters.clear()
    step = stream.make_step(model, compile=True)
    for _ in range(2):
        model.zero_grad()
        stream.replay(model, step, tokens, tokens.roll(-1, 1), model.init_state(2), 1 / tokens.numel())
    assert furthest(eager, {n: p.grad for n, p in model.named_parameters()}) < 1e-4
    assert counters["stats"]["unique_graphs"] <= 2


# memory and training

@pytest.mark.slow
def test_a_pair_is_recalled_behind_a_gap_of_four_segments(tmp_path):
    """Each pair stands in segment 0 of eight, and is asked for in 4 to 7: it is learned, and remembered for fifteen.
    BPTT windows shorter than the gap are no control at chance: a reader can use what an untaught writer leaves."""
    train.main(["--model=memformer", "--data=delayed", "--layers=2", "--heads=2", "--width=64", "--seg=16",
                "--batch=32", "--segments=8", "--replay", "--lr=5e-3", "--steps=125", "--eval_interval=125",
                f"--out={tmp_path}"])
    model, right, asked = nanomem.load(tmp_path)[0], 0, 0
    for batch, _, hit in stream.evaluate(model, tasks.TaskLoader("delayed", 64, 16 * 16, seed=2), 4):
        late = batch.distance >= 4 * 16
        right, asked = right + hit[late].sum().item(), asked + late.sum().item()
    assert right / asked > 0.9


@pytest.mark.parametrize("fields, why", [(dict(mem=-2), "counts memory slots, got -2"), (dict(tau=0.0), "got 0.0")])
def test_wrong_settings_are_refused(fields, why):
    with pytest.raises(UserError, match=why):
        nanomem.build("memformer", **fields)


@torch.no_grad()
def test_its_state_is_one_vector_a_slot_whatever_the_depth():
    for layers in (1, 3):
        state = nanomem.build("memformer", **{**TINY, "layers": layers}, mem=7).init_state(1)
        assert stream.nbytes(state) == 7 * TINY["width"] * 4
