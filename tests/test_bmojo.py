"""B'MOJO: the state space three ways, the attention and its buffer against slow definitions, and what follows."""
import heapq

import numpy as np
import pytest
import torch

import nanomem
import train
from nanomem import data, stream
from nanomem.models import bmojo
from nanomem.models.bmojo import Config, Here, scan, step
from nanomem.cli import UserError
from nanomem.models.gpt import norm, rotate, take

from conftest import TINY, tiny
from test_laws import S, close, text, walk

PRESETS = ("mamba", "hybrid", "bmojo_f", "bmojo")


def angles(pos, D):
    """gpt.angles in double precision, so that the views below can be compared to ten digits."""
    theta = pos.double()[:, None] * 10_000 ** (-torch.arange(0, D, 2).double() / D)
    return torch.stack([theta.cos(), theta.sin()], -1)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(bmojo, "angles", angles)


# the state space

def series(T, B=2, H=3, D=4, N=5, wild=2, dtype=torch.double):
    """Inputs of a state space, forgetting slowly and at once, and a state to begin with."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    return (draw(B, T, H, D), draw(B, T, H).exp(), -draw(B, T, H).mul(wild).exp(), draw(B, T, N), draw(B, T, N),
            draw(H), draw(B, H, D, N))


def loop(x, dt, a, b, c, skip, h):
    """The definition: h_t = exp(a_t) h_{t-1} + dt_t x_t (x) b_t, y_t = h_t c_t + skip x_t."""
    ys = []
    for x, dt, a, b, c in zip(*(v.unbind(1) for v in (x, dt, a, b, c))):
        h = a.exp()[..., None, None] * h + (dt[..., None] * x)[..., None] * b[:, None, None]
        ys.append((h * c[:, None, None]).sum(-1) + skip[:, None] * x)
    return torch.stack(ys, 1), h


@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_the_loop_the_steps_and_the_scan_are_one_map(T):
    *xs, skip, h = series(T)
    y, end = loop(*xs, skip, h)
    for Q in (1, 5, 16, 64):
        fast, last = scan(*xs, skip, h, Q)
        assert torch.allclose(fast, y, rtol=0, atol=1e-10) and torch.allclose(last, end, rtol=0, atol=1e-10)
    ys = []
    for token in zip(*(v.split(1, 1) for v in xs)):
        y1, h = step(*token, skip, h)
        ys.append(y1)
    assert torch.allclose(torch.cat(ys, 1), y, rtol=0, atol=1e-10) and torch.allclose(h, end, rtol=0, atol=1e-10)


def test_the_scan_can_be_cut_anywhere_and_carry_its_state():
    *xs, skip, h = series(100)
    whole, end = scan(*xs, skip, h)
    for cut in (1, 33, 64, 99):
        one, two = ([v[:, :cut] for v in xs], [v[:, cut:] for v in xs])
        y, middle = scan(*one, skip, h)
        y2, last = scan(*two, skip, middle)
        assert torch.allclose(torch.cat([y, y2], 1), whole, atol=1e-10) and torch.allclose(last, end, atol=1e-10)


def test_the_scan_has_the_gradients_of_the_loop_in_single_precision_too():
    for dtype, tolerance in ((torch.double, 1e-10), (torch.float, 1e-5)):
        grads = []
        for f in (loop, scan, lambda *xs: scan(*xs, Q=16)):
            xs = [v.requires_grad_() for v in series(90, wild=1, dtype=dtype)]
            y, h = f(*xs)
            (y.square().sum() + h.square().sum()).backward()
            grads.append([v.grad for v in xs])
        assert all((a - b).norm() <= tolerance * a.norm() for more in grads[1:] for a, b in zip(grads[0], more))


def test_a_token_that_writes_nothing_leaves_no_nan():
    x, dt, *more = (v.requires_grad_() for v in series(20, dtype=torch.float))
    y, _ = scan(x, dt * (torch.arange(20) != 5)[:, None], *more)
    y.sum().backward()
    assert all(v.grad.isfinite().all() for v in (x, dt, *more))


def test_attention_is_a_companion_matrix_that_forgets_and_a_state_space_one_that_fades():
    """Section 3.1: a window of n tokens is a shift register, the matrix with ones above the diagonal and nothing else.
    Its n-th power is zero: what is older than n is gone. A last row makes it remember: with minus the coefficients of
    the polynomial prod (z - a_i) it has the eigenvalues a_i, those of a diagonal state space with decays a_i."""
    n, fade = 5, torch.tensor([0.9, 0.7, 0.5, -0.3, 0.1], dtype=torch.double)
    shift = torch.diag(torch.ones(n - 1, dtype=torch.double), 1)
    power = torch.linalg.matrix_power
    assert power(shift, n).abs().max() == 0 and power(shift, n - 1).abs().max() == 1
    both = shift.clone()
    both[-1] = -torch.from_numpy(np.poly(fade.numpy())[:0:-1].copy())     # of z^0 .. z^(n-1)
    assert torch.allclose(torch.linalg.eigvals(both).real.sort()[0], fade.sort()[0])
    impulse = torch.stack([power(both, t)[0, -1] for t in range(1, 40)])  # what a token leaves behind, by its age
    assert impulse[:n - 2].abs().max() == 0 and (impulse[n - 2:] != 0).all()
    assert torch.isclose(impulse[-1] / impulse[-2], fade.max(), rtol=1e-3)


@torch.no_grad()
def test_a_mamba_layer_adds_its_state_space_and_a_hybrid_takes_turns():
    model = tiny("mamba", conv=False)
    layer, x = model.blocks[0], torch.randn(2, S, TINY["width"])
    past = layer.start(lambda *shape: torch.zeros(2, *shape))
    y, _ = layer.ssm(norm(x), past["h"])
    assert torch.equal(layer(x, past, None)[0], x + y + layer.mlp(norm(x + y)))
    parts = [(b.ssm is not None, b.attention is not None) for b in tiny("hybrid", layers=4).blocks]
    assert parts == [(False, True), (True, False)] * 2


# the attention

def definition(layer, u, y, eps):
    """One token after the other, one key at a time, and a heap that is looked at when a chunk begins."""
    c, (B, T, C), out, heap = layer.c, u.shape, [], []
    q, k, v = (x.view(B, T, c.heads, -1) for x in layer.qkv(u).chunk(3, -1))
    fk, fv = (x.view(B, T, c.heads, -1) for x in torch.nn.functional.linear(y, layer.qkv.weight[C:]).chunk(2, -1))
    turned = lambda x, place: rotate(norm(x), angles(torch.tensor([place * c.rope]), c.head_dim))
    for t in range(T):
        j, chunk = t % c.w, t // c.w * c.w
        if j == 0:
            snapshot = [s for _, s in heap]
        faded = range(t - 2 * c.w + 1, t - c.w + 1) if layer.fading < 0 else range(chunk - layer.fading, chunk)
        seen = [(k, v, s, t - s) for s in range(max(0, t - c.w + 1), t + 1)]
        seen += [(fk, fv, s, t - s) for s in faded if s >= 0 and layer.fading]
        seen += [(k, v, s, j + c.w) for s in snapshot if s <= t - c.w]
        keys = torch.stack([turned(k[:, s], -distance) for k, _, s, distance in seen], 2)         # (B, H, m, D)
        values = torch.stack([v[:, s] for _, v, s, _ in seen], 2)
        scores = (turned(q[:, t], 0)[:, :, None] * keys).sum(-1) / c.head_dim ** 0.5
        out.append((scores.softmax(-1)[..., None] * values).sum(2).flatten(1))
        if layer.M:
            heapq.heappush(heap, (float(eps[t]), t))
            heap = heapq.nlargest(layer.M, heap)
            heapq.heapify(heap)
    return layer.out(torch.stack(out, 1))


def attention(kind="bmojo", **fields):
    torch.manual_seed(0)
    return bmojo.Attention(Config(vocab=64, layers=1, heads=2, width=16, **fields), kind).double()


def run(layer, u, y, cut=None):
    """The layer on a text that is one segment, at once or in cuts that do not cross a chunk."""
    past, outs, P = layer.start(lambda *shape: torch.zeros(len(u), *shape).double()), [], 0
    past = {k: v.long() if k == "at" else v for k, v in past.items()}
    for a, b in zip(u.split(cut or u.size(1), 1), y.split(cut or u.size(1), 1)):
        here = Here(layer.c, a[..., 0].long(), torch.zeros(len(u), dtype=torch.long), P)
        out, now = layer(a, b, past, here)
        past, P = {**past, **now}, P + a.size(1)
        outs.append(out)
    return torch.cat(outs, 1), past


@torch.no_grad()
@pytest.mark.parametrize("cut", [None, 1, 4, 8])
@pytest.mark.parametrize("fields", [dict(), dict(fading=3), dict(fading=16, eidetic=3), dict(eidetic=0), dict(fading=0),
                                    dict(eidetic=30, rope=False), dict(eidetic=0, fading=0)], ids=str)
def test_all_chunks_at_once_are_the_definition(fields, cut):
    layer = attention(seg=48, window=8, **fields)
    u, y = torch.randn(2, 1, 48, 16, dtype=torch.double).unbind(0)
    out, past = run(layer, u, y, cut)
    eps = past["eps"][0, layer.M + 8:] if layer.M else None
    assert torch.allclose(out, definition(layer, u, y, eps), atol=1e-10)


def dense(layer, u, visible):
    """Plain attention of all tokens with a T x T mask."""
    B, T, C = u.shape
    q, k, v = (x.unflatten(2, (layer.heads, -1)).transpose(1, 2) for x in layer.qkv(u).chunk(3, -1))
    q, k = (rotate(norm(x), angles(torch.arange(T) * layer.c.rope, layer.c.head_dim)) for x in (q, k))
    return layer.out(bmojo.attend(q, k, v, visible).transpose(1, 2).reshape(B, T, C))


@torch.no_grad()
def test_full_attention_comes_out_two_ways_and_a_sliding_window_too():
    u, y = torch.randn(2, 2, 48, 16, dtype=torch.double).unbind(0)
    i, j = torch.arange(48)[:, None], torch.arange(48)
    causal = lambda layer: dense(layer, u, None)
    wide = attention("window", seg=48, window=48)
    assert torch.allclose(run(wide, u, y)[0], causal(wide), atol=1e-10)
    for w in (1, 4, 16):       # a narrow window, but a buffer that nothing leaves
        keeps = attention(seg=48, window=w, eidetic=48, fading=0, rope=False)
        assert torch.allclose(run(keeps, u, y)[0], causal(keeps), atol=1e-10)
        slides = attention("window", seg=48, window=w)
        assert torch.allclose(run(slides, u, y)[0], dense(slides, u, (j <= i) & (j > i - w)), atol=1e-10)


@torch.no_grad()
def test_window_layers_are_the_sliding_window_model():
    model = tiny("bmojo", mix="window", window=8, conv=False)
    window = tiny("window", window=7)                      # there w does not count the token itself
    window.load_state_dict(model.state_dict())
    assert close(walk(model, text(K=4))[0], walk(window, text(K=4))[0])


@torch.no_grad()
def test_the_blocks_are_the_interleaved_sequence_of_the_paper():
    """Appendix B.2: the memory of a chunk, F and E, stands before it in one long sequence, [F0 E0 chunk0 F1 ..], over
    which a window slides of K = w + m_f + m_e. Only that no token may be seen twice is ours."""
    w, F, M, T = 8, 3, 5, 48
    K, layer = w + F + M, attention(seg=T, window=w, fading=F, eidetic=M, rope=False)
    u, y = torch.randn(2, 1, T, 16, dtype=torch.double).unbind(0)
    out, past = run(layer, u, y)
    eps, line = past["eps"][0, M + w:], []                                # (kind, token) at each place of the line
    for start in range(0, T, w):
        line += [("faded", s) for s in range(start - F, start)]
        best = eps[:start].topk(min(M, start)).indices.tolist()
        line += [("eidetic", s) for s in best + [-1] * (M - len(best))]
        line += [("raw", s) for s in range(start, start + w)]
    rows = torch.stack([(y if kind == "faded" else u)[0, s] for kind, s in line])
    k, v = torch.nn.functional.linear(rows, layer.qkv.weight[16:]).view(-1, 4, 8).chunk(2, 1)
    q, m = layer.qkv(u)[0, :, :16].view(T, 2, 8), torch.arange(len(line))
    place = m.view(-1, K)[:, F + M:].reshape(T, 1)                        # of the tokens in the line
    seen = (m <= place) & (m > place - K)
    raw = torch.tensor([kind == "raw" for kind, _ in line])
    assert not (seen & ~raw & (m // K != place // K)).any(), "a token sees the memory of another chunk"
    assert (seen & raw).sum(1).tolist() == [min(t + 1, w) for t in range(T)]
    for t in range(T):
        seen[t] &= torch.tensor([s >= 0 and not (kind == "eidetic" and s > t - w) for kind, s in line])
    o = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (norm(q), norm(k), v)), seen)
    assert torch.allclose(out[0], layer.out(o.transpose(0, 1).reshape(T, 16)), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_where_a_text_is_cut_into_segments_changes_nothing(name):
    """All that crosses the border of a segment is in the state; so no length that was not trained is anything new."""
    tokens, found = text(B=2, K=6), []
    for seg in (8, 24, 6 * S):
        model, logits = tiny(name, seg=seg, window=8, eidetic=10).double(), []
        state = model.init_state(2)
        for x in tokens.split(seg, 1):
            y, state = model(x, {k: v.double() if v.is_floating_point() else v for k, v in state.items()})
            logits.append(y)
        found.append(torch.cat(logits, 1))
    assert torch.allclose(found[0], found[2], atol=1e-9) and torch.allclose(found[1], found[2], atol=1e-9)


# the buffer

@torch.no_grad()
@pytest.mark.parametrize("select", ["innovation", "random"])
def test_the_buffer_is_a_running_heap(select):
    """Chunk by chunk, in segments and in one: the M largest innovations so far, of which the least never falls."""
    M, tokens = 6, text(B=2, K=4)
    every = walk(tiny("bmojo", layers=1, seg=S, eidetic=4 * S, select=select), tokens)[1]      # nothing leaves it
    order = every["0.at"][:, :4 * S].argsort(1)
    eps = every["0.eps"][:, :4 * S].gather(1, order)                                           # (B, 4S) by place
    model, least = tiny("bmojo", layers=1, seg=8, window=8, eidetic=M, select=select), torch.zeros(2) - 1
    state = model.init_state(2)
    for end in range(8, 4 * S + 1, 8):
        state = model(tokens[:, end - 8:end], state)[1]
        for row in range(2):
            heap = heapq.nlargest(M, ((float(e), t) for t, e in enumerate(eps[row, :end])))
            assert sorted(state["0.at"][row, :M].tolist()) == sorted(t for _, t in heap)
        assert (state["0.eps"][:, :M].amin(1) >= least).all() and (state["0.eps"][:, M:] == -1).all()
        least = state["0.eps"][:, :M].amin(1)


@torch.no_grad()
def test_the_innovation_is_the_distance_from_the_mean_of_the_three_outputs_before():
    layer = attention(seg=24, window=8, eidetic=2)
    here = Here(layer.c, torch.zeros(1, 24).long(), torch.zeros(1).long(), 0)
    past = {k: v.double() for k, v in layer.start(lambda *shape: torch.zeros(1, *shape)).items()}
    eps = lambda y: layer.surprise(y, past, here)["eps"][0, 10:]
    y = torch.randn(1, 24, 16, dtype=torch.double)
    expected = [(y[0, t] - sum(y[0, s] for s in range(t - 3, t) if s >= 0) / 3).norm() for t in range(24)]
    assert torch.allclose(eps(y), torch.stack(expected))
    same = eps(y[:, :1].expand(-1, 24, -1))
    assert torch.allclose(same[:3], y[0, 0].norm() * torch.tensor([3, 2, 1]).double() / 3) and same[3:].max() < 1e-10
    spike = torch.zeros_like(y)
    spike[:, 13] = 1
    assert eps(spike).argmax() == 13


@torch.no_grad()
def test_an_oracle_keeps_exactly_the_tokens_it_was_told_to():
    x, _, _ = data.mqar(np.random.default_rng(0), 3, 64)
    model = tiny("bmojo", seg=64, eidetic=8, select=f"{data.NOISE}-{data.NOISE + data.VALUES}")
    state = model(torch.from_numpy(x), model.init_state(3))[1]
    for l in (0, 1):
        assert state[f"{l}.at"][:, :8].sort(1).values.tolist() == [list(range(1, 17, 2))] * 3


@torch.no_grad()
def test_without_fading_tokens_the_past_is_read_through_eidetic_rows_alone():
    """One layer: every eidetic row that is nudged moves the next chunk, and a state space that is nudged does not."""
    model = tiny("bmojo", layers=1, window=8, eidetic=4, fading=0, conv=False)
    tokens = text(B=1, K=2)
    state = walk(model, tokens[:, :S])[1]
    chunk = lambda state: model(tokens[:, S:], state)[0][:, :8]
    for row in range(4):
        changed = state["0.v"].clone()
        changed[:, row] += 1
        assert not torch.equal(chunk(dict(state, **{"0.v": changed})), chunk(state))
    assert torch.equal(chunk(dict(state, **{"0.h": state["0.h"] + 1})), chunk(state))


# gradients

@pytest.mark.parametrize("G, runs", [(3, [(1, 4), (5, 4), (2, 4)]), (1, [(0, 7), (3, 2)])], ids=["chunks", "one chunk"])
def test_gradients_that_add_in_place_are_those_of_the_maps(G, runs):
    """Rows that several chunks see, that are seen twice by one, and that none sees."""
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 2, 20, 3, generator=g, dtype=torch.double).requires_grad_().unbind(0)
    i = torch.randint(20, (2, G, 5), generator=g)
    seen = lambda x: torch.stack([x[:, [r for first, m in runs for r in range(first + h * m, first + h * m + m)]]
                                  for h in range(G)], 1)
    for i in (i, None):
        for rows, out in zip((x, v), bmojo.Gather.apply(x, v, runs, i, G)):
            assert torch.equal(out, seen(rows) if i is None else torch.cat([seen(rows), take(rows, i)], 2))
        assert torch.autograd.gradcheck(lambda x, v: bmojo.Gather.apply(x, v, runs, i, G), (x, v))
    taps = torch.randn(4, 3, generator=g, dtype=torch.double, requires_grad=True)
    y = bmojo.Convolve.apply(x, taps)
    assert torch.allclose(y[:, 5], x[:, 8] + (taps * x[:, 5:9]).sum(1))
    assert torch.autograd.gradcheck(bmojo.Convolve.apply, (x, taps))


def grads(model, tokens, lo, hi):
    """Which parts of the model get a gradient from a loss on the logits lo..hi."""
    model.zero_grad()
    walk(model, tokens)[0][:, lo:hi].square().sum().backward()
    size = lambda ps: sum(float(p.grad.abs().sum()) for p in ps if p.grad is not None)
    return size(model.blocks[0].ssm.parameters()), size(model.blocks[0].attention.parameters())


def test_gradient_reaches_the_state_space_only_through_fading_tokens():
    tokens = text(B=1, K=2)
    for fading, first in ((-1, 8), (4, 8)):
        model = tiny("bmojo", layers=1, window=8, fading=fading)
        assert grads(model, tokens, 0, first)[0] == 0, "nothing has left the window yet"
        ssm, other = grads(model, tokens, first, first + 1)
        assert ssm > 0 and other > 0
    ssm, other = grads(tiny("bmojo", layers=1, window=8, fading=0), tokens, 0, 2 * S)
    assert ssm == 0 and other > 0, "the innovation has no gradient"


def test_gradient_reaches_an_eidetic_token_from_far_behind_its_window():
    model, seen = tiny("bmojo", layers=1, window=4, eidetic=3, fading=0, conv=False), []
    model.embedding.register_forward_hook(lambda m, a, y: (y.retain_grad(), seen.append(y)) and None)
    tokens = text(B=1, K=4)
    logits, state = walk(model, tokens)
    logits[:, -1].sum().backward()
    moved = [S * k + t for k, y in enumerate(seen) for t in y.grad[0].abs().sum(-1).nonzero().flatten().tolist()]
    eidetic = [t for t in moved if t < 4 * S - 4]
    assert len(eidetic) == 3 and set(eidetic) <= set(walk(model, tokens[:, :-S])[1]["0.at"][0, :3].tolist()) | \
        set(range(3 * S, 4 * S))


# the presets

def test_all_presets_have_the_size_of_gpt():
    """What the state space takes the MLP gives, so that models are compared at equal parameters."""
    for size in (dict(layers=4, heads=4, width=128), dict(layers=2, heads=2, width=64, vocab=64)):
        gpt, *others = [sum(p.numel() for p in nanomem.build(name, **size).parameters()) for name in ("gpt", *PRESETS)]
        assert all(abs(n - gpt) < 0.02 * gpt for n in others)


def test_a_part_that_is_left_out_leaves_nothing_in_the_state():
    keys = {name: {k.partition(".")[2] for k in tiny(name).init_state(1)} - {""} for name in PRESETS}
    assert keys["mamba"] == {"u", "h"} and keys["hybrid"] == {"u", "h", "k", "v"}
    assert keys["bmojo_f"] == keys["hybrid"] and keys["bmojo"] == keys["bmojo_f"] | {"eps", "at", "y"}


@pytest.mark.parametrize("fields, hint", [
    (dict(mix="ssm,attn"), "got ssm,attn"), (dict(seg=30, window=8), "window=8 does not cut 30 tokens"),
    (dict(seg=32, window=8, fading=17), "two windows, 16, got 17"), (dict(eidetic=-2), "eidetic=-2"),
    (dict(window=0), "window=0 goes with fading=0"), (dict(select="best"), "ids lo-hi, got best"),
    (dict(select="3-"), "ids lo-hi, got 3-")])
def test_a_setting_that_makes_no_sense_is_refused(fields, hint):
    with pytest.raises(UserError, match=hint):
        nanomem.build("bmojo", **fields)


@pytest.mark.slow
def test_an_eidetic_memory_recalls_what_a_state_space_has_not_learned_yet(tmp_path):
    found = {}
    for name, more in (("mamba", []), ("bmojo", ["--eidetic=12"])):
        train.main([f"--model={name}", f"--out={tmp_path / name}", "--data=mqar", "--segments=1", "--steps=150",
                    "--batch=64", "--lr=5e-3", "--layers=2", "--heads=2", "--width=64", "--seg=32", "--state=4", *more])
        model, _ = nanomem.load(tmp_path / name)
        right, total = 0, 0
        for batch, _, hit in stream.evaluate(model, data.Synthetic("mqar", 64, 32, seed=7), 8):
            scored = batch.at > model.c.w                                  # the answer has left the window
            right, total = right + hit[scored].sum().item(), total + scored.sum().item()
        found[name] = right / total
    assert found["mamba"] < 0.5 and found["bmojo"] > 0.95, found
