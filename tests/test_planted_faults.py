"""The tests are the grader, so they are graded: a fault is planted in a model, and a test must find it.

A fault is a replacement in the source of a model. It is found if a law or a property fails, of which the last entry says
the name: a reader of the failure must be led to the fault.
"""
from pathlib import Path

import pytest

import nanomem
from nanomem import grade

HERE = Path(nanomem.__file__).parent

FAULTS = [    # model, what stands there, what is put there
    # gpt
    ("gpt", "rope(torch.arange(P, P + x.size(1)", "rope(torch.arange(0, x.size(1)"),
    ("gpt", ".tril(P)", ".tril(P + 1)"),
    ("gpt", ".tril(P)", ".tril(P - 1)"),
    ("gpt", "F.pad(slow, (0, 0, 1, -1))", "F.pad(slow, (0, 0, -1, 1))"),
    ("gpt", "a * sin + b * cos", "b * cos - a * sin"),
    ("gpt", "rotate(norm(k), rope)", "rotate(k, rope)"),
    ("gpt", "(rotate(norm(q), rope) * self.gain)", "rotate(norm(q), rope)"),
    ("gpt", "torch.cat([old, new.type_as(old)], 2)", "torch.cat([new.type_as(old), old], 2)"),
    ("gpt", "return x + self.mlp(norm(x)), kv", "return self.mlp(norm(x)), kv"),
    ("gpt", "is_causal=mask is None and P == 0", "is_causal=mask is None"),
    ("gpt", "10_000 ** (-torch.arange", "10_000 ** (torch.arange"),
    ("gpt", "return self.out(h * F.relu(h))", "return self.out(F.relu(h))"),
    # xl
    ("xl", "(j <= i) & (j >= first)", "(j <= i + 1) & (j >= first)"),
    ("xl", "c.kept - n.clamp(max=c.W)", "c.kept - n"),
    ("xl", "torch.full((1,), -S", "torch.full((1,), S"),
    ("xl", 'else state["kv"].detach()', 'else state["kv"]'),
    ("xl", "back), v[:, :, S:]]", "back), v[:, :, :-S]]"),
    ("xl", "(j <= i + W)", "(j < i + W)"),
    ("xl", "(n + S).clamp(max=kept)", "(n + S - 1).clamp(max=kept)"),
    ("xl", "position = P - W + torch", "position = P - W + 1 + torch"),
    # rmt
    ("rmt", "ids=ids.clone())", 'ids=state["ids"].clone())'),
    ("rmt", "ids=tokens[:, S - c.k:].clone())", "ids=tokens[:, S - c.k:])"),
    ("rmt", "mem=self.mem.expand", "mem=self.mem.detach().expand"),
    ("rmt", "self.embed(ids.clamp(min=0)) * (ids >= 0)[..., None]", "self.embed(ids.clamp(min=0))"),
    ("rmt", "[:, tokens.size(1):], cache)", "[:, :-tokens.size(1)], cache)"),
    ("rmt", "mem=after.to(mem.dtype, copy=True)", "mem=after.detach().to(mem.dtype, copy=True)"),
    ("rmt", "dict(mem=after.to(mem.dtype, copy=True)", "dict(mem=mem.clone()"),
    # hmt
    ("hmt", "-torch.inf).softmax(-1)", "-torch.inf).softmax(1)"),
    ("hmt", "* c.width ** -0.5", "* c.width ** 0.5"),
    ("hmt", '< c.bank - state["n"]', '<= c.bank - state["n"]'),
    ("hmt", 'state["bank"][:, 1:]', 'state["bank"][:, :-1]'),
    ("hmt", "1))[0][:, -1]  # eq. 1", "1))[0][:, -2]  # eq. 1"),
    ("hmt", "self.key.load_state_dict(self.query.state_dict())", "self.init(self.key)"),
    ("hmt", "count[:self.c.j - 1]", "count[:self.c.j - 2]"),
    ("hmt", "self.mem[None]]).expand", "self.mem[None].detach()]).expand"),
    ("hmt", "seen.size(1) < self.c.j:", "seen.size(1) <= self.c.j:"),
    # memformer
    ("memformer", "(self.c.tau * self.c.head_dim ** 0.5)", "self.c.tau"),
    ("memformer", "** 0.5)).softmax(-1)", "** 0.5)).softmax(-2)"),
    ("memformer", "norm(z + self.v)", "norm(z - self.v)"),
    ("memformer", "norm(z + self.v)", "z + self.v"),
    ("memformer", "w[..., :1] * split_heads(mem", "w[..., :1] * split_heads(self.value(mem)"),
    ("memformer", "reader(norm(x), seen)", "reader(x, seen)"),
    ("memformer", "h = new if h is None else torch.cat([h, new], 1)", "h = new"),
    ("memformer", "ids[:, self.c.seg:].clone()", "ids[:, :self.c.seg].clone()"),
    ("memformer", "with full_precision(h):", "if True:"),
    ("memformer", "causal & (ids >= 0)[:, None, None]", "causal[None, None]"),
    # memoryllm
    ("memoryllm", ".tril(t)", ".tril(t + 1)"),
    ("memoryllm", 'F.pad(state["birth"][:, l] >= 0', 'F.pad(state["birth"][:, l] > 0'),
    ("memoryllm", "torch.arange(end - vectors.size(1), end,", "torch.arange(vectors.size(1),"),
    ("memoryllm", "torch.cat([inputs, x], 1).detach()", "torch.cat([inputs, x], 1)"),
    ("memoryllm", 'state["pool"][:, :, c.N - c.K:].detach()', 'state["pool"][:, :, c.N - c.K:]'),
    ("memoryllm", "block(x + marker,", "block(x,"),
    ("memoryllm", "new.append(x[:, S - c.K:])", "new.append(x[:, :c.K])"),
    ("memoryllm", "step[:, None, None] * c.K + torch", "step[:, None, None] + torch"),
    ("memoryllm", "self.table[step % TABLE]", "self.table[step * 0]"),
    ("memoryllm", "kept.sort()[0]", "kept"),
    # mplus
    ("mplus", ".masked_fill(birth < 0, -1)", ""),
    ("mplus", ".topk(self.c.K0)[1]", ".topk(self.c.K0, largest=False)[1]"),
    ("mplus", "birth.gather(1, best).sort()", "birth.gather(1, best).sort(descending=True)"),
    ("mplus", "oldest < birth, {}", "oldest > birth, {}"),
    ("mplus", "self.f_k(dropped).detach()", "self.f_k(dropped.flip(2)).detach()"),
    ("mplus", "self.move_to_store(dropped.detach(),", "self.move_to_store(dropped,"),
    ("mplus", "-torch.inf).softmax(-1)", "-torch.inf).softmax(-2)"),
    ("mplus", ".to(key.dtype).sigmoid().mean(1)", ".to(key.dtype).mean(1).sigmoid()"),
    ("mplus", "mean(-(1 - s + 1e-5).log(), wrong)", "mean(-(s + 1e-5).log(), wrong)"),
    ("mplus", "self.c.m:].detach()", "self.c.m:]"),
    ("mplus", "> 3 / c.N", "> 1 / c.N"),
    ("mplus", "self.c.m - 1 if self.c.M", "self.c.m - 2 if self.c.M"),
    # mamba
    ("mamba", "(A - A.mT).tril().exp().tril()", "(A - A.mT).exp().tril()"),
    ("mamba", "-dt * self.log_A.exp()", "dt * self.log_A.exp()"),
    ("mamba", "A.exp() * (c @ h.mT)", "(c @ h.mT)"),
    ("mamba", "h = a.exp() * h + dt", "h = h + dt"),
    ("mamba", "line[:, T:]", "line[:, T - 1:-1]"),
    ("mamba", "norm(b), norm(c)", "b, c"),
    ("mamba", "* F.silu(z)", ""),
    ("mamba", "h = end.exp() * h", "h = h"),
    ("mamba", "u + sum(taps[i]", "sum(taps[i]"),
    # deltanet
    ("deltanet", "r = u - b * A.exp()", "r = u + b * A.exp()"),
    ("deltanet", "F.normalize(k, dim=-1)", "F.normalize(k, dim=-2)"),
    ("deltanet", "b.sigmoid().mT", "b.mT"),
    ("deltanet", "o.append(A.exp() * (q @ h.mT)", "o.append((q @ h.mT)"),
    ("deltanet", "F.logsigmoid(-a - self.dt_bias)", "F.logsigmoid(-a + self.dt_bias)"),
    ("deltanet", '(A - A.mT).tril().exp().tril()', '(A - A.mT).exp().tril()'),
    ("deltanet", 'qkv, memory["conv"] = short_conv(', 'qkv, _ = short_conv('),
    ("deltanet", "o = norm(o).transpose", "o = o.transpose"),
    # infini
    ("infini", "total.where(total > 0, 1)", "total"),
    ("infini", "v = v - recall(k, M, z)", "v = v + recall(k, M, z)"),
    ("infini", "gate * memory + (1 - gate) * local", "(1 - gate) * memory + gate * local"),
    ("infini", "z + positive(k).sum(2)", "z + positive(k).mean(2)"),
    ("infini", "recall(q.type_as(M), M, z)", "recall(rotate(q, angles).type_as(M), M, z)"),
    ("infini", "for _, v, k, M, z in cache", "for k, v, _, M, z in cache"),
    ("infini", "return F.elu(x) + 1", "return F.elu(x)"),
    # titans
    ("titans", "min(1, 2 / c.chunk / c.depth)", "1"),
    ("titans", "[(k @ w[0].mT - v, k)]", "[(v - k @ w[0].mT, k)]"),
    ("titans", "at = w if P % c.chunk == 0 else at", "at = w"),
    ("titans", "[causal] * (1 + mac)", "[causal.new_ones(T, P + T), causal][1 - mac:]"),
    ("titans", 'self.memory.ask(z, memory["before"]) if mac', 'self.memory.ask(z, after["w"]) if mac'),
    ("titans", "key=line[:, :, -1:])", "key=line[:, :, :1])"),
    ("titans", "theta.sigmoid() * (1 - eta.exp())", "theta.sigmoid()"),
    ("titans", "y = f0 * (inputs @ w.mT) + fe0 *", "y = f0 * (inputs @ w.mT) - fe0 *"),
    ("titans", "F.logsigmoid(-alpha)", "F.logsigmoid(alpha)"),
    # bmojo
    ("bmojo", "(p > t - W) & (p <= t)", "(p >= t - W) & (p <= t)"),
    ("bmojo", "(p > t - 2 * W) & (p <= t - W)", "(p > t - 2 * W) & (p <= t)"),
    ("bmojo", "line[:, i:i + T]", "line[:, i + 1:i + 1 + T]"),
    ("bmojo", ".topk(self.M, 1)", ".topk(self.M, 1, largest=False)"),
    ("bmojo", "window[:, self.c.past:]], 1)", "window[:, :W]], 1)"),
    ("bmojo", "innovation(y.detach(),", "innovation(y,"),
    ("bmojo", "rope(positions - 1, D)", "rope(positions, D)"),
    ("bmojo", "v], 2), line[:, -1:]", "v], 2), line[:, :1]"),
    ("bmojo", "kinds[l % len(kinds)]", "kinds[0]"),
    # gca
    ("gca", "(ids < reader - 1)", "(ids < reader)"),
    ("gca", " & (ids >= end - c.M)", ""),
    ("gca", "score = score.gather(2, top)", "score = best.masked_fill(best == -torch.inf, 0)"),
    ("gca", "return z[:, :, c.m],", "return z[:, :, 0],"),
    ("gca", "if self.training or c.retrieval", "if True or c.retrieval"),
    ("gca", "torch.full((1,), -past", "torch.full((1,), past"),
    ("gca", "torch.cat([ask, q[:, :-1]], 1)", "q"),
    ("gca", "(x if c.bypass else with_chunks)", "with_chunks"),
    ("gca", ".softmax(-1) * real", ".softmax(-1)"),
    ("gca", "[:, new:].clone()", "[:, new:]"),
    ("gca", "torch.ones(U, U, dtype=torch.bool, device=h.device)", "torch.ones(U, U, dtype=torch.bool, device=h.device).tril()"),
    # landmark
    ("landmark", "score.logsumexp(-1)", "score.amax(-1)"),
    ("landmark", "(blocks < position[:, None] // l)", "(blocks <= position[:, None] // l)"),
    ("landmark", "device=q.device) > position", "device=q.device) >= position"),
    ("landmark", ".topk(self.c.topk, 3)", ".topk(self.c.topk, 3, largest=False)"),
    ("landmark", '.masked_fill(age > state["n"][:, None], -torch.inf)[:', '.expand(len(state["n"]), -1)[:'),
    ("landmark", '* -c.l, c.head_dim)    # (s', '* c.l, c.head_dim)    # (s'),
    ("landmark", "[:, :, c.s:].clone()", "[:, :, c.s:]"),
    ("landmark", "age.clamp(max=c.topk + 1) * -c.l", "age.clamp(max=c.topk + 1) * c.l"),
    ("landmark", 'n=state["n"] + c.s', 'n=state["n"] + 1'),
    # the loop
    ("stream", "detach(state)]", "state]"),
    ("stream", "for k, v in leaf.items() if v.grad is not None}", "for k, v in leaf.items() if v.grad is not None and 0}"),
    ("stream", "learned = [k for k in grad if start[k].requires_grad]", "learned = []"),
    ("stream", "torch.where(fresh.to(start.device)", "torch.where(~fresh.to(start.device)"),
    ("stream", "if self.tokens.size(1) == S:", "if self.tokens.size(1) > S:"),
]


def plant(model, old, new, folder):
    """The path of a file with the fault. What is replaced must stand there once: a fault cannot become stale unseen."""
    source = (HERE / ("stream.py" if model == "stream" else f"models/{model}.py")).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {model}.py"
    path = folder / f"{model}.py"
    path.write_text(source.replace(old, new))
    return path


def test_every_fault_can_be_planted(tmp_path):
    for model, old, new, _ in FAULTS:
        path = plant(model, old, new, tmp_path)
        compile(path.read_text(), str(path), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("model, old, new, test", FAULTS)
def test_a_fault_is_found_by_the_test_that_names_it(model, old, new, test, tmp_path):
    report = grade.check(plant(model, old, new, tmp_path), only=test)
    assert report["failed"], f"{test} does not find {new!r} in the place of {old!r}"
