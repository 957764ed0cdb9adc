import os

os.environ.setdefault("OMP_NUM_THREADS", "1")   # many threads on a busy machine are far slower than one

import pytest
import torch

import nanomem

torch.set_num_threads(1)
TINY = dict(vocab=64, layers=2, heads=2, width=32, seg=32)


def tiny(name, seed=0, **fields):
    """A small model whose every parameter is off its start, zeros included, so that every path carries something."""
    torch.manual_seed(seed)
    model = nanomem.build(name, **{**TINY, **fields})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(params=nanomem.MODELS)
def name(request):
    """Every model and preset."""
    return request.param


@pytest.fixture
def model(name):
    return tiny(name)
