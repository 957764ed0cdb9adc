"""Infini-attention: the matrix against a sum over all earlier tokens, the delta update, the gate, no positions."""
import pytest
import torch

import nanomem
from nanomem.cli import UserError
from nanomem.models.gpt import norm
from nanomem.models.infini import positive, recall, store

from conftest import S, V, close, run, size, text, tiny


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def empty(B=2, H=3, D=4):
    return torch.zeros(B, H, D, D, dtype=torch.double), torch.zeros(B, H, D, dtype=torch.double)


def test_the_linear_memory_is_attention_to_all_earlier_tokens_without_a_softmax():
    q, k, v = (draw(2, 3, 21, 4, seed=s) for s in range(3))
    M, z = empty()
    for ks, vs in zip(k.split(7, 2), v.split(7, 2)):
        M, z = store(ks, vs, M, z, delta=False)
    weights = positive(q) @ positive(k).mT                                     # (B, H, 21, 21)
    expected = (weights / weights.sum(-1, keepdim=True)) @ v
    assert torch.allclose(recall(q, M, z), expected, atol=1e-12)


def test_the_delta_update_is_a_loop_over_the_tokens_of_a_segment():
    k, v = draw(2, 3, 14, 4), draw(2, 3, 14, 4, seed=1)
    M, z = empty()
    for ks, vs in zip(k.split(7, 2), v.split(7, 2)):
        old_M, old_z = M, z
        for t in range(7):
            s = positive(ks[:, :, t])                                          # (B, H, D)
            total = (s * old_z).sum(-1, keepdim=True)
            said = torch.einsum("bhd,bhde->bhe", s, old_M) / (total if total.sum() else 1)
            M, z = M + s[..., None] * (vs[:, :, t] - said)[..., None, :], z + s
        new = store(ks, vs, old_M, old_z, delta=True)
        assert torch.allclose(new[0], M, atol=1e-12) and torch.allclose(new[1], z, atol=1e-12)


def test_a_pair_that_the_memory_knows_leaves_the_matrix_as_it_is_with_delta():
    k, v = draw(2, 3, 1, 4), draw(2, 3, 1, 4, seed=1)
    M, z = store(k, v, *empty(), delta=True)
    assert torch.allclose(recall(k, M, z), v)
    again, longer = store(k, v, M, z, delta=True)
    assert torch.allclose(again, M) and torch.allclose(longer, 2 * z)          # z counts it once more (section 3.1.2)
    assert torch.allclose(recall(k, again, longer), v / 2)
    assert torch.allclose(store(k, v, M, z, delta=False)[0], 2 * M)


def test_the_weights_are_positive():
    x = draw(1000)
    assert torch.allclose(positive(x), torch.where(x > 0, x + 1, x.exp())) and (positive(x) > 0).all()


def test_an_empty_memory_reads_as_zero_and_has_finite_gradients():
    M, z = (x.requires_grad_() for x in empty())
    q = draw(2, 3, 5, 4).requires_grad_()
    y = recall(q, M, z)
    y.sum().backward()
    assert not y.any() and all(x.grad.isfinite().all() for x in (q, M, z))


@torch.no_grad()
def test_the_memory_knows_no_positions():
    """The order of the tokens in a segment does not matter to the first layer's matrix, when keys are of one token."""
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0))
    for shift in (False, True):
        model = tiny("infini", shift=shift)
        one, two = (run(model, x)[1]["M"][:, 0] for x in (text(K=1), text(K=1)[:, order]))
        assert close(one, two) != shift


@torch.no_grad()
def test_a_closed_gate_is_gpt_and_an_open_one_sees_no_segment():
    model, gpt = tiny("infini"), tiny("gpt")
    gpt.load_state_dict(model.state_dict(), strict=False)
    for block in model.blocks:
        block.attention.beta.fill_(-100)
    assert close(run(model, text())[0], run(gpt, text())[0])
    for block in model.blocks:
        block.attention.beta.fill_(100)
    y = run(model, text(K=1))[0]                                               # the memory is empty
    x = model.embed(text(K=1))
    for block in model.blocks:
        x = x + block.mlp(norm(x))
    assert close(y, model.head(norm(x)))


@torch.no_grad()
def test_the_memory_answers_a_token_alike_at_every_position():
    model = tiny("infini", layers=1)
    model.blocks[0].attention.beta.fill_(100)                                  # only the memory is heard
    y = model(torch.full((2, S), 5), run(model, text())[1])[0]
    assert close(y, y[:, :1].expand_as(y)) and not close(y, model(torch.full((2, S), 5), model.init_state(2))[0])


@torch.no_grad()
def test_a_segment_reads_nothing_of_its_own():
    """In the first segment a head's output is (1 - gate) times that of gpt."""
    model, gpt = tiny("infini"), tiny("gpt")
    gpt.load_state_dict(model.state_dict(), strict=False)
    for block, gates in zip(gpt.blocks, model.gates):
        block.attention.out.weight *= (1 - gates).repeat_interleave(model.c.head_dim)
    assert close(model(text(K=1), model.init_state(2))[0], gpt(text(K=1), {})[0])


def test_the_gates_begin_at_a_half_and_training_moves_them():
    model = nanomem.build("infini", vocab=V, layers=2, heads=2, width=32, seg=S)
    assert model.gates.shape == (2, 2) and torch.equal(model.gates, torch.full((2, 2), 0.5))
    logits, _ = run(model, text())
    logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1).step()
    assert (model.gates != 0.5).all() and not model.gates.requires_grad


@torch.no_grad()
def test_the_memory_stays_in_full_precision_under_autocast():
    model = tiny("infini")
    with torch.autocast("cpu", torch.bfloat16):
        _, state = run(model, text())
    assert all(v.dtype == torch.float32 for v in state.values())
    assert not torch.equal(state["M"], state["M"].bfloat16().float())


def test_the_size_is_that_of_gpt_and_a_gate_for_each_head():
    assert size("infini") - size("gpt") == 4 * 4


def test_without_memory_a_segment_can_be_cut_too():
    model, tokens = tiny("infini", update="none"), torch.randint(V, (2, S))
    cache = model.read(model.init_state(2))
    first, cache = model.extend(tokens[:, :5], cache)
    second, cache = model.extend(tokens[:, 5:], cache)
    assert torch.allclose(torch.cat([first, second], 1), model(tokens, {})[0], atol=1e-5)
    assert model.write(cache, {}) == {}


def test_an_update_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="update is delta, linear or none, got hebb"):
        nanomem.build("infini", update="hebb")
