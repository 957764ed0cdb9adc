"""Mamba: the state space three ways (loop, step, matrix products), and the model around it."""
import pytest
import torch

import nanomem
from nanomem.cli import UserError
from nanomem.models.gpt import norm
from nanomem.models.mamba import short_conv, ssd, step

from conftest import TINY, S, close, text, tiny


def series(T, B=2, H=3, D=4, N=5, spread=2, dtype=torch.double):
    """Inputs of a state space, some of which forget slowly and some at once, and a state to begin with."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    return (draw(B, T, H, D), draw(B, T, H).exp(), -draw(B, T, H).mul(spread).exp(), draw(B, T, N), draw(B, T, N),
            draw(H), draw(B, H, D, N))


def loop(x, dt, a, b, c, skip, h):
    """The definition: h_t = exp(a_t) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t."""
    ys = []
    for x, dt, a, b, c in zip(*(v.unbind(1) for v in (x, dt, a, b, c))):
        h = a.exp()[..., None, None] * h + (dt[..., None] * x)[..., None] * b[:, None, None]
        ys.append((h * c[:, None, None]).sum(-1) + skip[:, None] * x)
    return torch.stack(ys, 1), h


@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_the_loop_the_steps_and_the_matrix_products_are_one_map(T):
    *xs, skip, h = series(T)
    y, end = loop(*xs, skip, h)
    for Q in (1, 5, 16, 64):
        fast, last = ssd(*xs, skip, h, Q)
        assert torch.allclose(fast, y, rtol=0, atol=1e-10) and torch.allclose(last, end, rtol=0, atol=1e-10)
    ys = []
    for token in zip(*(v.split(1, 1) for v in xs)):
        y1, h = step(*token, skip, h)
        ys.append(y1)
    assert torch.allclose(torch.cat(ys, 1), y, rtol=0, atol=1e-10) and torch.allclose(h, end, rtol=0, atol=1e-10)


def test_the_text_can_be_cut_anywhere_if_the_state_is_carried():
    *xs, skip, h = series(100)
    whole, end = ssd(*xs, skip, h)
    for cut in (1, 33, 64, 99):
        one, two = ([v[:, :cut] for v in xs], [v[:, cut:] for v in xs])
        y, middle = ssd(*one, skip, h)
        y2, last = ssd(*two, skip, middle)
        assert torch.allclose(torch.cat([y, y2], 1), whole, atol=1e-10) and torch.allclose(last, end, atol=1e-10)


def test_the_matrix_products_have_the_gradients_of_the_loop_in_single_precision_too():
    for dtype, tolerance in ((torch.double, 1e-10), (torch.float, 1e-5)):
        grads = []
        for f in (loop, ssd, lambda *xs: ssd(*xs, Q=16)):
            xs = [v.requires_grad_() for v in series(90, spread=1, dtype=dtype)]
            y, h = f(*xs)
            (y.square().sum() + h.square().sum()).backward()
            grads.append([v.grad for v in xs])
        assert all((a - b).norm() <= tolerance * a.norm() for more in grads[1:] for a, b in zip(grads[0], more))


def test_a_token_that_writes_nothing_leaves_no_nan():
    x, dt, *more = (v.requires_grad_() for v in series(20, dtype=torch.float))
    y, _ = ssd(x, dt * (torch.arange(20) != 5)[:, None], *more)
    y.sum().backward()
    assert all(v.grad.isfinite().all() for v in (x, dt, *more))


def test_strong_decays_overflow_nowhere():
    """A decay of exp(-500) a token. From a token to one before it, it would be exp(500): infinite, and times 0 NaN."""
    x, dt, a, *more = (v.requires_grad_() for v in series(40, dtype=torch.float))
    y, h = ssd(x, dt, a - 500, *more)
    (y.sum() + h.sum()).backward()
    assert all(v.isfinite().all() for v in (y, h, *(v.grad for v in (x, dt, a, *more))))


def test_the_convolution_ties_a_token_to_the_three_before_it():
    g = torch.Generator().manual_seed(0)
    u, last, taps = (torch.randn(shape, generator=g, dtype=torch.double, requires_grad=True)
                     for shape in ((2, 9, 3), (2, 3, 3), (4, 3)))
    y, end = short_conv(u, last, taps)
    line = torch.cat([last, u], 1)
    for t in range(9):
        assert torch.allclose(y[:, t], u[:, t] + (taps * line[:, t:t + 4]).sum(1))
    assert torch.equal(end, u[:, 6:])
    one, middle = short_conv(u[:, :2], last, taps)
    assert torch.allclose(torch.cat([one, short_conv(u[:, 2:], middle, taps)[0]], 1), y)
    assert torch.autograd.gradcheck(lambda *xs: short_conv(*xs)[0], (u, last, taps))


@torch.no_grad()
def test_each_token_says_what_is_written_how_it_is_read_and_how_much_fades():
    """The block in words: b and c of unit size, steps that are positive, decays below 1, a gate and a norm."""
    ssm, u, h = tiny("mamba").blocks[0].ssm, torch.randn(2, 9, TINY["width"]), torch.randn(2, 2, 16, 16)
    unit = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()
    z, x, b, c, dt = ssm.project(u).split([32, 32, 16, 16, 2], 2)
    dt = (1 + (dt + ssm.dt_bias).exp()).log()
    y, end = loop(x.unflatten(2, (2, 16)), dt, -dt * ssm.log_A.exp(), unit(b), unit(c), ssm.skip, h)
    out, last = ssm(u, h)
    assert close(out, ssm.out(unit(y.flatten(2) * z * z.sigmoid()))) and close(last, end)


@torch.no_grad()
def test_a_layer_adds_its_state_space_and_its_mlp():
    layer, x = tiny("mamba", conv=False).blocks[0], torch.randn(2, S, TINY["width"])
    memory = layer.start(lambda *shape: torch.zeros(2, *shape))
    y, h = layer.ssm(norm(x), memory["ssm"])
    out, after = layer(x, memory)
    assert torch.equal(out, x + y + layer.mlp(norm(x + y))) and torch.equal(after["ssm"], h)


@torch.no_grad()
def test_where_a_text_is_cut_into_segments_changes_nothing():
    tokens, found = text(B=2, K=6), []
    for seg in (8, 24, 6 * S):
        model, logits = tiny("mamba", seg=seg).double(), []
        state = model.init_state(2)
        for x in tokens.split(seg, 1):
            y, state = model(x, {k: v.double() for k, v in state.items()})
            logits.append(y)
        found.append(torch.cat(logits, 1))
    assert torch.allclose(found[0], found[2], atol=1e-9) and torch.allclose(found[1], found[2], atol=1e-9)


def test_the_state_is_that_of_the_convolution_and_of_the_state_space():
    state = tiny("mamba", state=8).init_state(3)
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "0.conv": (3, 3, 32), "0.ssm": (3, 2, 16, 8), "1.conv": (3, 3, 32), "1.ssm": (3, 2, 16, 8)}
    assert set(tiny("mamba", conv=False).init_state(3)) == {"0.ssm", "1.ssm"}


def test_the_size_is_that_of_gpt():
    """What the state space takes the MLP gives, so that models are compared at equal parameters."""
    for size in (dict(layers=4, heads=4, width=128), dict(layers=2, heads=2, width=64, vocab=64)):
        gpt, mamba = [sum(p.numel() for p in nanomem.build(name, **size).parameters()) for name in ("gpt", "mamba")]
        assert abs(mamba - gpt) < 0.02 * gpt


def test_a_state_that_is_no_size_is_refused():
    with pytest.raises(UserError, match="state counts channels, got -2"):
        nanomem.build("mamba", state=-2)
