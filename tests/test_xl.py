"""Sliding window, Transformer-XL and full attention against one pass over the whole text."""
import pytest
import torch

from nanomem.models.gpt import GPT

from conftest import S, TINY, close, keep_embeddings, run, text, tiny


def whole(model, tokens, visible):
    """Logits of one pass over all tokens with an explicit T x T mask: the slow definition."""
    return model.head(model.backbone(model.embed(tokens), mask=visible)[0])


def ij(T):
    return torch.arange(T)[:, None], torch.arange(T)


@torch.no_grad()
def test_full_attention_is_one_causal_pass_over_everything():
    model = tiny("full")
    assert close(run(model, text(K=4))[0], whole(model, text(K=4), None))


@torch.no_grad()
@pytest.mark.parametrize("W", [1, 5, S, S + 9, 3 * S])
def test_a_sliding_window_is_one_pass_with_a_banded_mask(W):
    model = tiny("window", window=W)
    i, j = ij(4 * S)
    expected = whole(model, text(K=4), (j <= i) & (j >= i - W))
    assert close(run(model, text(K=4))[0], expected)
    assert close(model(text(K=4), model.init_state(2))[0], expected), "in blocks, of all four segments in one call"


def test_a_sliding_window_has_the_gradients_of_that_one_pass():
    model, tokens = tiny("window", window=20).double(), text(K=3)
    i, j = ij(3 * S)
    state = model.init_state(2)
    state["kv"] = state["kv"].double()
    found = []
    for logits in (lambda: run(model, tokens, state)[0], lambda: whole(model, tokens, (j <= i) & (j >= i - 20))):
        model.zero_grad()
        logits().square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(*found))


@torch.no_grad()
def test_transformer_xl_sees_its_segment_and_the_w_tokens_before_it():
    model = tiny("xl", window=40, layers=1)       # one layer: what was cached does not depend on what could be seen
    i, j = ij(3 * S)
    assert close(run(model, text())[0], whole(model, text(), (j <= i) & (j >= i // S * S - 40)))


def test_transformer_xl_stops_the_gradient_at_its_cache_and_a_sliding_window_does_not():
    for name, reaches in dict(xl=False, window=True).items():
        model, grads = tiny(name), []
        keep_embeddings(model, grads)
        run(model, text(K=2))[0][:, S:].sum().backward()
        assert (grads[0].grad is not None and grads[0].grad.abs().sum() > 0) == reaches
        assert grads[1].grad.abs().sum() > 0


@torch.no_grad()
def test_the_cache_is_the_last_w_and_one_keys_and_values_at_positions_0_to_w():
    model = tiny("xl", window=40, layers=1)
    tokens = text(K=3)
    state = run(model, tokens)[1]
    _, cache = GPT.backbone(model, model.embed(tokens[:, -41:]))
    assert state["n"].tolist() == [41, 41]
    assert close(state["kv"][:, 0, 0], cache[0][0]) and close(state["kv"][:, 0, 1], cache[0][1])


@torch.no_grad()
def test_only_the_filled_part_of_the_cache_is_seen():
    model, tokens = tiny("xl", window=3 * S), text(K=2)
    state = run(model, tokens)[1]
    empty = torch.arange(3 * S + 1)[:, None] < S                     # the 2 S newest are real, the one before is zero
    junk = dict(state, kv=torch.where(empty, 1e3, state["kv"]))
    assert state["n"].tolist() == [2 * S, 2 * S]
    assert torch.equal(model(tokens[:, :S], state)[0], model(tokens[:, :S], junk)[0])


@torch.no_grad()
def test_reach_grows_with_depth_a_window_per_layer():
    """What a stack of L windows of W can see: L (W + 1) tokens back and no further, for a key knows the token
    before."""
    W, tokens = 20, text(B=1, K=3)
    for layers in (1, 2, 3):
        model, other = tiny("window", window=W, layers=layers), tokens.clone()
        other[:, 0] += 1
        moved = (run(model, tokens)[0] - run(model, other % TINY["vocab"])[0]).abs().amax(-1)[0] > 1e-7
        assert moved.nonzero().max() == layers * (W + 1)
