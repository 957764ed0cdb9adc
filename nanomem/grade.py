"""What check of exercise.py does: run the laws and the properties of a paper on the file of a model, whatever is in it.

The tests run in a process of their own, which tells line by line how each went (tests/conftest.py). So an endless loop
or the end of the process costs no more than the tests that would come after it.
"""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nanomem
from nanomem import cli
from nanomem.cli import UserError


def put_in_place(model, path):
    """Import a file in the place of nanomem's own file of this model (without a name, of the one that it is called
    after), for the rest of this process. Returns the model and the presets that it now is, or the path of a new one."""
    model = model or Path(path).stem
    names = [name for name, (file, *_) in nanomem.MODELS.items() if file == model]
    if model != "stream" and not names:
        nanomem.model_class(path)
        return [path]
    package = nanomem if model == "stream" else importlib.import_module("nanomem.models")
    assert f"{package.__name__}.{model}" not in sys.modules, f"nanomem's own {model}.py is in use already"
    module = nanomem.import_file(path, f"{package.__name__}.{model}")
    setattr(package, model, module)
    needs = {nanomem.MODELS[name][1] for name in names} or {"Reader"}
    for name in needs:
        if getattr(getattr(module, name, None), "__module__", "") != module.__name__:
            raise UserError(f"{path} defines no class {name}, which is what {model} is called in nanomem.MODELS")
    return names or ["xl", "rmt", "mplus"]


def outcome(error, path):
    """How a test went, given the pytest.ExceptionInfo of what it raised or None."""
    if error is None:
        return dict(result="passed")
    kind, where = error.type.__name__, [f"{frame.path.name}, line {frame.lineno + 1}, in {frame.name}"
                                        for frame in error.traceback if str(frame.path) == os.path.abspath(path)]
    result = "skipped" if kind == "Skipped" else "not reached" if cli.unwritten(error.value) else "failed"
    said = str(error.value) if kind in ("AssertionError", "Failed") else f"{kind}: {error.value}"
    return dict(result=result, message=said[:2000], where=where[-1] if where else "")


def run_tests(model, path, seconds, only=""):
    """Run the laws and the properties of the model's paper on a file, or `only` the tests with this in their names, in
    a process of its own. Returns what tests/conftest.py told: a dict for each line."""
    if not Path("tests/test_laws.py").is_file():
        raise UserError("check runs the tests of the repository: start it in the folder that holds tests/")
    if not importlib.util.find_spec("pytest"):
        raise UserError("check needs pytest: pip install pytest")
    properties = Path("tests", f"test_{dict(memoryllm='mplus', stream='memformer').get(model, model)}.py")
    ours = {"stream", *(file for file, *_ in nanomem.MODELS.values())}           # data.py is no model of ours
    files = ["tests/test_laws.py", *([str(properties)] if model in ours and properties.is_file() else [])]
    command = [sys.executable, "-m", "pytest", *files, "-s", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", *(["-k", only] if only else [])]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "results")
        told.touch()
        env = dict(os.environ, NANOMEM_MODEL=f"{model}={os.path.abspath(path)}", NANOMEM_RESULTS=str(told))
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None and time.time() - told.stat().st_mtime < seconds:
                time.sleep(0.1)
            late = process.poll() is None
        finally:
            process.kill()
            code = process.wait()
        lines = [json.loads(line) for line in told.read_text().splitlines()]
    ended = f"did not end within {seconds} seconds" if late else f"ended the whole process (exit code {code})"
    running = lines[-1].get("begins") if lines else None
    if running:
        lines.append(dict(test=running, result="failed", message=ended, where=""))
    if not lines:
        lines.append(dict(refused=f"{path}: importing it {ended}"))
    return lines


def check(path, model="", seconds=60, only=""):
    """How a file keeps the laws and the properties, as a dict. Of a test with several settings the worst counts, and it
    is not reached as long as one of them is not. Raises UserError if the file cannot be imported."""
    if not nanomem.code_of(str(path)):
        raise UserError(f"{path} is no Python file: its name must end with .py")
    model, order, tests = model or Path(path).stem, ["skipped", "passed", "not reached", "failed"], {}
    lines = run_tests(model, path, seconds, only)
    done = {line["test"] for line in lines if "result" in line}
    for line in lines:
        if "refused" in line:
            raise UserError(line["refused"])
        left = [dict(test=test, result="not reached") for test in line.get("tests", []) if test not in done]
        for one in [line] if "result" in line else left:
            test, _, case = one["test"].partition("[")
            if test not in tests or order.index(one["result"]) > order.index(tests[test]["result"]):
                empty = dict(message="", where="", about="")
                tests[test] = {**empty, **one, "test": test, "case": case.removesuffix("]")}
    count = {result.replace(" ", "_"): sum(test["result"] == result for test in tests.values()) for result in order[1:]}
    return dict(file=str(path), model=model, **count, tests=list(tests.values()))
