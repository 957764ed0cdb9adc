"""Titans: training of the memory in chunks against a slow loop with autograd, the delta rule, causality, stability."""
import pytest
import torch
from torch.nn import functional as F

import nanomem
from nanomem.cli import UserError
from nanomem.models.gpt import norm, rope, rotate
from nanomem.models.titans import bend, descend, gradients, products

from conftest import S, TINY, V, close, run, size, text, tiny


def series(T, depth, B=2, H=3, D=4, seed=0):
    """Weights, momentum, queries, keys, values, and the logarithms of theta, eta and 1 - alpha."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.double)
    matrices = lambda: [0.5 * draw(B, H, D, D) for _ in range(depth)]
    return (matrices(), matrices(), *(F.normalize(draw(B, H, T, D), dim=-1) for _ in range(3)),
            0.3 * draw(B, H, T).sigmoid(), F.logsigmoid(draw(B, H, T)), F.logsigmoid(draw(B, H, T)))


def mem(w, x):
    """The memory for one vector x (B, H, D)."""
    apply = lambda w, x: (w @ x[..., None])[..., 0]
    return apply(w[1], bend(x + apply(w[0], x))) if len(w) == 2 else apply(w[0], x)


def loop(w, s, q, k, v, theta, eta, keep, Q):
    """Equations 12 to 15, a token at a time. Autograd takes the gradient, at the weights with which the chunk began."""
    ys = []
    for t in range(q.size(2)):
        if t % Q == 0:
            at = [x.detach().requires_grad_() for x in w]
        loss = (mem(at, k[:, :, t]) - v[:, :, t]).square().sum() / 2
        of = lambda x: x[:, :, t, None, None]
        s = [of(eta.exp()) * s - of(theta) * grad for s, grad in zip(s, torch.autograd.grad(loss, at))]
        w = [of(keep.exp()) * w + s for w, s in zip(w, s)]
        ys.append(mem(w, q[:, :, t]))
    return torch.stack(ys, 2), w, s


def chunks(w, s, *tokens, Q):
    ys = []
    for q, k, v, *rates in zip(*(x.split(Q, 2) for x in tokens)):
        y, w, s = descend(w, s, q, gradients(w, k, v), *rates)
        ys.append(y)
    return torch.cat(ys, 2), w, s


def agree(one, two):
    return all(torch.allclose(a, b, rtol=0, atol=1e-10)
               for a, b in zip((one[0], *one[1], *one[2]), (two[0], *two[1], *two[2])))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("Q", [1, 4, 13])
def test_chunks_in_matrix_products_are_a_loop_over_tokens(depth, Q):
    xs = series(13, depth)
    assert agree(chunks(*xs, Q=Q), loop(*xs, Q=Q))


def test_without_momentum_and_forgetting_a_matrix_learns_by_the_delta_rule():
    """w_t = w_{t-1} (I - theta k k^T) + theta v k^T, with chunks of one token."""
    w, s, q, k, v, theta, eta, keep = series(13, 1)
    y, (last,), _ = chunks(w, [0 * s[0]], q, k, v, theta, torch.full_like(eta, -1e4), 0 * keep, Q=1)
    w, ys = w[0], []
    for t in range(13):
        key, value, step = k[:, :, t, :, None], v[:, :, t, :, None], theta[:, :, t, None, None]
        w = w @ (torch.eye(4, dtype=torch.double) - step * key @ key.mT) + step * value @ key.mT
        ys.append((w @ q[:, :, t, :, None])[..., 0])
    assert torch.allclose(last, w, atol=1e-12) and torch.allclose(y, torch.stack(ys, 2), atol=1e-12)


@torch.no_grad()
def test_the_model_with_both_off_learns_by_the_delta_rule_too():
    """The memory of a whole layer, theta being a sigmoid; the weights after a segment."""
    memory = tiny("titans_mag", chunk=1, momentum=False, forget=False).double().blocks[0].attention.memory
    x, w = torch.randn(2, S, TINY["width"], dtype=torch.double), torch.zeros(2, 2, 16, 16, dtype=torch.double)
    _, after = memory.write(x, 0, dict(w=[w], s=[w], at=[w], before=[w], key=w[:, :, :1]))
    k, v = (F.linear(x, linear.weight).unflatten(2, (2, 16)).transpose(1, 2) for linear in (memory.k, memory.v))
    k = torch.cat([k[..., :8], F.pad(k[..., 8:], (0, 0, 1, 0))[:, :, :-1]], -1)          # half from the token before
    k, v, theta = norm(k) / 4, norm(v) / 4, (memory.rates(x) + memory.bias)[..., :2].sigmoid()
    for t in range(S):
        key, value = k[:, :, t, :, None], v[:, :, t, :, None]
        w = w - theta[:, t, :, None, None] * (w @ key - value) @ key.mT
    assert torch.allclose(after["w"][0], w, atol=1e-6)


def test_a_token_says_how_far_its_step_goes_how_much_momentum_stays_and_what_fades():
    """All of a segment's writing in the slow loop: the rates are sigmoids, of which alpha forgets."""
    memory, x, unit = tiny("titans").blocks[0].attention.memory, torch.randn(2, S, 32), lambda x: F.normalize(x, dim=-1)
    q, k, v = (linear(x).view(2, S, 2, 16).transpose(1, 2) for linear in (memory.q, memory.k, memory.v))
    k = torch.cat([k[..., :8], F.pad(k[..., 8:], (0, 0, 1, 0))[:, :, :-1]], -1)
    theta, eta, alpha = (memory.rates(x) + memory.bias).sigmoid().mT.unflatten(1, (3, 2)).unbind(1)      # (B, H, S)
    theta, zero = theta * (1 - eta) * 2 / memory.c.chunk, torch.zeros(2, 2, 16, 16)
    y, (w,), (s,) = loop([zero], [zero], unit(q), unit(k), unit(v), theta, eta.log(), (1 - alpha).log(), memory.c.chunk)
    out, after = memory.write(x, 0, dict(w=[zero], s=[zero], at=[zero], key=zero[:, :, :1]))
    assert close(out, norm(y.transpose(1, 2).flatten(2))) and close(after["w"][0], w) and close(after["s"][0], s)


@torch.no_grad()
@pytest.mark.parametrize("name", ["titans", "titans_mag"])
def test_a_layer_is_a_loop_over_heads_and_queries_and_then_a_gate(name):
    """Equations 21 to 28, with a memory that a segment has filled. What it answers and writes has loops of its own."""
    model, mac, D = tiny(name), name == "titans", 16
    past = model.read(run(model, text(B=1, K=1))[1])[0]
    attention, memory, x = model.blocks[0].attention, past[-1], norm(torch.randn(1, S, 32))
    answers, persist = attention.memory.ask(x, memory["before"])[0], norm(attention.persist)[0]
    turn, y = lambda k, t: rotate(k[None], rope(torch.tensor([t]), D))[0], torch.zeros(1, S, 32)
    for head in range(2):
        part = slice(head * D, (head + 1) * D)
        key = lambda z, t: turn(norm(attention.k(z)[part]), t)
        own, value = [key(z, t) for t, z in enumerate(x[0])], lambda z: attention.v(z)[part]
        own = [torch.cat([k[:8], own[t - 1][8:] if t else torch.zeros(8)]) for t, k in enumerate(own)]
        for t in range(S):
            seen = [(key(z, i - 4), value(z)) for i, z in enumerate(persist)]
            seen += [(key(z, i), value(z)) for i, z in enumerate(answers[:t + 1]) if mac]
            k, v = map(torch.stack, zip(*seen, *zip(own[:t + 1], map(value, x[0]))))
            q = attention.gain[head, 0] * turn(norm(attention.q(x[0, t])[part]), t)
            y[0, t, part] = (k @ q / D ** 0.5).softmax(0) @ v
    y = attention.out(y)
    z = norm(x + y) if mac else x                                              # what is written
    m, written = attention.memory.write(z, 0, memory)
    m = attention.memory.ask(z, memory["before"]) if mac else m
    out, (*_, after) = attention(x, rope(torch.arange(S), D), past)
    assert close(out, 2 * y * (attention.scale * m).sigmoid(), 1e-5) and close(after["w"][0], written["w"][0], 1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_orthonormal_keys_are_stored_exactly_and_forgetting_clears(depth):
    """One chunk of steps of size 1: every key is answered with its value; alpha = 1 leaves the last token only."""
    w, s, _, _, v, theta, eta, keep = series(4, depth)
    k = torch.eye(4, dtype=torch.double).expand(2, 3, 4, 4)
    none, zero = torch.full_like(eta, -1e4), [0 * x for x in w]
    _, w, _ = descend(zero, zero, k, gradients(zero, k, v), torch.ones_like(theta), none, 0 * keep)
    if depth == 1:
        assert torch.allclose(k @ w[0].mT, v)
    _, w, _ = descend(w, zero, k, gradients(zero, k, v), torch.ones_like(theta), none, none)
    last = gradients(zero, k[:, :, 3:], v[:, :, 3:])
    assert all(torch.allclose(x, -(d.mT @ i)) for x, (d, i) in zip(w, last))


def test_momentum_carries_a_step_on():
    """A token that writes, then tokens that do not: the memory goes on by eta, eta^2, ... of that step."""
    zero, k, v = [torch.zeros(1, 1, 4, 4, dtype=torch.double)], *series(5, 1, B=1, H=1)[3:5]
    theta, half = torch.tensor([[[1.0, 0, 0, 0, 0]]]).double(), torch.full((1, 1, 5), 0.5).double().log()
    _, (w,), (s,) = descend(zero, zero, k, gradients(zero, k, v), theta, half, 0 * half)
    step = v[0, 0, 0, :, None] @ k[0, 0, 0, None]
    assert torch.allclose(w[0, 0], (2 - 2 ** -4) * step) and torch.allclose(s[0, 0], step / 16)


def test_products_of_factors_that_are_nearly_zero_leave_no_nan():
    log = torch.tensor([[[-1e4, 0.0, -500, -1e-3]]]).requires_grad_()
    between, first = products(log)
    assert torch.allclose(between[0, 0, 3], torch.tensor([0, 0, 0.999, 1]), atol=1e-4)
    (between.sum() + first.sum()).backward()
    assert between.isfinite().all() and log.grad.isfinite().all()


def test_gradients_of_a_chunk_reach_every_input():
    """The outer gradient goes through the inner descent: finite differences agree, at both depths."""
    for depth in (1, 2):
        xs = [x.requires_grad_() for part in series(3, depth, B=1, H=1, D=2) for x in
              (part if isinstance(part, list) else [part])]
        def f(*xs):
            y, w, s = chunks(list(xs[:depth]), list(xs[depth:2 * depth]), *xs[2 * depth:], Q=2)
            return y, *w, *s
        assert torch.autograd.gradcheck(f, xs)


@torch.no_grad()
def test_mac_reads_the_memory_from_before_its_segment_only():
    """With larger steps the logits of the same segment do not change, those of the next do. With mag all change."""
    for name, at_once in (("titans", False), ("titans_mag", True)):
        one, two = tiny(name), tiny(name)
        for block in two.blocks:
            block.attention.memory.bias[:2] += 2                               # theta of the two heads
        a, b = (run(model, text())[0] for model in (one, two))
        assert torch.equal(a[:, :S], b[:, :S]) != at_once and not torch.equal(a[:, S:], b[:, S:])


@torch.no_grad()
def test_a_deep_memory_is_causal_and_can_be_cut_anywhere():
    for name in ("titans", "titans_mag"):
        for fields in (dict(depth=2), dict(chunk=5), dict(momentum=False, forget=False, persist=0)):
            model = tiny(name, **fields)
            state = run(model, text())[1]
            logits, after = model(text(K=1), state)
            cache, parts = model.read(state), []
            for part in text(K=1).split([1, 1, 9, 14, 7], 1):
                y, cache = model.extend(part, cache)
                parts.append(y)
            assert close(torch.cat(parts, 1), logits) and close(model.write(cache, state), after)
            other = text(K=1)
            other[:, 20:] = 3
            assert close(model(other, state)[0][:, :20], logits[:, :20])


@torch.no_grad()
@pytest.mark.parametrize("name", ["titans", "titans_mag"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_text_of_equal_tokens_does_not_blow_up(name, depth):
    """Gradients of Q equal tokens at the same weights add up. Steps of size 1 each would overshoot by Q - 1."""
    model = nanomem.build(name, **TINY, depth=depth)
    for tokens in (torch.full((1, S), 5), torch.tensor([3, 7]).repeat(1, S // 2)):
        state = model.init_state(1)
        for _ in range(40):
            logits, state = model(tokens, state)
        assert logits.isfinite().all() and all(x.abs().max() < 10 for x in state.values())


@torch.no_grad()
def test_the_state_has_what_the_settings_need():
    shapes = lambda **fields: {k: tuple(v.shape) for k, v in tiny("titans", **fields).init_state(3).items()}
    assert shapes() == dict(w=(3, 2, 1, 2, 16, 16), s=(3, 2, 1, 2, 16, 16))
    assert shapes(depth=2, momentum=False) == dict(w=(3, 2, 2, 2, 16, 16))


@torch.no_grad()
def test_the_memory_stays_in_full_precision_under_autocast():
    model = tiny("titans")
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = run(model, text())
    assert all(v.dtype == torch.float32 for v in state.values()) and logits.isfinite().all()
    assert not torch.equal(state["w"], state["w"].bfloat16().float())


def test_a_deeper_memory_is_a_larger_state_and_has_no_more_parameters():
    for name in ("titans", "titans_mag"):
        assert size(name, **TINY) == size(name, **TINY, depth=2)


def test_settings_that_make_no_sense_are_refused():
    for fields, why in ((dict(form="mal"), "form is mac or mag, got mal"), (dict(depth=3), "depth is 0, 1 or 2, got 3"),
                        (dict(chunk=0), "persist >= 0 and chunk >= 1, got 4 and 0"),
                        (dict(persist=-1), "persist >= 0 and chunk >= 1, got -1 and 16")):
        with pytest.raises(UserError, match=why):
            nanomem.build("titans", **fields)
