"""cost.py: bytes, operations, and the race, on tiny models."""
import torch

import nanomem
from nanomem import cost, data, stream
from nanomem.footprint import LiveBytes
from nanomem.measure import parameters

from conftest import tiny


def test_replay_holds_one_segment_however_many_there_are(name):
    """Peak bytes of a step: flat in K for replay but for states and tokens, growing for back-propagation."""
    def peak(backward, K):
        step = cost.training_step(tiny(name, seg=16, layers=1), 2, K, backward)
        step()
        with LiveBytes() as live:
            step()
        return live.peak
    assert peak(stream.bptt, 16) > 2 * peak(stream.bptt, 4)
    model = tiny(name, seg=16, layers=1)
    kept = 2 * (stream.nbytes(model.init_state(1)) + 8 * model.c.seg)     # of 2 texts, for a segment: state and tokens
    assert peak(stream.replay, 16) - peak(stream.replay, 4) <= 12 * kept * 1.1


def test_replay_and_checkpoints_need_one_segment_and_bptt_all():
    found = cost.replay(tiny("memformer", mem=4, layers=1, vocab=640), (2, 4, 16), rounds=1)
    peak = {way: [x["peak"] for x in rows] for way, rows in found.items()}
    assert [x["K"] for x in found["bptt"]] == [2, 4, 16] and all(x["ms"] > 0 for r in found.values() for x in r)
    assert peak["bptt"][-1] > 3 * peak["bptt"][1]
    assert peak["replay"][-1] < 1.05 * peak["replay"][1] and peak["checkpointed"][-1] < 1.05 * peak["checkpointed"][1]


def test_nanogpts_model_is_as_large_as_gpt():
    c = nanomem.build("gpt").c
    gpt, other = nanomem.build("gpt"), cost.NanoGPT(c)
    assert other(torch.zeros(2, c.seg, dtype=torch.long), {})[0].shape == (2, c.seg, c.vocab)
    n = parameters(gpt)
    assert abs(n - gpt.head.weight.numel() - parameters(other)) < 0.05 * n      # it ties its head
    assert other.to("meta").scored().device.type == "meta"


def test_what_is_held_does_not_grow_with_the_text():
    found = cost.cost(tiny("rmt", seg=16), 2, 2, (64, 512))
    few, many = found["reading"]
    assert (few["after"], many["after"]) == (64, 512) and few["held"] == many["held"] > 0
    assert found["state_bytes"] > 0 and found["speed_over_nanogpt"] > 0 and found["decode_growth"] > 0
    assert cost.cost(tiny("gpt", seg=16), 2, 2, (64,))["state_bytes"] == 0
    assert [x["after"] for x in cost.cost(tiny("gpt", seg=48), 1, 1, (16, 32, 64))["reading"]] == [48, 96]
    assert 0 < found["share_of_product"] < 1.5 and found["training_peak"] > 4 * found["parameters"]


def test_the_operations_of_a_step_are_those_of_the_weights_and_of_attention():
    """6 for each weight of a matrix and token, and 12 C S for each layer and token (2001.08361, section 2.1)."""
    model, B, K = tiny("gpt"), 3, 2
    c, weights = model.c, sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
    each = 6 * (weights - model.embedding.weight.numel()) + 12 * c.layers * c.seg * c.width
    assert cost.operations(model, B, K) == B * K * c.seg * each


def test_a_race_gives_both_sides_the_same_tokens_and_its_ratios_agree():
    enc = data.tokenizer("bytes")
    books = data.from_texts(enc, [(str(i), "the whale and the sea " * 60) for i in range(4)])
    model = nanomem.build("gpt", vocab=320, layers=1, heads=2, width=32, seg=16)
    found = cost.race(model, books, books, steps=30, batch=4, segments=2, rates=(1e-6, 4e-3), checks=6)
    last = found["steps"][-1]
    assert last["tokens"] == 30 * 4 * 2 * 16 and found["steps"][0]["ours"][1] > last["ours"][1] < 4
    assert last["nanogpt"][1] == found["rates"]["0.004"] < found["rates"]["1e-06"]       # the best rate counts
    assert found["tokens_over"] == last["nanogpt"][0] / last["ours"][0]
    assert last["ours"][1] > last["nanogpt"][1] or found["time_over"] <= last["ours"][0] / last["nanogpt"][0] + 1e-9
