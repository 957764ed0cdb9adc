"""What the tests share: a tiny model whose every path carries something, texts, the loop over segments, comparisons.

NANOMEM_MODEL=homework/hmt.py python -m pytest tests/test_laws.py tests/test_hmt.py    tests a file in the place of hmt
"""
import inspect
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")   # many threads on a busy machine are far slower than one

import pytest
import torch

import nanomem
from nanomem import grade

GIVEN = os.environ.get("NANOMEM_MODEL", "")        # a file, or MODEL=FILE
MODEL, FILE = GIVEN.split("=", 1) if "=" in GIVEN else ("", GIVEN)
RESULTS = os.environ.get("NANOMEM_RESULTS")        # where grade.py reads how each test went


def tell(**line):
    if RESULTS:
        with open(RESULTS, "a") as f:
            f.write(json.dumps(line) + "\n")


try:    # before any test imports the model
    NAMES = grade.put_in_place(MODEL, FILE) if FILE else list(nanomem.MODELS)
except nanomem.UserError as e:
    tell(refused=str(e))
    pytest.exit(str(e), 2)

torch.set_num_threads(1)
TINY = dict(vocab=64, layers=2, heads=2, width=32, seg=32)
S, V = TINY["seg"], TINY["vocab"]


def tiny(name, seed=0, **fields):
    """A small model whose parameters are all moved off their start, zeros included."""
    torch.manual_seed(seed)
    model = nanomem.build(name, **{**TINY, **fields})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(params=NAMES)
def name(request):
    """Every model and preset, or those of the file that is tested."""
    return request.param


@pytest.fixture
def model(name):
    return tiny(name)


def text(B=2, K=3, seed=0):
    """Random tokens (B, K*S)."""
    return torch.randint(V, (B, K * S), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, state=None):
    """The loop over segments: logits of all of them (B, K*S, V), and the last state."""
    state, logits = state or model.init_state(len(tokens)), []
    for x in tokens.split(model.c.seg, 1):
        y, state = model(x, state)
        logits.append(y)
    return torch.cat(logits, 1), state


def change(tokens, t):
    """The same tokens, but another one at position t."""
    other = tokens.clone()
    other[:, t] = (other[:, t] + 1) % V
    return other


def keep_embeddings(model, kept):
    """Append the embeddings of every segment to `kept`; after a backward each has its gradient."""
    def hook(module, args, y):
        if y.size(1) == S:             # not those of tokens that are shown again
            y.retain_grad()
            kept.append(y)
    model.embedding.register_forward_hook(hook)


def close(a, b, tolerance=1e-4):
    """Whether two tensors or states agree, relative to their size."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and (a.numel() == 0 or bool((a - b).abs().max() <= tolerance * (1 + b.abs().max())))


def size(name, **fields):
    """Number of parameters."""
    return sum(p.numel() for p in nanomem.build(name, **fields).parameters())


# what grade.py is told of each test, as it happens: what comes later may never end

def pytest_collection_modifyitems(items):
    """Of the laws those of the file that is tested, not those of nanomem's other files."""
    other = lambda item: item.path.name == "test_laws.py" and "name" not in item.fixturenames
    if FILE and MODEL != "stream":
        items[:] = [item for item in items if not other(item)]


def pytest_collection_finish(session):
    tell(tests=[item.nodeid for item in session.items])


def pytest_collectreport(report):
    if report.failed:
        tell(test=report.nodeid, result="failed", message=str(report.longrepr)[-2000:], where="")


def pytest_runtest_logstart(nodeid, location):
    tell(begins=nodeid)


def pytest_runtest_makereport(item, call):
    if call.when == "call" or call.excinfo:
        tell(test=item.nodeid, about=inspect.getdoc(item.obj) or "", **grade.outcome(call.excinfo, FILE))
