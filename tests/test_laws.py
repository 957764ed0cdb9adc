"""The laws: what every model and every preset keeps, whatever its memory is.

A law that fails says which law it is and what it means, where the first difference is, and what usually causes it.
"""
import sys

import pytest
import torch
from torch import nn

import bench
import nanomem
import train
from nanomem import measure, stream
from nanomem.cli import UserError
from nanomem.jobs import Job
from nanomem.suites import TASKS

from conftest import S, TINY, V, change, close, run, text, tiny

LAWS = {
    1: ("state", "The state is a flat dict of tensors, batch first, whose keys, shapes, dtypes and bytes never change.",
        "a torch.cat without dropping the oldest; a view that keeps a larger tensor alive (clone it); a Python number"),
    2: ("streaming", "Any way to cut a segment into extend calls gives the logits and the state of the single call.",
        "positions that start anew in each call; a mask aligned with the first key; something kept on self"),
    3: ("no token sees the future", "A token can change its own logit and later ones, and none before it.",
        "a mask shifted by one; a statistic over the whole segment; a memory written before the segment has read it"),
    4: ("the state is the only channel", "The output depends on tokens and state alone: on nothing kept elsewhere, not "
        "on other batch elements, not on how the batch is put together. Forward never changes its input state.",
        "an in-place write into the state; a random number; an index over the batch; normalisation over the batch"),
    5: ("the past matters", "A token of an earlier segment moves later logits, and every parameter gets a gradient.",
        "a state that is returned but not read; a detach in the wrong place; a product with weights that are zero"),
    6: ("replay equals back-propagation through time", "Replay gives the same loss, state and gradients.",
        "a state tensor that is detached on the way; an integer state that should be a float; randomness"),
    7: ("memory off is GPT", "With its memory switched off, a model is the plain GPT, to the bit.",
        "a norm, a gain or a position that remains; parameters drawn before those of GPT"),
    9: ("save and load", "A state that was written to disk and loaded goes on to the same logits.",
        "something remembered outside the state; a dtype that changes; a device that is lost"),
    10: ("it learns", "In 100 steps it learns to recall what an earlier segment said, which gpt cannot know.",
         "initial weights that let no gradient through the memory; a memory that fades too soon; a missing norm"),
}

# the settings that switch each memory off
OFF = dict(gpt={}, window=dict(slide=False, window=0), xl=dict(window=0), full=dict(slide=False, window=0),
           rmt=dict(mem=0, sensory=0), **{name: dict(mem=0, sensory=0) for name in ("hmt", "hmt_split")},
           memformer=dict(mem=0), memoryllm=dict(slots=0), mplus=dict(slots=0), gca=dict(topk=0, window=0),
           landmark=dict(topk=0, bank=0, block=S), infini=dict(update="none"),
           titans=dict(depth=0), titans_mag=dict(depth=0),
           **dict.fromkeys(("hybrid", "bmojo_f", "bmojo"), dict(mix="window", window=0)))


def broken(law, what):
    """The message of a law that does not hold."""
    title, meaning, causes = LAWS[law]
    return f"\nLaw {law}, {title}, does not hold: {what}\n  It means: {meaning}\n  Usual causes: {causes}."


def holds(law, condition, what):
    assert condition, broken(law, what)


def place(name, index, begin):
    """Words for the index of an element of the logits (B, T, V) of the tokens from `begin` on, or of a state tensor."""
    b, *rest = index
    if name == "logits" and len(rest) == 2:
        segment, position = divmod(begin + rest[0], S)
        return f"batch element {b}, segment {segment}, position {position}, vocabulary entry {rest[1]}"
    return f"batch element {b}, index {tuple(rest)}" if rest else f"batch element {b}"


def agree(law, got, expected, tolerance=1e-4, name="logits", when="", begin=0):
    """Two tensors or states agree within tolerance, relative to their size; 0 means to the bit. Logits are those of the
    tokens from `begin` on."""
    if isinstance(expected, dict):
        holds(law, got.keys() == expected.keys(), f"the state has keys {sorted(got)}, not {sorted(expected)}{when}")
        for k in expected:
            agree(law, got[k], expected[k], tolerance, f"state['{k}']", when)
        return
    shape = lambda x: f"{tuple(x.shape)} {str(x.dtype)[6:]}"
    holds(law, shape(got) == shape(expected), f"{name} is {shape(got)}, not {shape(expected)}{when}")
    if not got.numel():
        return
    far = (got.double() - expected.double()).abs()
    wrong = ~(far <= tolerance * (1 + expected.double().abs().max()))          # a NaN is wrong too
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        worst = far.nan_to_num(torch.inf).max().item()
        nan = ", ".join(f"{n} in {w}" for w, x in (("this one", got), ("the expected one", expected))
                        if (n := int(x.isnan().sum()))) or "none"
        raise AssertionError(broken(law, (
            f"{name} differs{when}.\n  First at {place(name, first, begin)}: {got[tuple(first)].item():.6g}, expected "
            f"{expected[tuple(first)].item():.6g}.\n  {int(wrong.sum())} of {wrong.numel()} numbers differ, by at most "
            f"{worst:.3g}. NaN: {nan}.")))


def stands_alone(state, when):
    for k, v in state.items():
        holds(1, v.is_contiguous() and v.untyped_storage().nbytes() == v.nbytes,
              f"{when} state['{k}'] keeps {v.untyped_storage().nbytes()} bytes and holds {v.nbytes}")


# law 1

@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_the_state_is_a_flat_dict_of_fixed_shape(model, dtype):
    state = first = model.init_state(3)
    for i, x in enumerate(text(B=3).split(S, 1)):
        with stream.precision(model, dtype):
            _, state = model(x, state)
        holds(1, list(state) == list(first), f"after segment {i} the keys are {list(state)}, not {list(first)} (in "
                                             "another order, the compiler would make another graph)")
        for k, v in state.items():
            same = v.shape == first[k].shape and v.dtype == first[k].dtype and len(v) == 3
            holds(1, same, f"after segment {i} state['{k}'] is {tuple(v.shape)} {v.dtype}, "
                           f"in init_state it is {tuple(first[k].shape)} {first[k].dtype}")
        stands_alone(state, f"after segment {i}")


# law 2

@torch.no_grad()
@pytest.mark.parametrize("cut", [[1] * S, [5, 20, 7], [S - 1, 1], [S]], ids=["ones", "5+20+7", "31+1", "whole"])
def test_any_cut_of_a_segment_gives_the_single_call(model, cut):
    state = model.init_state(2)
    for i, x in enumerate(text().split(S, 1)):
        (logits, after), kept = model(x, state), {k: v.clone() for k, v in state.items()}
        cache, parts = model.read(state), []
        for part in x.split(cut, 1):
            y, cache = model.extend(part, cache)
            parts.append(y)
        when = f" in segment {i}, cut into calls of {cut if len(set(cut)) > 1 else cut[0]} tokens"
        agree(2, torch.cat(parts, 1), logits, when=when, begin=i * S)
        before, state = state, model.write(cache, state)
        agree(2, state, after, when=when)
        agree(4, before, kept, 0, when=f": read, extend or write changed it{when}")
        stands_alone(state, f"after write{when}")


@torch.no_grad()
def test_a_reader_predicts_what_the_loop_predicts(model):
    tokens = text()
    logits, state = run(model, tokens)
    reader, t = stream.Reader(model, B=2), 0
    for n in (1, 3, S - 4, S + 7, 2, S - 9):
        t += n
        when = f" after {t} tokens of a Reader"
        agree(2, reader(tokens[:, t - n:t])[:, None], logits[:, t - 1:t], when=when, begin=t - 1)
    assert reader.count == t == 3 * S
    agree(2, reader.state, state, when=" of a Reader after three segments")


@torch.no_grad()
def test_segments_in_one_call_are_segments_one_after_the_other(model):
    if model.parallel == 1:
        with pytest.raises(AssertionError, match=f"a segment is {S} tokens, got {2 * S}"):
            model(text()[:, :2 * S], model.init_state(2))
        return
    state = after = model.init_state(2)
    for seed in range(2):
        tokens = text(seed=seed)
        logits, state = model(tokens, state)
        expected, after = run(model, tokens, after)
        agree(2, logits, expected, when=" with three segments in one call")
        agree(2, state, after, when=" with three segments in one call")
        assert all(v.is_contiguous() and v.untyped_storage().nbytes() == v.nbytes for v in state.values())


# law 3

@torch.no_grad()
def test_no_token_sees_the_future(model):
    tokens, T = text(B=1), 3 * S
    changed = tokens.repeat(T, 1)                                    # batch element t has another token at position t
    changed[torch.arange(T), torch.arange(T)] = (tokens[0] + 1) % V
    before, after = run(model, tokens.repeat(T, 1))[0], run(model, changed)[0]
    moved = (before - after).abs().amax(-1) > 1e-6                   # (changed token, logit)
    for t, i in moved.tril(-1).nonzero().tolist():
        holds(3, False, f"the token at segment {t // S}, position {t % S} changes the logit at segment {i // S}, "
                        f"position {i % S}, {t - i} before it, by {(before - after)[t, i].abs().max():.3g}")
    deaf = (~moved.diagonal()).nonzero().flatten().tolist()
    holds(3, not deaf, f"the tokens at {deaf[:9]} do not even change their own logits")


# law 4

@torch.no_grad()
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_state_is_the_only_channel(name, training):
    """After so many segments that every memory is full."""
    small = dict(hmt=dict(bank=4), hmt_split=dict(bank=4), memoryllm=dict(slots=32), mplus=dict(slots=32, store=32))
    model = tiny(name, **small.get(name, {})).train(training)
    tokens = text(B=3, K=10)
    _, state = run(model, tokens)
    kept = {k: v.clone() for k, v in state.items()}
    x = tokens[:, :S]
    one, two = model(x, state), model(x, state)
    agree(4, state, kept, 0, when=": forward changed its input state")
    agree(4, two[0], one[0], 0, when=" when the same call is made twice")
    agree(4, two[1], one[1], 0, when=" when the same call is made twice")
    for elements in ([1], [2, 0, 1], [0, 2]):
        logits, after = model(x[elements], {k: v[elements] for k, v in state.items()})
        when = f" when the batch is made of elements {elements} of 0, 1, 2"
        agree(4, logits, one[0][elements], when=when)
        agree(4, after, {k: v[elements] for k, v in one[1].items()}, when=when)


@torch.no_grad()
def test_a_document_gives_the_same_memory_in_any_batch(model):
    tokens = text(B=4)
    logits, state = run(model, tokens)
    for elements in ([3], [2, 0]):
        alone = run(model, tokens[elements])
        agree(4, alone[0], logits[elements], when=f" when elements {elements} are a batch of their own from the start")
        agree(4, alone[1], {k: v[elements] for k, v in state.items()}, when=f" when elements {elements} are a batch")


@torch.no_grad()
def test_a_fresh_element_starts_from_nothing_and_the_others_go_on(model):
    tokens = text(B=2)
    _, state = run(model, tokens)
    mixed = stream.reset(model, state, torch.tensor([True, False]))
    new, on = model(tokens[:, :S], model.init_state(2)), model(tokens[:, :S], state)
    both = model(tokens[:, :S], mixed)
    when = " after stream.reset of element 0"
    agree(4, both[0], torch.stack([new[0][0], on[0][1]]), when=when)
    agree(4, both[1], {k: torch.stack([new[1][k][0], on[1][k][1]]) for k in state}, when=when)


# law 5

@torch.no_grad()
def test_the_past_matters(model, name):
    moved = (run(model, text())[0] - run(model, change(text(), 5))[0])[:, S:].abs().max()
    if name == "gpt":
        holds(5, moved == 0, f"gpt has no memory, and a token of segment 0 moves later segments by {moved:.3g}")
    else:
        holds(5, moved > 1e-5, f"another token in segment 0 moves the logits of segments 1 and 2 by {moved:.3g} only")


def test_gradient_reaches_every_parameter(model):
    tokens = text()
    stream.bptt(model, stream.make_step(model), tokens, tokens.roll(-1, 1), model.init_state(2), 0.01)
    none = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    holds(5, not none, f"no gradient in three segments for {', '.join(none)}")


# law 6

def test_replay_gives_the_gradients_of_bptt(model):
    """Those of the parameters, and of every tensor of a state that is carried over."""
    model.double()
    tokens, fresh, found = text(K=4), torch.tensor([True, False]), []
    carried = {k: v.double() if v.is_floating_point() else v
               for k, v in stream.detach(run(model, tokens)[1]).items()}
    for way in (stream.bptt, stream.replay):
        model.zero_grad()
        leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in carried.items()}
        begin = stream.reset(model, leaves, fresh)
        loss, state = way(model, stream.make_step(model), tokens, tokens.roll(-1, 1), begin, 1 / tokens.numel())
        found.append((loss, state, {n: p.grad for n, p in model.named_parameters()},
                      {k: v.grad for k, v in leaves.items() if v.grad is not None}))
    (loss, state, grad, grad_in), (loss2, state2, grad2, grad_in2) = found
    holds(6, torch.allclose(loss, loss2, rtol=1e-6), f"the loss of replay is {loss2}, of back-propagation {loss}")
    agree(6, state2, state, 1e-5, when=" after replay")
    for n in grad:
        far = (grad[n] - grad2[n]).norm() / grad[n].norm()
        holds(6, far <= 1e-5, f"the gradient of {n} differs by {far:.3g} of its norm")
    holds(6, grad_in.keys() == grad_in2.keys(), f"gradient reaches {[*grad_in2]} of the state, not {[*grad_in]}")
    for k in grad_in:
        far, norm = (grad_in[k] - grad_in2[k]).norm(), grad_in[k].norm()
        holds(6, far <= 1e-5 * norm, f"the gradient of the first state['{k}'] differs by {far:.3g}, it is {norm:.3g}")


def test_a_loss_of_the_mechanism_itself_counts_in_both():
    """`aux` (B,) in the state: its mean joins the loss of its segment, and its gradient goes through the memory too."""
    class WithAux(nanomem.model_class("rmt")):
        def init_state(self, B):
            return dict(super().init_state(B), aux=torch.zeros(B))

        def forward(self, tokens, state):
            logits, out = super().forward(tokens, state)
            return logits, dict(out, aux=(out["mem"] - self.mem).pow(4).mean((1, 2)))
    torch.manual_seed(0)
    model, tokens, grads = WithAux(nanomem.build("rmt", **TINY).c), text(), []
    for way in (stream.bptt, stream.replay):
        model.zero_grad()
        way(model, stream.make_step(model), tokens, tokens, model.init_state(2), 1 / tokens.numel())
        grads.append([p.grad for p in model.parameters()])
    model.zero_grad()
    state, goal = model.init_state(2), 0
    for x in tokens.split(S, 1):
        logits, state = model(x, state)
        goal = goal + torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten()) / 3 + state["aux"].mean() / 3
    goal.backward()
    for one, two, p in zip(*grads, model.parameters()):
        assert close(one, p.grad, 1e-5) and close(two, p.grad, 1e-5)


# law 7

@torch.no_grad()
def test_memory_off_is_gpt_to_the_bit(name):
    if name in ("mamba", "deltanet"):
        pytest.skip(f"{name} has no attention: with its state switched off, nothing of GPT would mix tokens")
    if name not in OFF and not hasattr(own := sys.modules[nanomem.model_class(name).__module__], "OFF"):
        pytest.skip(f"{name} does not say how its memory is switched off: it needs a line like OFF = dict(mem=0)")
    settings = OFF[name] if name in OFF else own.OFF
    off, gpt = tiny(name, **settings), tiny("gpt")
    gpt.load_state_dict(off.state_dict(), strict=False)
    rounding = 1e-5 if name == "landmark" else 0                               # its softmax is not the fused one
    agree(7, run(off, text())[0], run(gpt, text())[0], rounding, when=f" from that of gpt with {settings}")
    x, parts, cache = text(K=1), [], off.read(off.init_state(2))
    for part in x.split(5, 1):
        logits, cache = off.extend(part, cache)
        parts.append(logits)
    agree(7, torch.cat(parts, 1), run(gpt, x)[0], when=f" from that of gpt, five tokens at a time, with {settings}")
    torch.manual_seed(5)
    weights = nanomem.build(name, **TINY, **settings).head.weight
    torch.manual_seed(5)
    agree(7, weights, nanomem.build("gpt", **TINY).head.weight, 0, "head.weight", " from gpt's with the same seed")


# law 8: one graph; that training needs at most two graphs is in test_train.py

def test_a_step_of_training_and_of_decoding_run_without_looking_at_a_number(model):
    """On device=meta no tensor has values: whatever is made on another device, or waits for a value, fails."""
    meta = model.to("meta")
    tokens = torch.zeros(2, 3 * S, dtype=torch.long, device="meta")
    for way in (stream.bptt, stream.replay):
        begin = stream.reset(meta, meta.init_state(2), torch.zeros(2, dtype=torch.bool, device="meta"))
        loss, _ = way(meta, stream.make_step(meta), tokens, tokens, begin, 0.01)
        assert loss.is_meta
    assert all(p.grad.is_meta for p in meta.parameters())
    nn.utils.clip_grad_norm_(meta.parameters(), 1.0)
    reader = stream.Reader(meta, B=2)
    assert reader(tokens[:, :2 * S - 2]).is_meta                     # a segment and more, then one token at a time:
    for t in range(4):                                               # to the end of a segment, and on in the next one
        assert reader(tokens[:, t:t + 1]).is_meta


# law 9

@torch.no_grad()
def test_a_saved_memory_goes_on(model, tmp_path):
    tokens, end = text(B=1)[:, :2 * S + 5], text(B=1, seed=1)[:, :S]
    for n in (2 * S + 5, 2 * S):                                     # in the middle of a segment, and between two
        reader = stream.Reader(model)
        reader(tokens[:, :n])
        for k, v in dict(reader.state, logits=reader.logits, tokens=reader.tokens).items():
            holds(9, v.untyped_storage().nbytes() == v.nbytes, f"{k} saves more bytes than it holds")
        reader.save(tmp_path / "memory.pt")
        loaded = stream.Reader(model)
        loaded.load(tmp_path / "memory.pt")
        assert torch.equal(loaded.logits, reader.logits) and loaded.count == n
        agree(9, loaded(end)[:, None], reader(end)[:, None], when=f" after {n} tokens, a save and a load")


def test_a_memory_of_other_weights_is_refused(model, name, tmp_path):
    reader = stream.Reader(model)
    reader(text(B=1))
    reader.save(tmp_path / "memory.pt")
    with pytest.raises(UserError, match="other weights"):
        stream.Reader(tiny(name, seed=1)).load(tmp_path / "memory.pt")


# law 10

@pytest.mark.slow
def test_it_learns_to_recall_what_the_segment_before_said(name, tmp_path):
    """Two pairs in segments of 16 tokens; chance is 3%. The weakest has 35% after these 100 steps."""
    train.main([*bench.flags_of(bench.Bench(), Job("recall2", name, 1)), f"--out={tmp_path}"])
    (T, task), = TASKS["recall2"].tests.items()
    found = measure.accuracy(nanomem.load(tmp_path / "last.pt")[0].eval(), task, T, 256, edges=(16, 32))
    right = found[0]["accuracy"]
    if name == "gpt":
        holds(10, right < 0.1, f"gpt has no memory and answers {right:.0%} of what the segment before said")
    else:
        holds(10, right > 0.2, f"it answers {right:.0%} of what the segment before said")


# building

def test_any_size_builds_with_settings_derived(name):
    for fields in (dict(layers=1, heads=1, width=4, seg=1, vocab=2), dict(layers=3, heads=5, width=40, seg=7), {}):
        model = nanomem.build(name, **fields)
        logits, _ = model(torch.zeros(2, model.c.seg, dtype=torch.long), model.init_state(2))
        assert logits.shape == (2, model.c.seg, model.c.vocab)


@pytest.mark.parametrize("asked, fields, hint", [
    ("rtm", {}, "did you mean rmt"), ("xl", dict(windwo=3), "did you mean window"),
    ("gpt", dict(mem=3), "no field mem"), ("rmt", dict(heads=0), "heads must be positive, got 0"),
    ("gpt", dict(width=24, heads=4), "width 24 does not split into 4 heads"), ("rmt", dict(mem=-2), "got -2"),
    ("gpt", dict(seg=0), "seg must be positive, got 0"), ("window", dict(window=0), "window > 0, got 0")])
def test_a_wrong_name_field_or_setting_is_refused_with_the_reason(asked, fields, hint):
    with pytest.raises(UserError, match=hint):
        nanomem.build(asked, **fields)


def test_a_segment_of_the_wrong_length_is_refused(model):
    with pytest.raises(AssertionError, match=f"segment is {S} tokens, got {S - 1}"):
        model(text()[:, :S - 1], model.init_state(2))


# the laws teach

def fails(law, test, *args):
    with pytest.raises(AssertionError) as failure:
        test(*args)
    message = str(failure.value)
    assert f"Law {law}, {LAWS[law][0]}" in message and "Usual causes:" in message
    return message


def test_a_broken_law_says_which_it_is_and_where(monkeypatch):
    rmt = nanomem.model_class("rmt")
    shift = lambda self, tokens, state: (lambda y, s: (y.roll(-1, 1), s))(*rmt.forward(self, tokens, state))
    grow = lambda self, tokens, state: (lambda y, s: (y, dict(s, mem=torch.cat([s["mem"]] * 2, 1))))(
        *rmt.forward(self, tokens, state))
    def broken_model(forward, **more):
        model = tiny("rmt")
        model.__class__ = type("Broken", (rmt,), dict(forward=forward, **more))
        return model
    message = fails(3, test_no_token_sees_the_future, broken_model(shift))
    assert "the token at segment 0, position 1 changes the logit at segment 0, position 0, 1 before it" in message
    message = fails(2, test_any_cut_of_a_segment_gives_the_single_call, broken_model(shift), [S])
    assert "logits differs in segment 0" in message and "batch element 0, segment 0, position 0" in message

    def later(self, tokens, state):                                            # a fault that only segment 1 has
        logits, after = rmt.forward(self, tokens, state)
        return logits + (state["ids"][:, :1, None] >= 0), after
    message = fails(2, test_any_cut_of_a_segment_gives_the_single_call, broken_model(later), [S])
    assert "logits differs in segment 1" in message and "batch element 0, segment 1, position 0" in message
    view = lambda self, cache, state: (lambda s: dict(s, ids=torch.cat([s["ids"]] * 2, 1)[:, :4]))(
        rmt.write(self, cache, state))
    message = fails(1, test_any_cut_of_a_segment_gives_the_single_call, broken_model(rmt.forward, write=view), [S])
    assert "state['ids'] keeps" in message
    message = fails(1, test_the_state_is_a_flat_dict_of_fixed_shape, broken_model(grow), torch.float32)
    assert "state['mem'] is (3, 8, 32)" in message
