"""B'MOJO: the attention and its memories against slow definitions, and what follows."""
import heapq

import numpy as np
import pytest
import torch

import nanomem
import train
from nanomem import stream, tasks
from nanomem.cli import UserError
from nanomem.models import bmojo, gpt
from nanomem.models.bmojo import Config, innovation
from nanomem.models.gpt import norm, rotate

from conftest import S, close, run, text, tiny

PRESETS = ("hybrid", "bmojo_f", "bmojo")


def rope(positions, D):
    """gpt.rope in double precision, so that the views below can be compared to ten digits."""
    angle = positions.double()[:, None] * 10_000 ** (-torch.arange(0, D, 2).double() / D)
    return angle.cos(), angle.sin()


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(bmojo, "rope", rope)


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


def test_a_hybrid_alternates_attention_and_state_space():
    parts = [(b.ssm is not None, b.attention is not None) for b in tiny("hybrid", layers=4).blocks]
    assert parts == [(False, True), (True, False)] * 2


# the attention

def definition(layer, u, y, eps):
    """One token after the other, one key at a time, and a heap of which each chunk sees what it holds at the start."""
    c, (B, T, C), out, heap = layer.c, u.shape, [], []
    q, k, v, fk, fv = (x.view(B, T, c.heads, -1) for x in (layer.q(u), layer.k(u), layer.v(u), layer.k(y), layer.v(y)))
    rotated = lambda x, position: rotate(norm(x), rope(torch.tensor([position * c.rope]), c.head_dim))

    def key(k, s, position):
        """Half of it is the key of the token before, rotated to the position before."""
        before = rotated(k[:, s - 1], position - 1) if s else torch.zeros_like(k[:, 0])
        return torch.cat([rotated(k[:, s], position)[..., :4], before[..., 4:]], -1)
    for t in range(T):
        j, chunk = t % c.W, t // c.W * c.W
        if j == 0:
            snapshot = [s for _, s in heap]
        faded = range(t - 2 * c.W + 1, t - c.W + 1) if layer.fading < 0 else range(chunk - layer.fading, chunk)
        seen = [(k, v, s, t - s) for s in range(max(0, t - c.W + 1), t + 1)]
        seen += [(fk, fv, s, t - s) for s in faded if s >= 0 and layer.fading]
        seen += [(k, v, s, j + c.W) for s in snapshot if s <= t - c.W]
        keys = torch.stack([key(k, s, -distance) for k, _, s, distance in seen], 2)               # (B, H, m, D)
        values = torch.stack([v[:, s] for _, v, s, _ in seen], 2)
        scores = (rotated(q[:, t], 0)[:, :, None] * layer.gain * keys).sum(-1) / c.head_dim ** 0.5
        out.append((scores.softmax(-1)[..., None] * values).sum(2).flatten(1))
        if layer.M:
            heapq.heappush(heap, (float(eps[t]), t))
            heap = heapq.nlargest(layer.M, heap)
            heapq.heapify(heap)
    return layer.out(torch.stack(out, 1))


def attention(kind="bmojo", **fields):
    torch.manual_seed(0)
    return bmojo.Attention(Config(vocab=64, layers=1, heads=2, width=16, **fields), kind).double()


def run_layer(layer, u, y, cut=None):
    """The layer on a text, at once or in calls of `cut` tokens."""
    memory, outs, n = layer.start(lambda *shape: torch.zeros(len(u), *shape).double()), [], 0
    for a, b in zip(u.split(cut or u.size(1), 1), y.split(cut or u.size(1), 1)):
        t = torch.arange(n, n + a.size(1)).expand(len(u), -1)
        out, memory = layer(a, b, memory, t, None)
        outs.append(out)
        n += a.size(1)
    return torch.cat(outs, 1)


def innovations(y):
    return innovation(y, y.new_zeros(len(y), 3, y.size(2)))[0]


@torch.no_grad()
@pytest.mark.parametrize("cut", [None, 1, 4, 8, 11])
@pytest.mark.parametrize("fields", [dict(), dict(fading=3), dict(fading=16, eidetic=3), dict(eidetic=0), dict(fading=0),
                                    dict(eidetic=30, rope=False), dict(eidetic=0, fading=0)], ids=str)
def test_the_chunks_are_the_definition(fields, cut):
    layer = attention(seg=48, window=8, **fields)
    u, y = torch.randn(2, 1, 48, 16, dtype=torch.double).unbind(0)
    assert torch.allclose(run_layer(layer, u, y, cut), definition(layer, u, y, innovations(y)[0]), atol=1e-10)


def dense(layer, u, visible):
    """Plain attention of all tokens with a T x T mask."""
    B, T, C = u.shape
    q, k, v = (gpt.split_heads(linear(u), layer.c.heads) for linear in (layer.q, layer.k, layer.v))
    q, k = (rotate(norm(x), rope(torch.arange(T) * layer.c.rope, layer.c.head_dim)) for x in (q, k))
    return layer.out(bmojo.attend(q * layer.gain, gpt.with_previous(k), v, visible).transpose(1, 2).reshape(B, T, C))


@torch.no_grad()
def test_full_attention_comes_out_two_ways_and_a_sliding_window_too():
    u, y = torch.randn(2, 2, 48, 16, dtype=torch.double).unbind(0)
    i, j = torch.arange(48)[:, None], torch.arange(48)
    causal = lambda layer: dense(layer, u, None)
    wide = attention("window", seg=48, window=48)
    assert torch.allclose(run_layer(wide, u, y), causal(wide), atol=1e-10)
    for w in (1, 4, 16):       # a narrow window, but a buffer that nothing leaves
        keeps = attention(seg=48, window=w, eidetic=48, fading=0, rope=False)
        assert torch.allclose(run_layer(keeps, u, y), causal(keeps), atol=1e-10)
        slides = attention("window", seg=48, window=w)
        assert torch.allclose(run_layer(slides, u, y), dense(slides, u, (j <= i) & (j > i - w)), atol=1e-10)


@torch.no_grad()
def test_window_layers_are_the_sliding_window_model():
    model = tiny("bmojo", mix="window", window=8)
    window = tiny("window", window=7)                      # there W does not count the token itself
    window.load_state_dict(model.state_dict())
    assert close(run(model, text(K=4))[0], run(window, text(K=4))[0])


@torch.no_grad()
def test_the_chunks_are_the_interleaved_sequence_of_the_paper():
    """Appendix B.2: the memory of a chunk, F and E, stands before it in one long sequence, [F0 E0 chunk0 F1 ..], over
    which a window slides of K = w + m_f + m_e. Only that no token may be seen twice is ours."""
    w, F, M, T = 8, 3, 5, 48
    K, layer = w + F + M, attention(seg=T, window=w, fading=F, eidetic=M, rope=False)
    u, y = torch.randn(2, 1, T, 16, dtype=torch.double).unbind(0)
    out, eps, line = run_layer(layer, u, y), innovations(y)[0], []        # line: (kind, token) at each place
    for start in range(0, T, w):
        line += [("faded", s) for s in range(start - F, start)]
        best = eps[:start].topk(min(M, start)).indices.tolist()
        line += [("eidetic", s) for s in best + [-1] * (M - len(best))]
        line += [("raw", s) for s in range(start, start + w)]
    inputs = torch.stack([(y if kind == "faded" else u)[0, s] for kind, s in line])
    v = layer.v(inputs).view(-1, 2, 8)
    shifted = {kind: gpt.with_previous(norm(layer.k(x[0]).view(T, 2, 8)).transpose(0, 1)[None])[0].transpose(0, 1)
               for kind, x in dict(raw=u, eidetic=u, faded=y).items()}
    k = torch.stack([shifted[kind][s] for kind, s in line])                # with norm, and half of the token before
    q, m = layer.q(u)[0].view(T, 2, 8), torch.arange(len(line))
    place = m.view(-1, K)[:, F + M:].reshape(T, 1)                        # of the tokens in the line
    seen = (m <= place) & (m > place - K)
    raw = torch.tensor([kind == "raw" for kind, _ in line])
    assert not (seen & ~raw & (m // K != place // K)).any(), "a token sees the memory of another chunk"
    assert (seen & raw).sum(1).tolist() == [min(t + 1, w) for t in range(T)]
    for t in range(T):
        seen[t] &= torch.tensor([s >= 0 and not (kind == "eidetic" and s > t - w) for kind, s in line])
    q, k, v = (x.transpose(0, 1) for x in (layer.gain[:, 0] * norm(q), k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
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
    every = run(tiny("bmojo", layers=1, seg=S, eidetic=4 * S, select=select), tokens)[1]      # nothing leaves it
    eps = every["0.innovation"].gather(1, every["0.position"].argsort(1))                      # (B, 4S) by position
    model, least = tiny("bmojo", layers=1, seg=8, window=8, eidetic=M, select=select), torch.zeros(2) - 1
    state = model.init_state(2)
    for end in range(8, 4 * S + 1, 8):
        state = model(tokens[:, end - 8:end], state)[1]
        for element in range(2):
            heap = heapq.nlargest(M, ((float(e), t) for t, e in enumerate(eps[element, :end])))
            assert sorted(state["0.position"][element].tolist()) == sorted(t for _, t in heap)
        assert (state["0.innovation"].amin(1) >= least).all()
        least = state["0.innovation"].amin(1)


@torch.no_grad()
def test_the_innovation_is_the_distance_from_the_mean_of_the_three_outputs_before():
    eps = lambda y: innovations(y)[0]
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
    x, _, _ = tasks.mqar(np.random.default_rng(0), 3, 64)
    model = tiny("bmojo", seg=64, eidetic=8, select=f"{tasks.NOISE}-{tasks.NOISE + tasks.VALUES}")
    state = model(torch.from_numpy(x), model.init_state(3))[1]
    for l in (0, 1):
        assert state[f"{l}.position"].sort(1).values.tolist() == [list(range(1, 17, 2))] * 3


@torch.no_grad()
@pytest.mark.parametrize("select", ["random", "5-9"])
def test_an_ablation_chooses_by_the_text_alone_however_it_is_cut(select):
    """Other texts keep other positions, and calls of any length keep the same."""
    model, tokens = tiny("bmojo", window=8, eidetic=5, select=select), text(K=1)
    state = model.init_state(2)
    whole = model(tokens, state)[1]
    for cut in (1, 5, 11):
        cache = model.read(state)
        for part in tokens.split(cut, 1):
            cache = model.extend(part, cache)[1]
        parts = model.write(cache, state)
        for key in ("0.position", "1.position", "0.innovation", "1.innovation"):
            assert torch.equal(parts[key], whole[key])
    assert whole["0.position"][0].sort()[0].tolist() != whole["0.position"][1].sort()[0].tolist()


@torch.no_grad()
def test_without_fading_tokens_the_past_is_read_through_eidetic_tokens_alone():
    """One layer: the value of every eidetic token moves the next chunk, and a state space that changes does not."""
    model = tiny("bmojo", layers=1, window=8, eidetic=4, fading=0)
    tokens = text(B=1, K=2)
    state = run(model, tokens[:, :S])[1]
    chunk = lambda state: model(tokens[:, S:], state)[0][:, :8]
    for i in range(4):
        changed = state["0.eidetic"].clone()
        changed[:, i, 1] += 1
        assert not torch.equal(chunk(dict(state, **{"0.eidetic": changed})), chunk(state))
    assert torch.equal(chunk(dict(state, **{"0.ssm": state["0.ssm"] + 1})), chunk(state))


# gradients

def grads(model, tokens, lo, hi):
    """Which parts of the model get a gradient from a loss on the logits lo..hi."""
    model.zero_grad()
    run(model, tokens)[0][:, lo:hi].square().sum().backward()
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
    model, seen = tiny("bmojo", layers=1, window=4, eidetic=3, fading=0), []
    model.embedding.register_forward_hook(lambda m, a, y: (y.retain_grad(), seen.append(y)) and None)
    tokens = text(B=1, K=4)
    logits, state = run(model, tokens)
    logits[:, -1].sum().backward()
    moved = [S * k + t for k, y in enumerate(seen) for t in y.grad[0].abs().sum(-1).nonzero().flatten().tolist()]
    far = {t for t in moved if t < 4 * S - 5}
    eidetic = set(run(model, tokens)[1]["0.position"][0].tolist())            # 3 of them, and the token before each
    assert len(far) >= 3 and far <= eidetic | {t - 1 for t in eidetic} and eidetic <= set(moved)


# the presets

def test_all_presets_have_the_size_of_gpt():
    """What the state space takes the MLP gives, so that models are compared at equal parameters."""
    for size in (dict(layers=4, heads=4, width=128), dict(layers=2, heads=2, width=64, vocab=64)):
        gpt, *others = [sum(p.numel() for p in nanomem.build(name, **size).parameters()) for name in ("gpt", *PRESETS)]
        assert all(abs(n - gpt) < 0.02 * gpt for n in others)


def test_a_part_that_is_left_out_leaves_nothing_in_the_state():
    keys = {name: {k.partition(".")[2] for k in tiny(name).init_state(1)} - {""} for name in PRESETS}
    assert keys["hybrid"] == {"conv", "ssm", "window", "last_key"}
    assert keys["bmojo_f"] == keys["hybrid"] | {"fading", "last_fading_key"}
    assert keys["bmojo"] == keys["bmojo_f"] | {"eidetic", "innovation", "position", "outputs"}


@pytest.mark.parametrize("fields, hint", [
    (dict(mix="ssm,attn"), "got ssm,attn"), (dict(seg=30, window=8), "window=8 does not cut 30 tokens"),
    (dict(seg=32, window=8, fading=17), "two windows, 16, got 17"), (dict(eidetic=-2), "eidetic counts tokens, got -2"),
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
        for batch, _, hit in stream.evaluate(model, tasks.TaskLoader("mqar", 64, 32, seed=7), 8):
            scored = batch.distance > Config(seg=32).W                     # the answer has left the window of bmojo
            right, total = right + hit[scored].sum().item(), total + scored.sum().item()
        found[name] = right / total
    assert found["mamba"] < 0.5 and found["bmojo"] > 0.95, found


@torch.no_grad()
def test_the_cache_says_which_eidetic_tokens_each_token_could_see():
    """Those of the state at the last border of a chunk, if they have left the window: so cut after every chunk."""
    model, tokens, W = tiny("bmojo", eidetic=3).eval(), text(B=2), tiny("bmojo").c.W
    state = run(model, tokens[:, :S])[1]
    cache, expected = model.read(state), []
    for part in tokens[:, S:2 * S].split(W, 1):
        for t in range(int(cache[0][0]), int(cache[0][0]) + W):
            kept = [p for memory in cache[1] for p, eps in zip(memory["position"][0].tolist(),
                                                               memory["innovation"][0].tolist()) if eps >= 0]
            expected.append(sorted((p, p + 1) for p in kept if p <= t - W))
        cache = model.extend(part, cache)[1]
    spans, weights = model.retrieved(model.extend(tokens[:, S:2 * S], model.read(state))[1])
    assert spans.shape == (2, S, 2 * 3, 2) and weights.isnan().all() and torch.equal(spans, model.retrieved(cache)[0])
    found = [sorted((a, b) for a, b in spans[0, t].tolist() if a >= 0) for t in range(S)]
    assert found == expected and all(found)
