"""Landmark attention: the paper's grouped softmax in loops, blocks that are retrieved, and what a landmark hides."""
import math

import pytest
import torch

import nanomem
from nanomem.cli import UserError
from nanomem.models.gpt import norm, rope
from nanomem.models.landmark import share_out

from conftest import S, TINY, close, run, text, tiny

L, N = 8, S // 8   # tokens in a block, and blocks in a segment, of a TINY model


def landmark(**fields):
    return tiny("landmark", **{"block": L, **fields}).eval()


def memory(model, n, seed=0):
    """A state of noise, as after n blocks."""
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) if v.is_floating_point() else torch.full_like(v, n)
            for k, v in model.init_state(2).items()}


def weights(q, k, place, is_landmark):
    """Section 3.1 of the paper in loops, for one head: queries and keys (n, D) of tokens and landmarks in the order of
    the text, place[i] the index p_i of the landmark of i's block (n where the block is open)."""
    n, D = q.shape
    w = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        seen = range(i + 1)
        group = {}
        for j in seen:
            if not is_landmark[j]:
                group[j] = place[j]                                            # a token: with those of its block
            else:
                group[j] = -1 if place[i] == j else place[i]                   # a landmark: with i's own block
        score = {j: math.exp(q[i] @ k[j] / D ** 0.5) for j in seen}
        total = lambda g: sum(score[j] for j in seen if group[j] == g)
        soft = {j: score[j] / total(group[j]) for j in seen}                   # eq. 1
        for j in seen:
            if not is_landmark[j]:
                w[i, j] = soft[j] if group[j] == place[i] else soft[j] * soft[place[j]]
        assert abs(w[i].sum() - 1) < 1e-9
    return w


@torch.no_grad()
def test_attention_in_a_segment_is_the_grouped_softmax_of_the_paper():
    model = landmark(shift=False).double()
    attention, T = model.blocks[0].attention, S - 3                            # the last block stays open
    n = T // L
    x = torch.randn(1, T + n, TINY["width"], generator=torch.Generator().manual_seed(0), dtype=torch.double)
    position = torch.cat([torch.arange(T), torch.arange(n) * L + L - 1])
    order = sorted(range(T + n), key=lambda i: (position[i].item(), i))        # as in the text
    marks = [i >= T for i in order]
    place = [next((m for m in range(i, T + n) if marks[m]), T + n) for i in range(T + n)]
    angles, state = rope(position, 16), {k: v.double() if v.is_floating_point() else v
                                         for k, v in model.init_state(1).items()}
    y, _ = attention(x, angles, model.read(state)[0], (T, position))
    q, (k, v) = attention.queries(x, angles), attention.keys_values(x, angles)
    expected = torch.empty(1, T + n, 2, 16, dtype=torch.double)
    for h in range(2):
        w = weights(q[0, h, order], k[0, h, order], place, marks)
        expected[0, order, h] = w @ v[0, h, order]
    assert torch.allclose(y, attention.out(expected.flatten(2)), atol=1e-6)    # angles are float32


def test_the_tokens_of_a_block_share_the_weight_of_its_landmark():
    weight, score = torch.rand(3, 5).double(), torch.randn(3, 5, L).double()
    shares = share_out(weight, score).unflatten(-1, (5, L))
    assert torch.allclose(shares.sum(-1), weight)
    assert torch.allclose(shares / shares[..., :1], (score - score[..., :1]).exp())


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_if_all_blocks_are_retrieved_segments_are_one_text(chunks):
    """The full grouped softmax over 6 segments, and the same with what lies before a segment in the bank."""
    tokens, found = text(K=6), []
    for seg in (chunks * S, 6 * S):
        model = landmark(seg=seg, topk=6 * N, bank=6 * N, shift=False)
        found.append(run(model, tokens)[0])
    assert close(*found)


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 3, 10, 37])
def test_each_query_and_head_gets_the_k_best_blocks_fetched_or_from_the_whole_bank(n):
    model, k, D = landmark(topk=3, bank=10), 3, 16
    cache = model.read(memory(model, n))[0]
    q = torch.randn(2, 2, 6, D)
    mark, far, v, picks = model.blocks[0].attention.retrieve(q, cache)         # 18 picks: the whole bank
    assert mark.shape == (2, 2, 6, 10) and far.shape == (2, 2, 6, 10, L) and v.shape == (2, 2, 1, 10 * L, D)
    kept = min(n, 10)
    for t in range(6):
        few_mark, few, own, same = model.blocks[0].attention.retrieve(q[:, :, t:t + 1], cache)   # 3 picks: fetched
        assert few_mark.shape == (2, 2, 1, k) and few.shape == (2, 2, 1, k, L) and own.shape == (2, 2, 1, k * L, D)
        answer = torch.einsum("bhtp,bhtpd->bhtd", share_out(few_mark.exp(), few), own)[:, :, 0]
        assert close(answer, share_out(mark.exp(), far)[:, :, t:t + 1].matmul(v[:, :, 0])[:, :, 0], 1e-5)
        for b in range(2):
            for h in range(2):
                score = cache["old"][b, h] @ q[b, h, t]
                best = sorted(range(10 - kept, 10), key=lambda m: -score[m])[:k]
                total = torch.zeros(10).index_put((torch.tensor(best, dtype=torch.long),), score[best].exp())
                assert close(mark[b, h, t].exp(), total, 1e-5)
                assert sorted(picks[b, h, t][:len(best)].tolist()) == sorted(best)
                assert sorted(same[b, h, 0][few_mark[b, h, 0] > -torch.inf].tolist()) == sorted(best)


@torch.no_grad()
def test_a_landmark_of_weight_0_hides_its_block():
    model = landmark(topk=10, bank=10)
    x, position = torch.randn(2, 1, TINY["width"]), torch.arange(1)
    attention, cache = model.blocks[0].attention, model.read(memory(model, 10))[0]
    changed = dict(cache, bank=cache["bank"].clone())
    changed["bank"][:, :, 6] += 1
    look = lambda cache: attention(x, rope(position, 16), cache, (1, position))[0]
    assert not close(look(changed), look(cache), 1e-3)
    q = attention.queries(x, rope(position, 16))                               # (B, H, 1, D)
    for c in (cache, changed):
        c["old"] = c["old"].clone()
        c["old"][:, :, 6] = -100 * q[:, :, 0]                                  # exp(score) is 0
    assert torch.equal(look(changed), look(cache))


@torch.no_grad()
def test_old_blocks_may_lie_anywhere_in_the_bank():
    """All but the newest k + 1 stand at the same place. Only their landmarks and their tokens count."""
    model, x = landmark(topk=2, bank=12), text(K=1)
    state = memory(model, 12)
    state["landmark"] *= 10                                                    # no two of which are close
    order = torch.cat([torch.randperm(9), torch.arange(9, 12)])
    mixed = lambda *names: dict(state, **{name: state[name][:, :, :, order] for name in names})
    assert close(model(x, mixed("landmark", "bank"))[0], model(x, state)[0])
    assert not close(model(x, mixed("landmark"))[0], model(x, state)[0], 1e-3)


@torch.no_grad()
def test_the_bank_holds_the_newest_blocks_with_keys_that_count_from_their_own_beginning():
    """The same block at two places of a segment, seen by the first layer, is the same in the bank."""
    model = landmark(bank=6, shift=False)
    block = text()[:, :L]
    state = run(model, torch.cat([text(seed=1), block, text()[:, L:3 * L], block], 1))[1]
    bank, mark = state["bank"][:, 0], state["landmark"][:, 0]
    assert state["n"].tolist() == [4 * N, 4 * N]
    assert close(bank[:, :, -1], bank[:, :, -4]) and close(mark[:, :, -1], mark[:, :, -4])
    assert not close(bank[:, :, -1], bank[:, :, -3], 1e-2)
    k, v = bank[:, :, -1].chunk(2, -1)
    expected = model.blocks[0].attention.keys_values(norm(model.embed(block)), rope(torch.arange(L), 16))
    assert close(k, expected[0]) and close(v, expected[1])


def test_the_bank_may_lie_in_the_memory_of_the_cpu():
    model = nanomem.build("landmark", **TINY, host=True).to("meta")
    assert [name for name, x in model.init_state(2).items() if not x.is_meta] == ["bank"]


@torch.no_grad()
def test_a_bank_can_grow_after_training_and_then_reaches_further_back():
    tokens, other = text(K=6), text(K=6)
    other[:, :L] = (other[:, :L] + 1) % TINY["vocab"]
    moved = []
    for bank in (4 * N, 6 * N):
        model = landmark(topk=4 * N, bank=bank, layers=1)
        moved.append((run(model, tokens)[0] - run(model, other)[0])[:, 5 * S:].abs().max().item())
    assert moved[0] == 0 and moved[1] > 1e-5


@pytest.mark.parametrize("fields, why", [
    (dict(block=5), "32 tokens is no whole number of blocks of 5"), (dict(block=0), "block counts tokens, got 0"),
    (dict(bank=3), "bank of 3 blocks cannot hold the 4 that are retrieved"),
    (dict(topk=-1), "topk counts blocks, got -1")])
def test_settings_that_cannot_be_are_refused(fields, why):
    with pytest.raises(UserError, match=why):
        nanomem.build("landmark", **TINY, **fields)


@torch.no_grad()
@pytest.mark.parametrize("bank", [N, 2 * N])                                   # all of it is retrieved, or half
def test_the_cache_says_which_blocks_each_token_looked_at_and_how_much(bank):
    """With a bank for all blocks of the past, all are looked at; their shares and what stays in the segment make 1."""
    model, tokens = landmark(topk=N, bank=bank), text(B=2, K=2)
    state = run(model, tokens[:, :S])[1]
    cache = model.extend(tokens[:, S:], model.read(state))[1]
    spans, share = model.retrieved(cache)
    L_H = model.c.layers * model.c.heads
    assert spans.shape == (2, S, L_H * N, 2) and share.shape == spans.shape[:3]
    for t in (0, 5, S - 1):
        assert sorted(map(tuple, spans[1, t].tolist())) == sorted([(m * L, m * L + L) for m in range(N)] * L_H)
    assert (share > 0).all() and (share.sum(2) < 1).all()
    one_by_one = model.read(state)
    for part in tokens[:, S:].split([1, 2, S - 3], 1):
        one_by_one = model.extend(part, one_by_one)[1]
    for few, many in zip(model.retrieved(one_by_one), (spans, share)):
        assert close(few.sort(2)[0], many.sort(2)[0])
    assert (model.retrieved(model.extend(tokens[:, :S], model.read(model.init_state(2)))[1])[0] == -1).all()
