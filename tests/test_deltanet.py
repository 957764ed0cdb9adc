"""Gated DeltaNet: the rule three ways (the paper's product, chunks, Mamba-2's state space), and what it remembers."""
import pytest
import torch

import nanomem
import train
from nanomem import stream, tasks
from nanomem.cli import UserError
from nanomem.models.deltanet import delta_rule
from nanomem.models.mamba import ssd

from conftest import TINY, S, close, size, text, tiny


def series(T, B=2, H=3, D=4, N=5, dtype=torch.double):
    """Inputs of the rule, with keys of length 1 and decays of all speeds, and a memory to begin with."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    k = torch.nn.functional.normalize(draw(B, H, T, N), dim=-1)
    return draw(B, H, T, N), k, draw(B, H, T, D), -draw(B, H, T).exp(), draw(B, H, T).sigmoid(), draw(B, H, D, N)


def loop(q, k, v, a, b, h, correct=True):
    """The definition, eq. 10: h_t = h_{t-1} exp(a_t) (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = h_t q_t."""
    o, I = [], torch.eye(k.size(-1), dtype=k.dtype)
    for q, k, v, a, b in zip(*(x.unbind(2) for x in (q, k, v, a, b))):
        a, b = a[..., None, None], b[..., None, None]
        erase = I - b * k[..., :, None] * k[..., None, :] if correct else I
        h = h @ (a.exp() * erase) + b * v[..., :, None] * k[..., None, :]
        o.append((h @ q[..., None])[..., 0])
    return torch.stack(o, 2), h


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_chunks_are_the_loop_over_tokens(T, correct):
    xs = series(T)
    o, end = loop(*xs, correct)
    for Q in (1, 5, 16, 64):
        fast, last = delta_rule(*xs, correct, Q)
        assert torch.allclose(fast, o, rtol=0, atol=1e-10) and torch.allclose(last, end, rtol=0, atol=1e-10)


def test_chunks_have_the_gradients_of_the_loop_in_single_precision_too():
    for dtype, tolerance in ((torch.double, 1e-10), (torch.float, 1e-5)):
        grads = []
        for f in (loop, delta_rule, lambda *xs: delta_rule(*xs, Q=16)):
            xs = [x.requires_grad_() for x in series(90, dtype=dtype)]
            o, h = f(*xs)
            (o.square().sum() + h.square().sum()).backward()
            grads.append([x.grad for x in xs])
        assert all((a - b).norm() <= tolerance * a.norm() for more in grads[1:] for a, b in zip(grads[0], more))


def test_the_text_can_be_cut_anywhere_if_the_memory_is_carried():
    *xs, h = series(100)
    whole, end = delta_rule(*xs, h)
    for cut in (1, 33, 64, 99):
        o, middle = delta_rule(*(x[:, :, :cut] for x in xs), h)
        more, last = delta_rule(*(x[:, :, cut:] for x in xs), middle)
        assert torch.allclose(torch.cat([o, more], 2), whole, atol=1e-10) and torch.allclose(last, end, atol=1e-10)


def test_without_the_correction_it_is_the_state_space_of_mamba():
    q, k, v, a, b, h = series(150, H=1)
    o, end = delta_rule(q, k, v, a, b, h, correct=False)
    step = lambda x: x.transpose(1, 2)                               # (B, H, T, .) -> (B, T, H, .)
    y, last = ssd(step(v), step(b), step(a), k[:, 0], q[:, 0], torch.zeros(1).double(), h)
    assert torch.allclose(step(o), y, atol=1e-10) and torch.allclose(end, last, atol=1e-10)


@torch.no_grad()
def test_each_token_says_what_is_stored_how_it_is_asked_for_and_how_much_fades():
    """The block in words: a convolution and a SiLU, keys and queries of length 1, decays and corrections below 1."""
    block, x, h = tiny("deltanet").blocks[0].memory, torch.randn(2, 9, TINY["width"]), torch.randn(2, 2, 16, 16)
    past, size = torch.randn(2, 3, 96), lambda x: x.square().sum(-1, keepdim=True).sqrt()
    qkv = torch.cat([block.q(x), block.k(x), block.v(x)], 2)
    line = torch.cat([past, qkv], 1)
    z = qkv + torch.stack([(block.taps * line[:, t:t + 4]).sum(1) for t in range(9)], 1)
    q, k, v = (z * z.sigmoid()).view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
    b, dt = block.b(x).sigmoid().mT, (1 + (block.dt(x) + block.dt_bias).exp()).log()
    o, end = loop(q / size(q), k / size(k), v, (-dt * block.log_A.exp()).mT, b, h)
    o = (o / size(o) * 16 ** 0.5).transpose(1, 2).flatten(2)                   # RMS 1
    gate = block.gate(x)
    y, memory = block(x, dict(conv=past, matrix=h))
    assert close(y, block.out(o * gate * gate.sigmoid())) and close(memory["matrix"], end)
    assert torch.equal(memory["conv"], qkv[:, 6:])


def pairs(N=8):
    """N pairs with keys that are orthogonal, of length 1, and then the first three keys again with other values.
    Nothing fades, errors are corrected in full."""
    g = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.double))[0]
    k = torch.cat([keys, keys[:3]])[None, None]
    v = torch.randn(1, 1, N + 3, 4, generator=g, dtype=torch.double)
    return keys, k, v, torch.zeros(1, 1, N + 3).double(), torch.ones(1, 1, N + 3).double()


def test_the_delta_rule_stores_each_pair_exactly_and_a_new_value_replaces_the_old_one():
    keys, k, v, a, b = pairs()
    h = delta_rule(k, k, v, a, b, torch.zeros(1, 1, 4, 8).double())[1][0, 0]
    expected = torch.cat([v[0, 0, 8:], v[0, 0, 3:8]])                # the first three are new
    assert torch.allclose(keys @ h.T, expected, atol=1e-12)
    h = delta_rule(k, k, v, a, b, torch.zeros(1, 1, 4, 8).double(), correct=False)[1][0, 0]
    expected = torch.cat([v[0, 0, :3] + v[0, 0, 8:], v[0, 0, 3:8]])  # values of the same key add up
    assert torch.allclose(keys @ h.T, expected, atol=1e-12)


def test_a_decay_to_zero_forgets_all_that_was_there():
    q, k, v, a, b, h = series(80)
    a[:, :, 70] = -500
    o, end = delta_rule(q, k, v, a, b, h)
    alone, last = delta_rule(*(x[:, :, 70:] for x in (q, k, v, a, b)), 0 * h)
    assert torch.allclose(o[:, :, 70:], alone, atol=1e-10) and torch.allclose(end, last, atol=1e-10)


def test_strong_decays_overflow_nowhere():
    q, k, v, a, *more = (x.requires_grad_() for x in series(70, dtype=torch.float))
    o, h = delta_rule(q, k, v, a - 500, *more)
    (o.sum() + h.sum()).backward()
    assert all(x.isfinite().all() for x in (o, h, *(x.grad for x in (q, k, v, a, *more))))


def test_ten_thousand_tokens_leave_the_memory_finite():
    """b k k^T takes away no more than there is: with nothing that fades, the memory stays as large as its values."""
    *xs, h = series(10_000, B=1, dtype=torch.float)
    xs[3] = 0 * xs[3]
    assert delta_rule(*xs, h)[1].abs().max() < 100


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, dict(rule="delta", state=4), dict(rule="gated", conv=False)], ids=str)
def test_where_a_text_is_cut_into_segments_changes_nothing(fields):
    tokens, found = text(B=2, K=6), []
    for seg in (8, 24, 6 * S):
        model, logits = tiny("deltanet", seg=seg, **fields).double(), []
        state = model.init_state(2)
        for x in tokens.split(seg, 1):
            y, state = model(x, {k: v.double() for k, v in state.items()})
            logits.append(y)
        found.append(torch.cat(logits, 1))
    assert torch.allclose(found[0], found[2], atol=1e-9) and torch.allclose(found[1], found[2], atol=1e-9)


@pytest.mark.parametrize("rule", ["delta", "gated"])
def test_every_parameter_of_the_other_rules_learns(rule):
    model = tiny("deltanet", rule=rule)
    stream.bptt(model, stream.make_step(model), text(), text().roll(-1, 1), model.init_state(2), 0.01)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert ("blocks.0.memory.log_A" in model.state_dict()) == (rule == "gated"), "with rule=delta nothing fades"


def test_the_state_is_that_of_the_convolution_and_of_the_matrix():
    state = tiny("deltanet", state=8).init_state(3)
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "0.conv": (3, 3, 64), "0.matrix": (3, 2, 16, 8), "1.conv": (3, 3, 64), "1.matrix": (3, 2, 16, 8)}
    assert set(tiny("deltanet", conv=False).init_state(3)) == {"0.matrix", "1.matrix"}


def test_the_size_is_that_of_gpt():
    for fields in (dict(layers=4, heads=4, width=128), dict(layers=2, heads=2, width=64, vocab=64)):
        for rule in ("gated_delta", "delta", "gated"):
            gpt = size("gpt", **fields)
            assert abs(size("deltanet", rule=rule, **fields) - gpt) < 0.02 * gpt


def test_a_rule_that_is_none_is_refused():
    with pytest.raises(UserError, match="rule is gated_delta, delta or gated, got linear"):
        nanomem.build("deltanet", rule="linear")


@pytest.mark.slow
def test_a_correction_recalls_more_pairs_than_a_sum(tmp_path):
    """Four pairs in 64 tokens, after 200 steps: about 99% with the delta rule, 90% if values only add up."""
    task, found = "recall:pairs=4", {}
    for rule in ("delta", "gated"):
        train.main(["--model=deltanet", f"--data={task}", "--layers=2", "--heads=2", "--width=64", "--seg=16",
                    "--batch=48", "--steps=200", f"--rule={rule}", "--eval_interval=200", "--eval_batches=1",
                    f"--out={tmp_path / rule}"])
        model = nanomem.load(tmp_path / rule)[0].eval()
        (batch, _, hit), = stream.evaluate(model, tasks.TaskLoader(task, 256, 64, seed=9), 1)
        found[rule] = hit[batch.y >= 0].float().mean()
    assert found["delta"] > 0.95 and found["delta"] > found["gated"] + 0.04
