"""The laws: what every model and every preset keeps, whatever its memory is."""
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import nanomem
from nanomem import stream
from nanomem.cli import UserError

from conftest import TINY, tiny

S, V = TINY["seg"], TINY["vocab"]
# each memory switched off
OFF = dict(gpt={}, window=dict(slide=False, window=0), xl=dict(window=0), full=dict(slide=False, window=0),
           rmt=dict(mem=0, sensory=0), **{name: dict(mem=0, sensory=0) for name in ("hmt", "hmt_split")},
           memformer=dict(mem=0), memoryllm=dict(slots=0), mplus=dict(slots=0), gca=dict(topk=0, window=0),
           **dict.fromkeys(("hybrid", "bmojo_f", "bmojo"), dict(mix="window", window=0, conv=False)))


def text(B=2, K=3, seed=0):
    return torch.randint(V, (B, K * S), generator=torch.Generator().manual_seed(seed))


def walk(model, tokens, state=None):
    """Logits of all segments (B, K*S, V) and the last state."""
    state, logits = state or model.init_state(len(tokens)), []
    for x in tokens.split(S, 1):
        y, state = model(x, state)
        logits.append(y)
    return torch.cat(logits, 1), state


def watch(model, seen):
    """Collect the embedded tokens of every segment, each with its gradient after a backward."""
    def hook(module, args, y):
        if y.size(1) == S:             # not what is read again
            y.retain_grad()
            seen.append(y)
    model.embedding.register_forward_hook(hook)


def close(a, b, tolerance=1e-4):
    """States or tensors that agree; relative to their size."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and (a.numel() == 0 or bool((a - b).abs().max() <= tolerance * (1 + b.abs().max())))


# law 1: state

@torch.no_grad()
def test_the_state_is_a_flat_dict_of_fixed_shape(model):
    state = first = model.init_state(3)
    for x in text(B=3).split(S, 1):
        _, state = model(x, state)
        assert state.keys() == first.keys()
        for k, v in state.items():
            assert v.shape == first[k].shape and v.dtype == first[k].dtype and len(v) == 3
            assert v.is_contiguous() and v.untyped_storage().nbytes() == v.nbytes, f"{k} pins more than it holds"


# law 2: streaming

@torch.no_grad()
@pytest.mark.parametrize("cut", [[1] * S, [5, 20, 7], [S - 1, 1], [S]], ids=["ones", "5+20+7", "31+1", "whole"])
def test_any_cut_of_a_segment_gives_the_single_call(model, cut):
    state = model.init_state(2)
    for x in text().split(S, 1):
        logits, after = model(x, state)
        cache, parts = model.read(state), []
        for part in x.split(cut, 1):
            y, cache = model.extend(part, cache)
            parts.append(y)
        assert close(torch.cat(parts, 1), logits)
        state = model.write(cache, state)
        assert close(state, after)


@torch.no_grad()
def test_a_reader_predicts_what_the_walk_predicts(model):
    tokens = text()
    logits, _ = walk(model, tokens)
    reader, t = stream.Reader(model, B=2), 0
    for n in (1, 3, S - 4, S + 7, 2, S - 9):
        t += n
        assert close(reader(tokens[:, t - n:t]), logits[:, t - 1])
    assert reader.count == t == 3 * S


@torch.no_grad()
def test_segments_side_by_side_are_segments_in_turn(model):
    if model.parallel == 1:
        with pytest.raises(AssertionError, match=f"a segment is {S} tokens, got {2 * S}"):
            model(text()[:, :2 * S], model.init_state(2))
        return
    state = after = model.init_state(2)
    for seed in range(2):
        tokens = text(seed=seed)
        logits, state = model(tokens, state)
        expected, after = walk(model, tokens, after)
        assert close(logits, expected) and close(state, after)
        assert all(v.is_contiguous() and v.untyped_storage().nbytes() == v.nbytes for v in state.values())


# law 3: no token sees the future

@torch.no_grad()
def test_no_token_sees_the_future(model):
    tokens = text(B=1)
    changed = tokens.repeat(3 * S, 1)                                # row t has another token at t
    changed[torch.arange(3 * S), torch.arange(3 * S)] = (tokens[0] + 1) % V
    before, after = walk(model, tokens.repeat(3 * S, 1))[0], walk(model, changed)[0]
    moved = (before - after).abs().amax(-1) > 1e-6                   # (changed token, logit)
    assert not moved.tril(-1).any()
    assert moved.diagonal().all()


# law 4: the state is the only channel

@torch.no_grad()
def test_the_state_is_the_only_channel(model):
    tokens = text(B=3)
    _, state = walk(model, tokens)
    kept = {k: v.clone() for k, v in state.items()}
    one, two = model(tokens[:, :S], state), model(tokens[:, :S], state)
    assert torch.equal(one[0], two[0]) and all(torch.equal(one[1][k], two[1][k]) for k in state)
    assert all(torch.equal(state[k], kept[k]) for k in state), "forward changed its input state"
    alone = model(tokens[1:2, :S], {k: v[1:2] for k, v in state.items()})
    assert close(alone[0][0], one[0][1]) and close(alone[1], {k: v[1:2] for k, v in one[1].items()})


@torch.no_grad()
def test_a_fresh_row_starts_from_nothing_and_the_others_go_on(model):
    tokens = text(B=2)
    _, state = walk(model, tokens)
    state = stream.enter(model, state, torch.tensor([True, False]))
    new, on = model(tokens[:, :S], model.init_state(2))[0], model(tokens[:, :S], walk(model, tokens)[1])[0]
    both = model(tokens[:, :S], state)[0]
    assert close(both[0], new[0]) and close(both[1], on[1])


# law 5: the past matters

@torch.no_grad()
def test_the_past_matters(model, name):
    tokens = text()
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % V
    moved = (walk(model, tokens)[0] - walk(model, other)[0])[:, S:].abs().max()
    assert moved == 0 if name == "gpt" else moved > 1e-5


def test_gradient_reaches_every_parameter(model):
    tokens = text()
    stream.bptt(model, stream.step_of(model), tokens, tokens.roll(-1, 1), model.init_state(2), 0.01)
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


# law 6: replay is back-propagation through time

def test_replay_gives_the_gradients_of_bptt(model):
    model.double()
    tokens, fresh = text(K=4), torch.tensor([True, False])
    carried = {k: v.double() if v.is_floating_point() else v for k, v in stream.detach(walk(model, tokens)[1]).items()}
    found = []
    for way in (stream.bptt, stream.replay):
        model.zero_grad()
        begin = stream.enter(model, carried, fresh)
        loss, state = way(model, stream.step_of(model), tokens, tokens.roll(-1, 1), begin, 1 / tokens.numel())
        found.append((loss, state, {n: p.grad for n, p in model.named_parameters()}))
    (loss, state, grad), (loss2, state2, grad2) = found
    assert torch.allclose(loss, loss2, rtol=1e-6) and close(state, state2, 1e-5)     # turns by large angles are rounded
    for n in grad:
        assert (grad[n] - grad2[n]).norm() <= 1e-5 * grad[n].norm(), n


@pytest.mark.parametrize("scale", [0, 1, 1000])
def test_the_loss_that_overwrites_its_logits_is_cross_entropy(scale):
    logits, y = scale * torch.randn(12, V, dtype=torch.double), torch.randint(-1, V, (12,))
    y[:2] = torch.tensor([-1, 3])
    found = []
    for loss in (stream.summed_loss, lambda *args: cross_entropy(*args, ignore_index=-1, reduction="sum")):
        leaf = logits.clone().requires_grad_()
        found.append(loss(1 * leaf, y))
        found += torch.autograd.grad(0.3 * found[-1], leaf)
    assert torch.allclose(found[0], found[2], rtol=1e-12) and torch.allclose(found[1], found[3], rtol=1e-9, atol=1e-12)
    assert stream.summed_loss(logits.fill_(math.nan), y).isnan(), "a loss that is lost must be seen to be"


def test_a_loss_of_the_mechanism_itself_counts_in_both():
    """`aux` (B,) in the state: its mean joins the loss of its segment, and its gradient goes through the memory too."""
    class WithAux(type(nanomem.build("rmt", **TINY))):
        def init_state(self, B):
            return dict(super().init_state(B), aux=torch.zeros(B))

        def forward(self, tokens, state):
            logits, out = super().forward(tokens, state)
            return logits, dict(out, aux=(out["mem"] - self.mem).pow(4).mean((1, 2)))
    torch.manual_seed(0)
    model, tokens, grads = WithAux(nanomem.build("rmt", **TINY).c), text(), []
    for way in (stream.bptt, stream.replay):
        model.zero_grad()
        way(model, stream.step_of(model), tokens, tokens, model.init_state(2), 1 / tokens.numel())
        grads.append([p.grad for p in model.parameters()])
    model.zero_grad()
    state, goal = model.init_state(2), 0
    for x in tokens.split(S, 1):
        logits, state = model(x, state)
        goal = goal + cross_entropy(logits.flatten(0, 1), x.flatten()) / 3 + state["aux"].mean() / 3
    goal.backward()
    for one, two, p in zip(*grads, model.parameters()):
        assert close(one, p.grad, 1e-5) and close(two, p.grad, 1e-5)


# law 7: memory off is GPT

@torch.no_grad()
def test_memory_off_is_gpt_to_the_bit(name):
    if name == "mamba":
        pytest.skip("mamba has no attention: with its state switched off, nothing of GPT would mix tokens")
    off, gpt = tiny(name, **OFF[name]), tiny("gpt")
    gpt.load_state_dict(off.state_dict(), strict=False)
    assert torch.equal(walk(off, text())[0], walk(gpt, text())[0])
    torch.manual_seed(5)
    weights = nanomem.build(name, **TINY, **OFF[name]).head.weight
    torch.manual_seed(5)
    assert torch.equal(weights, nanomem.build("gpt", **TINY).head.weight), "the same seed starts from other weights"


# law 9: save and load

@torch.no_grad()
def test_a_saved_memory_goes_on(model, tmp_path):
    tokens, end = text(B=1)[:, :2 * S + 5], text(B=1, seed=1)[:, :S]
    for read in (2 * S + 5, 2 * S):                                  # in the middle of a segment, and between two
        reader = stream.Reader(model)
        reader(tokens[:, :read])
        for v in (reader.logits, reader.page, *reader.state.values()):
            assert v.untyped_storage().nbytes() == v.nbytes, "more is kept, and saved, than is remembered"
        reader.save(tmp_path / "memory.pt")
        again = stream.Reader(model)
        again.load(tmp_path / "memory.pt")
        assert torch.equal(again.logits, reader.logits) and again.count == read
        assert close(again(end), reader(end))


def test_a_memory_of_other_weights_is_refused(model, name, tmp_path):
    reader = stream.Reader(model)
    reader(text(B=1))
    reader.save(tmp_path / "memory.pt")
    with pytest.raises(UserError, match="other weights"):
        stream.Reader(tiny(name, seed=1)).load(tmp_path / "memory.pt")


# building

def test_any_size_builds_with_knobs_derived(name):
    for size in (dict(layers=1, heads=1, width=2, seg=1, vocab=2), dict(layers=3, heads=5, width=40, seg=7), {}):
        model = nanomem.build(name, **size)
        logits, _ = model(torch.zeros(2, model.c.seg, dtype=torch.long), model.init_state(2))
        assert logits.shape == (2, model.c.seg, model.c.vocab)


@pytest.mark.parametrize("name, fields, hint", [
    ("rtm", {}, "did you mean rmt"), ("xl", dict(windwo=3), "did you mean window"),
    ("gpt", dict(mem=3), "no field mem"), ("rmt", dict(heads=0), "heads must be positive, got 0"),
    ("gpt", dict(width=20, heads=3), "width 20 does not split into 3 heads"), ("rmt", dict(mem=-2), "got -2"),
    ("gpt", dict(seg=0), "seg must be positive, got 0"), ("window", dict(window=0), "window > 0, got 0")])
def test_a_wrong_name_field_or_setting_is_refused_with_the_reason(name, fields, hint):
    with pytest.raises(UserError, match=hint):
        nanomem.build(name, **fields)


def test_a_segment_of_the_wrong_length_is_refused(model):
    with pytest.raises(AssertionError, match=f"segment is {S} tokens, got {S - 1}"):
        model(text()[:, :S - 1], model.init_state(2))
