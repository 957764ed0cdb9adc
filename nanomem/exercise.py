"""Assignments: hand out a model without its mechanism, and check what comes back.

    python -m nanomem.exercise                              the exercises of all models
    python -m nanomem.exercise hmt --out=homework/hmt.py    a file to hand out: all exercises of hmt
    python -m nanomem.exercise hmt --exercise=search        one of them: the rest of the model is there
    python -m nanomem.exercise check homework/hmt.py        what is missing, and every law: passed, failed and why
    python bench.py --models=homework/hmt.py --tasks=recall train and measure it like any model

A file may lie anywhere. `from . import gpt` in it means nanomem's gpt, and so does `from nanomem.models import gpt`. In
check, the file stands in the place of nanomem's own of that name for a whole process: no test can meet the other one.
check also runs the laws on a model of your own: a file that is called after none of ours.
"""
import ast
import io
import json
import textwrap
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanomem import checkpoint, cli, grade
from nanomem.cli import UserError


class Exercise(NamedTuple):
    """A part of a model to write again, in an hour or two."""
    name: str
    learns: str
    bodies: dict    # {function or method that is handed out empty: a hint}


EXERCISES = {   # of each file, in the order of their difficulty
    "gpt": [
        Exercise("rope", "positions are rotations, and a score depends on a distance", {
            "rope": "angle = position times 10000^(-2i/D), a frequency for each pair of channels",
            "rotate": "each pair (a, b) becomes (a cos - b sin, a sin + b cos); even channels are a, odd ones b"}),
        Exercise("attention", "a causal mask when queries are the last of all positions", {
            "with_previous": "half of the channels stay; the others come from one position earlier, zeros at first",
            "attend": "query t of T stands at position P + t; is_causal is right only for P = 0"}),
        Exercise("cache", "any number of tokens, computed once", {
            "Attention.forward": "new keys and values go behind the past ones; the cache keeps keys before the shift",
            "GPT.backbone": "x stands at positions from P on; every layer takes its past and returns a longer one"})],
    "xl": [
        Exercise("mask", "what is filled, what is past, what is future", {
            "XL.mask": "the newest kept position is the last before the segment; n says how many are filled"}),
        Exercise("cache", "keys that move on by a rotation, and where the gradient stops", {
            "XL.read": "only the sliding window lets the gradient through; one k, v for each layer",
            "newest": "the last `kept` positions stay; one rotation moves all keys back by those that leave",
            "XL.write": "as many tokens came in as there are positions more than `kept`; n counts up to `kept`"}),
        Exercise("window", "attention in blocks, in linear time", {
            "window_mask": "block b has its own A keys and the W before; compare indices, then positions with `first`",
            "WindowAttention.attend": "unfold keys and values into overlapping blocks, which join the batch"})],
    "rmt": [
        Exercise("write", "recurrence through tokens that stand behind a segment", {
            "RMT.write": "a copy of the memory passes behind the segment; what comes out is the next memory",
            "RMT.forward": "one pass over [mem ; sensory ; tokens ; mem], or delete it: GPT has one in steps"}),
        Exercise("stream", "the same computation, token by token", {
            "RMT.embed_previous": "embeddings of the ids, and zeros where an id is -1",
            "RMT.read": "memory and sensory tokens pass first; their keys and values are the cache",
            "RMT.extend": "GPT.extend does the rest; the cache also carries the last k tokens so far"})],
    "hmt": [
        Exercise("bank", "a memory of memories that has a fixed shape", {
            "HMT.init_state": "the learned first memory stands in the newest place, and n is 0",
            "HMT.next_state": "the newest memory comes in behind, the oldest leaves; n counts on"}),
        Exercise("search", "cross-attention as a search, and a softmax over what is filled", {
            "HMT.summary": "the prompt on both sides of the half segment; the last position has seen all",
            "HMT.weights": "query from a summary, keys from the bank, scaled by sqrt(C); empty places get -inf",
            "HMT.recall": "the gain times the mean of the bank by these weights"}),
        Exercise("stream", "what each query may know, and when", {
            "HMT.read": "with query=split nothing was searched yet: the newest memory stands in front",
            "HMT.extend": "the token that completes the first half triggers the search, in the middle of a call",
            "HMT.forward": "the parts of eq. 4 in one pass (RMT's, which is inherited, knows no bank)"})],
    "memformer": [
        Exercise("reader", "cross-attention without positions", {
            "Reader.keys_values": "one linear map, split into the heads of k and of v",
            "Reader.forward": "queries from the tokens, no mask"}),
        Exercise("slots", "slot attention: a softmax over a slot itself and all tokens", {
            "Writer.weights": "the score of a slot with its own key stands first, then one for each token",
            "Writer.forward": "a slot keeps itself as it is, and takes projected values of tokens"}),
        Exercise("forgetting", "normalisation that forgets at a known rate", {
            "Writer.normalise": "add the forgetting vectors, then the norm",
            "Memformer.init_state": "a memory of zeros, normalised; with `back` also S ids of -1"})],
    "stream": [
        Exercise("replay", "back-propagation through time with the memory of one segment", {
            "replay": "forwards only the states; backwards each segment again, and the gradient of its state goes on"}),
        Exercise("reader", "reading a text of any length at a constant cost", {
            "Reader.__call__": "a whole segment is one call; else read, extend, and write when the segment is full"})],
    "memoryllm": [
        Exercise("read", "memory as keys and values of every layer", {
            "MemoryLLM.memory": "the start vector, then the pool; what was never born is not filled",
            "MemoryLLM.keys_values": "the last vector stands just before `end`",
            "MemoryLLM.mask": "memory where it is filled; tokens up to oneself, of t + T"}),
        Exercise("write", "compression by the model itself", {
            "MemoryLLM.compress": "a second pass that sees the newest K vectors; the marker is on the last K tokens"}),
        Exercise("forgetting", "random drops, and exponential forgetting", {
            "MemoryLLM.update": "the table of this step orders the pool: first what stays, then the K that drop out"})],
    "mplus": [
        Exercise("find", "top-k search in a store without an order", {
            "MPlus.score": "a sigmoid for each query and key, then the mean over the queries; random: see the state",
            "MPlus.find": "empty places never win; the best K0 come oldest first"}),
        Exercise("store", "a store that keeps the youngest, by a scatter", {
            "MPlus.move_to_store": "the youngest dropped against the oldest stored, and only where it is younger"}),
        Exercise("loss", "how a search that has no gradient learns", {
            "MPlus.attention_to_pool": "attention weights of the segment over start and pool, mean over heads",
            "MPlus.search_loss": "m tokens ask together; right is three times an even share; half the loss each"})],
    "mamba": [
        Exercise("step", "a selective state space, one token at a time", {
            "short_conv": "the last three tokens stand in front; four shifted sums, added to the input",
            "step": "the two equations above, with h (B, H, D, N)"}),
        Exercise("block", "the token says what is written, read and forgotten", {
            "SSM.forward": "project and split; softplus for dt; the decay is -dt exp(log_A); gate, norm, out"}),
        Exercise("chunks", "recurrence as matrix products", {
            "ssd": "A is a cumsum; exp(A_i - A_j) inside the triangle; h carries one chunk to the next"})],
    "deltanet": [
        Exercise("block", "keys of length 1, a decay, and the size of a correction", {
            "Memory.forward": "convolution, SiLU, heads; length 1 for q and k; sigmoid for b; norm and gate of o"}),
        Exercise("chunks", "a triangular system in the place of a loop", {
            "delta_rule": "(1 + L) u = r with L strictly lower triangular; then read, and carry h on"})],
    "infini": [
        Exercise("matrix", "linear attention is a matrix", {
            "recall": "sigma(q) M over sigma(q) z; where nothing was written the answer is 0",
            "store": "delta takes off what the memory says to k already; z only counts"}),
        Exercise("gate", "two answers to one query", {
            "InfiniAttention.forward": "queries without position ask M, rotated ones the segment; beta mixes"}),
        Exercise("segments", "when a segment may read what", {
            "Infini.read": "for each layer: no keys, no values, no keys without position yet; M and z from the state",
            "Infini.write": "keys with the shift, of the whole segment at once, into M and z of each layer"})],
    "titans": [
        Exercise("gradients", "the gradient of a memory's loss, by hand", {
            "gradients": "d = Mem(k) - v at the output; a deep memory sends it back through w2 and bend"}),
        Exercise("descent", "gradient descent with momentum and decay, without a loop", {
            "products": "cumulated logarithms, their differences in the lower triangle",
            "descend": "eq. 16 and 18 as attention without softmax, for each layer of the memory"}),
        Exercise("write", "a training run inside the model", {
            "Memory.write": "fill the open chunk first; gradients at the weights where the chunk began"})],
    "bmojo": [
        Exercise("innovation", "surprise is the distance to a prediction", {
            "innovation": "the mean of the three outputs before predicts; the last three go on to the next call"}),
        Exercise("eidetic", "the M most surprising tokens, chunk by chunk", {
            "Attention.close_chunk": "top M of those kept and the W new ones; window and fading tokens move on by W"}),
        Exercise("attention", "one softmax over three memories", {
            "Attention.attend_chunk": "for each memory its places relative to the chunk and who may see it"})],
    "gca": [
        Exercise("encode", "a chunk becomes a key, and keys and values", {
            "GCA.encode": "the encoder looks both ways; the landmark, last in its chunk, gives the key"}),
        Exercise("cross", "a softmax in each chunk, and a mix of answers", {
            "CrossAttention.forward": "each of the k chunks answers for itself; w weighs the answers"}),
        Exercise("retrieval", "a choice that the loss on tokens teaches", {
            "GCA.find": "a landmark's question; chunks that are past and kept; top k with noise, softmax without"})],
    "landmark": [
        Exercise("grouped", "a softmax in two levels", {
            "share_out": "the weight of a landmark goes to the tokens of its block, by a softmax of their scores",
            "Attention.segment": "single tokens of the query's block; landmarks of the blocks before; none to come"}),
        Exercise("retrieve", "each query and head picks its own blocks", {
            "Attention.retrieve": "top k by landmark; fetch them, or mask the others when that is less work"}),
        Exercise("bank", "keys that are stored without a place and get one when read", {
            "Landmark.read": "old blocks share the place k + 1 blocks back; ties go to the newest; empty ones get -inf",
            "Landmark.write": "rotate the keys of each block to its own beginning; the newest come last"})],
}


# ----------------------------------------------------------------------------------------------------------------------
# Handing out

def functions(source):
    """(name, its node) of all functions and methods: "rope", "Reader.forward"."""
    for node in ast.parse(source).body:
        for f in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(f, ast.FunctionDef):
                yield f"{node.name}.{f.name}" if f is not node else f.name, f


def notes(f, comments):
    """What remains of a body: the names that it computed, with the shapes and equation numbers beside them."""
    for node in sorted(ast.walk(f), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, (ast.Assign, ast.Return)):
            said = [comments[i].lstrip("# ") for i in range(node.lineno, node.end_lineno + 1) if i in comments]
            names = ast.unparse(node.targets[0]).strip("()") if isinstance(node, ast.Assign) else "returns"
            if said:
                yield f"# {names}: {'; '.join(said)}"


def without(source, bodies):
    """The source without the bodies of these functions {name: hint}: each says what is missing."""
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    found = {name: f for name, f in functions(source) if name in bodies}
    assert found.keys() == bodies.keys(), f"there is no {', '.join(bodies.keys() - found.keys())}"
    for name, f in reversed(found.items()):                                    # from the end: line numbers stay true
        code = f.body[1:] if ast.get_docstring(f) else f.body
        parts = textwrap.wrap(f"{name}: {bodies[name]}", 100, drop_whitespace=False)
        hint = "\n    ".join(json.dumps(part) for part in parts)
        new = "\n".join([*notes(f, comments), f"raise NotImplementedError(\n    {hint})"])
        lines[code[0].lineno - 1:f.end_lineno] = textwrap.indent(new, " " * code[0].col_offset).splitlines()
    return "\n".join(lines) + "\n"


def hand_out(model, exercise=""):
    """The file of a model without what its exercises, or one of them, ask for."""
    if model not in EXERCISES:
        raise UserError(f"there is no exercise for {model}: {cli.nearest(model, list(EXERCISES))}")
    chosen = [e for e in EXERCISES[model] if exercise in ("", e.name)]
    if not chosen:
        raise UserError(f"{model} has no exercise {exercise}: "
                        + cli.nearest(exercise, [e.name for e in EXERCISES[model]]))
    file = Path(__file__).parent / ("stream.py" if model == "stream" else f"models/{model}.py")
    return without(file.read_text(encoding="utf-8"), {k: hint for e in chosen for k, hint in e.bodies.items()})


def missing(source):
    """What a source still leaves to be written: its lines and hints."""
    raised = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    hint = lambda of: str(of[0].value) if of and isinstance(of[0], ast.Constant) else ""
    return [dict(line=n.lineno, hint=hint(n.exc.args)) for n in raised
            if ast.unparse(n.exc.func) == "NotImplementedError"]


# ----------------------------------------------------------------------------------------------------------------------
# The command

def in_words(report):
    """The report for a person."""
    r = report
    said = [f"{r['file']} as {r['model']}: {r['passed']} passed, {r['failed']} failed, {r['not_reached']} not reached"]
    if r["missing"]:
        said.append(f"\nnot written yet ({len(r['missing'])}):")
        said += [f"  line {m['line']:4d}  {m['hint']}" for m in r["missing"]]
    for i, t in enumerate(r["tests"]):
        file, _, name = t["test"].partition("::")
        if i == 0 or not r["tests"][i - 1]["test"].startswith(file):
            said.append("\nlaws of every model:" if file.endswith("test_laws.py") else f"\nproperties, {file}:")
        said.append(f"  {t['result'].upper() if t['result'] == 'failed' else t['result']:12s}"
                    + (name.removeprefix("test_").replace("_", " ") or "all of them")
                    + (f" ({t['message']})" if t["result"] == "skipped" else ""))
    failed = [t for t in r["tests"] if t["result"] == "failed"]
    for t in failed[:3]:
        said.append(f"\n--- {t['test']}" + (f" with {t['case']}" if t["case"] else ""))
        said += t["about"].splitlines() + [f"at {t['where']}"] * bool(t["where"])
        said += [line[:160] for line in t["message"].strip().splitlines()[:12]]
    if len(failed) > 3:
        said.append(f"\n{len(failed) - 3} more failed: begin with these")
    return "\n".join(said)


@dataclass
class Flags:
    out: str = ""         # the file to hand out (without it homework/MODEL.py)
    exercise: str = ""    # the exercise to hand out (without it all of the model)
    model: str = ""       # check: what the file is, if it is not called after its model
    seconds: int = 60     # check: a test that takes longer is stopped, and the tests after it are not reached
    json: bool = False    # check: the report for a program


def table():
    lines = [f"{'model':10s}  {'exercise':12s}{'what is to be written':58s}what it teaches"]
    for model, exercises in EXERCISES.items():
        lines += [f"{model if not i else '':10s}  {e.name:12s}{', '.join(e.bodies):58s}{e.learns}"
                  for i, e in enumerate(exercises)]
    return "\n".join(lines)


def main(argv):
    (typed,), words = cli.parse(argv, Flags)
    flags = Flags(**typed)
    if not words:
        print(table())
    elif words[0] == "check" and len(words) == 2:
        if flags.model and flags.model not in EXERCISES:
            raise UserError(f"--model={flags.model} is no model: {cli.nearest(flags.model, list(EXERCISES))}")
        report = grade.check(words[1], flags.model, flags.seconds)
        report["missing"] = missing(tokenize.open(words[1]).read())
        print(json.dumps(report) if flags.json else in_words(report))
        return 0 if report["passed"] and not report["failed"] + report["not_reached"] else 1
    elif len(words) == 1 and words[0] != "check":
        text, out = hand_out(words[0], flags.exercise), flags.out or f"homework/{words[0]}.py"
        if Path(out).exists():
            raise UserError(f"{out} is there already, perhaps with a solution in it: choose another --out")
        checkpoint.write_whole(out, lambda scratch: scratch.write_text(text, encoding="utf-8"))
        print(f"written: {out}, {len(missing(text))} bodies to fill in")
    else:
        raise UserError("name a model, or check and one file: python -m nanomem.exercise check homework/hmt.py")
    return 0


if __name__ == "__main__":
    cli.run(main)
