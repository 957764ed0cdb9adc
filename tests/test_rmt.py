"""Recurrent Memory Transformer: what its read and its write slots must do."""
import pytest
import torch

from nanomem import stream

from conftest import S, TINY, V, close, keep_embeddings, run, size, text, tiny


@torch.no_grad()
def test_a_segment_is_one_causal_pass_over_memory_sensory_tokens_memory():
    """The slow definition, with every row's mask written out; a book begins with zeros as sensory tokens."""
    model, tokens = tiny("rmt", mem=3, sensory=2), text(K=2)
    state, before = model.init_state(2), torch.zeros(2, 2, TINY["width"])
    for x in tokens.split(S, 1):
        rows = torch.cat([state["mem"], before, model.embed(x), state["mem"]], 1)
        h, _ = model.backbone(rows, mask=torch.ones(S + 8, S + 8).tril().bool())
        logits, state = model(x, state)
        assert close(logits, model.head(h[:, 5:-3])) and close(state["mem"], h[:, -3:])
        before = model.embed(x[:, -2:])


@torch.no_grad()
def test_no_logit_of_a_segment_sees_the_write_slot():
    model, x = tiny("rmt", sensory=0), text(K=1)
    state = model.init_state(2)
    alone = model.head(model.backbone(torch.cat([state["mem"], model.embed(x)], 1))[0][:, model.c.M:])
    assert close(model(x, state)[0], alone)


@torch.no_grad()
def test_sensory_tokens_are_the_last_k_and_no_more():
    model, tokens = tiny("rmt", mem=0, sensory=5), text(K=2)
    alone = model.head(model.backbone(model.embed(tokens[:, S - 5:]))[0][:, 5:])
    assert close(run(model, tokens)[0][:, S:], alone)
    for t, moves in ((S - 6, False), (S - 5, True)):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % V
        assert torch.equal(run(model, tokens)[0][:, S:], run(model, other)[0][:, S:]) != moves


@torch.no_grad()
def test_only_the_copy_behind_can_be_written():
    """Why there are two: in a causal pass the rows in front see no token, whatever the segment says."""
    model, rows = tiny("rmt", mem=3), []
    mem = model.init_state(1)["mem"]
    for seed in (0, 1):
        x = model.embed(text(B=1, K=1, seed=seed))
        rows.append(model.backbone(torch.cat([mem, x, mem], 1))[0])
    assert torch.equal(rows[0][:, :3], rows[1][:, :3])
    assert not close(rows[0][:, -3:], rows[1][:, -3:])


@torch.no_grad()
def test_without_its_memory_a_segment_stands_alone():
    model, tokens = tiny("rmt", mem=0, sensory=0), text()
    alone = torch.cat([model(x, model.init_state(2))[0] for x in tokens.split(S, 1)], 1)
    assert torch.equal(run(model, tokens)[0], alone)


@torch.no_grad()
def test_the_memory_passes_through_every_segment_and_keeps_its_scale():
    model = tiny("rmt")
    first, other = text(B=1, K=40), text(B=1, K=40)
    other[:, 3] = (other[:, 3] + 1) % V
    a, b = run(model, first), run(model, other)
    assert (a[0] - b[0])[:, S:2 * S].abs().max() > 1e-4                 # a token of segment 0 is felt in segment 1
    rms = a[1]["mem"].square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.ones_like(rms), atol=1e-3)         # hidden states after the last norm


@pytest.mark.parametrize("K", [1, 2, 3])
def test_gradient_reaches_back_through_the_window_and_no_further(K):
    """A loss on the last segment moves the embeddings of every segment since the state was detached."""
    model, seen = tiny("rmt"), []
    keep_embeddings(model, seen)
    tokens = text(K=5)
    state = stream.detach(run(model, tokens[:, :(5 - K) * S])[1])
    logits, _ = run(model, tokens[:, (5 - K) * S:], state)
    logits[:, -S:].sum().backward()
    assert [y.grad is not None and bool(y.grad.abs().sum() > 0) for y in seen] == [False] * (5 - K) + [True] * K


def test_the_initial_memory_learns_at_every_depth():
    model = tiny("rmt")
    run(model, text(K=4))[0][:, -S:].sum().backward()
    assert model.mem.grad.abs().sum(1).min() > 0


def test_the_memory_costs_m_times_c_parameters():
    assert size("rmt", **TINY, mem=7) - size("gpt", **TINY) == 7 * TINY["width"]


@torch.no_grad()
def test_streaming_runs_the_same_positions_for_every_segment():
    """Cost per segment is constant: M + k + S + M positions pass the backbone, however much was read."""
    model, positions = tiny("rmt", mem=5, sensory=3), []
    model.blocks[0].register_forward_hook(lambda m, a, y: positions.append(a[0].size(1)))
    state = model.init_state(2)
    for x in text(K=6).split(S, 1):
        positions.clear()
        _, state = model(x, state)
        assert sum(positions) == 5 + 3 + S + 5
