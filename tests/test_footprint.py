"""The bytes of a training step are known before the first one."""
import pytest
import torch

import train
from nanomem import footprint, stream
from nanomem.cli import UserError

from conftest import tiny


def test_live_bytes_counts_what_is_alive_at_once():
    before = torch.ones(1000)
    with footprint.LiveBytes() as live:
        before[10:].view(-1)
        a = torch.ones(256)
        b = a + 1
        b.view(16, 16)
        del a
        c = b * 2
    assert live.peak == 2 * 1024 and live.now == 2 * 1024 and c.numel()


@pytest.mark.parametrize("way", [stream.bptt, stream.replay])
def test_the_estimate_of_a_step_is_what_it_takes_within_a_quarter(name, way):
    model, B, K = tiny(name, seg=16), 6, 5
    a, b = footprint.step_bytes(model, way, None, K)
    x = torch.randint(64, (B, K * 16))
    with footprint.LiveBytes() as live:
        way(model, stream.make_step(model), x, x, stream.detach(model.init_state(B)), 0.01)
    assert 0.75 < (a + b * B) / live.peak < 1.25


def test_an_estimate_leaves_no_gradient_and_no_random_number_behind():
    model, numbers = tiny("mplus", seg=16), torch.get_rng_state()
    footprint.check_step(model, stream.bptt, None, 2, 2)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), numbers)


def test_a_step_that_is_too_large_is_refused_with_what_fits(tmp_path, monkeypatch, capsys):
    argv = ["--model=rmt", "--data=recall", "--layers=1", "--heads=1", "--width=16", "--seg=64", "--batch=64",
            "--segments=8", "--eval_batches=1", "--device=cpu", "--steps=1", f"--out={tmp_path}"]
    train.main(argv)
    said = capsys.readouterr().out
    need = float(said.partition("a step needs about ")[2].split()[0]) * 1e9
    assert "for activations and gradients" in said
    monkeypatch.setattr(footprint, "available", lambda device: need / 3)
    with pytest.raises(UserError, match=r"a step needs about .* GB: .*; here are .*: --accum=4 needs \d"):
        train.main([*argv, "--overwrite"])
    assert train.main([*argv, "--overwrite", "--accum=4"]) == 0                          # and it does fit
    monkeypatch.setattr(footprint, "available", lambda device: need / 150)
    with pytest.raises(UserError, match="--replay keeps the activations of one segment"):
        train.main([*argv, "--overwrite"])
    monkeypatch.setattr(footprint, "available", lambda device: 1e5)
    with pytest.raises(UserError, match="parameters need .* GB, here are .*: try a smaller --width, --layers"):
        train.main([*argv, "--overwrite", "--width=128"])


def test_a_compiled_step_that_might_fit_is_only_a_warning(monkeypatch):
    model = tiny("gpt")
    monkeypatch.setattr(footprint, "available", lambda device: 1e6)
    assert footprint.check_step(model, stream.bptt, None, 64, 1, compiled=True).startswith("warning: a step needs")
