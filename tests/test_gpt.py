"""The GPT under all models: its building blocks, and the whole of it as a loop over heads, queries and keys."""
import itertools
import math

import pytest
import torch

import nanomem
from nanomem.models.gpt import norm, rope, rotate, with_previous

from conftest import S, TINY, close, text, tiny


@torch.no_grad()
def test_the_model_is_a_loop_over_layers_heads_queries_and_keys():
    model, tokens = tiny("gpt").double(), text(B=1, K=1)
    unit = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()
    turned = lambda x, t: rotate(x[t:t + 1], rope(torch.tensor([t]), D))[0]
    D, half = model.c.head_dim, model.c.head_dim // 2
    x = unit(model.embedding(tokens[0]))                                       # (S, C)
    for block in model.blocks:
        h, y, attention = unit(x), torch.zeros_like(x), block.attention
        for head in range(model.c.heads):
            part = slice(head * D, (head + 1) * D)
            q, k, v = (linear(h)[:, part] for linear in (attention.q, attention.k, attention.v))
            own = [turned(unit(k), t) for t in range(S)]
            keys = [torch.cat([own[t][:half], own[t - 1][half:] if t else torch.zeros(half)]) for t in range(S)]
            for t in range(S):
                query = attention.gain[head] * turned(unit(q), t)
                w = torch.stack([query @ keys[j] / math.sqrt(D) for j in range(t + 1)]).softmax(0)
                y[t, part] = w.flatten() @ v[:t + 1]
        x = x + attention.out(y)
        x = x + block.mlp.out(block.mlp.up(unit(x)).clamp(min=0).square())
    assert close(model(tokens, {})[0][0], model.head(unit(x)), 1e-5)


@torch.no_grad()
def test_a_score_depends_on_the_distance_of_query_and_key_alone():
    attention, x = tiny("gpt").blocks[0].attention, torch.randn(1, 2, TINY["width"])
    scores = []
    for first in (0, 5, 100):
        at = lambda t: rope(torch.tensor([t]), 16)
        q, (k, _) = attention.queries(x[:, 1:], at(first + 7)), attention.keys_values(x[:, :1], at(first))
        scores.append(q @ k.mT)
    assert close(scores[0], scores[1]) and close(scores[0], scores[2])
    assert not close(attention.queries(x[:, 1:], at(8)) @ attention.keys_values(x[:, :1], at(0))[0].mT, scores[0])


def test_at_the_start_an_mlp_adds_nothing_and_attention_does():
    for block in nanomem.build("gpt", **TINY).blocks:
        assert not block.mlp.out.weight.any() and block.attention.out.weight.any()


def test_rotations_add_up():
    x = torch.randn(2, 3, 8, 16, dtype=torch.double)
    by = lambda n: rope(torch.full((1,), n), 16)
    assert torch.allclose(rotate(rotate(x, by(7)), by(-3)), rotate(x, by(4)), atol=1e-5)
    assert torch.allclose(rotate(x, by(5)).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rope_multiplies_each_pair_with_a_rotation_matrix(dtype):
    x, D, near = torch.randn(2, 3, 5, 16, dtype=dtype), 16, 4 * max(torch.finfo(dtype).eps, 1e-6)
    slow = x.double().clone()
    for t, i in itertools.product(range(5), range(D // 2)):
        theta = (3 + t) / 10_000 ** (2 * i / D)
        matrix = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]]).double()
        slow[..., t, 2 * i:2 * i + 2] = slow[..., t, 2 * i:2 * i + 2] @ matrix.T
    y = rotate(x, rope(torch.arange(3, 8), D))
    assert y.dtype == dtype and torch.allclose(y.double(), slow, rtol=near, atol=near)


def test_norm_keeps_type_and_zero():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 16, dtype=dtype)
        assert norm(x).dtype == dtype and norm(0 * x).eq(0).all()
        assert torch.allclose(norm(x).double().square().mean(-1), torch.ones(2, 3).double(), atol=0.02)


def test_a_key_knows_the_token_before_it():
    """The second half of its channels, the slow ones, are those of the key one position earlier."""
    k = torch.randn(2, 3, 5, 8)
    shifted = with_previous(k)
    for p in range(5):
        assert torch.equal(shifted[:, :, p, :4], k[:, :, p, :4])
        assert torch.equal(shifted[:, :, p, 4:], k[:, :, p - 1, 4:] if p else torch.zeros(2, 3, 4))
