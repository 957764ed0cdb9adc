"""Command lines from dataclasses: a field is a flag, its default is typed, and the comment behind it is the help."""
import contextlib
import dataclasses
import difflib
import inspect
import re
import signal
import sys
import typing
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct. The message is one sentence: what is wrong, where, and what to do."""


# flags of nanoGPT and their names here
NANOGPT = dict(block_size="seg", max_iters="steps", n_embd="width", n_layer="layers", n_head="heads", dataset="data",
               batch_size="batch", weight_decay="decay", grad_clip="clip", out_dir="out",
               gradient_accumulation_steps="accum", eval_iters="eval_batches", start="prompt", max_new_tokens="tokens")


def nearest(word, words):
    """The end of an error message: the word that was probably meant, or all words that are right."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(words)}"


def types(cls):
    """{field of a dataclass: its type}, also where the file says `from __future__ import annotations`. Raises UserError
    for a type that no flag can have."""
    hints = typing.get_type_hints(cls)
    found = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for name, kind in found.items():
        if kind not in (bool, int, float, str):
            raise UserError(f"{inspect.getfile(cls)}: {name} must be declared as bool, int, float or str")
    return found


def unwritten(error):
    """Whether an exercise that is not solved raised this, and not an operation that a type or a device lacks."""
    return isinstance(error, NotImplementedError) and not re.search("not .*implemented for|Could not run", str(error))


def check_types(settings, what=""):
    """Raises UserError where a field of a dataclass has a value of another type; None is allowed where it is the
    default."""
    kinds = types(type(settings))
    for f in dataclasses.fields(settings):
        v, kind = getattr(settings, f.name), kinds[f.name]
        right = isinstance(v, (int, float) if kind is float else kind) or v is None and f.default is None
        if not right or isinstance(v, float) and abs(v) > 2 ** 53 or v != v:
            raise UserError(f"{what}{f.name} takes a value of type {kind.__name__}, got {str(v)[:40]!r}")


def value(flag, text, kind):
    """The text behind a flag as a value of type `kind`: bool, int, float or str."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"--{flag} is a switch: write --{flag} or --no-{flag}, not --{flag}={text}")
        return text.lower() in ("true", "1", "yes")
    try:
        number = kind(text)
        if kind is str or abs(number) < 2 ** 53:          # which an infinity and a NaN are not
            return number
    except (ValueError, OverflowError):
        pass
    whole = "whole " if kind is int else ""
    raise UserError(f"--{flag} takes a {whole}number that is not too large, got '{text[:40]}'")


def parse(argv, *classes):
    """Read the flags in argv, which are fields of these dataclasses: --field=value, --field value, and for booleans
    --field or --no-field. Returns a list with a dict {field: value} for each class, which holds only what was typed,
    and the list of words that are no flags. Raises UserError for an unknown flag and for a missing or bad value. With
    -h or --help, prints the help and exits.
    """
    kinds = {}
    for c in classes:
        for name, kind in types(c).items():
            if name in kinds:
                raise UserError(f"{inspect.getfile(c)}: --{name} is a flag already, so a setting needs another name")
            kinds[name] = kind
    if "-h" in argv or "--help" in argv:
        usage(*classes)
        sys.exit(0)
    typed, words, rest = {}, [], list(argv)
    while rest:
        arg = rest.pop(0)
        if arg.startswith("-") and not arg.startswith("--") and arg[1:].partition("=")[0].replace("-", "_") in kinds:
            raise UserError(f"flags begin with two dashes: -{arg}")
        if not arg.startswith("--"):
            words.append(arg)
            continue
        flag, equals, text = arg[2:].partition("=")
        name = flag.replace("-", "_")
        switch = name.removeprefix("no_")
        if kinds.get(switch) is bool and not equals:
            typed[switch] = name == switch       # False for --no-field
            continue
        if name not in kinds:
            helps = {k: text for c in classes for k, text in comments(c).items()}
            meant = [NANOGPT[name]] if NANOGPT.get(name) in kinds else [k for k in kinds if k.startswith(name)]
            meant = meant or difflib.get_close_matches(name, kinds, n=1, cutoff=0.7)
            meant = meant or [k for k, text in helps.items() if len(name) > 3 and name.replace("_", " ") in text]
            raise UserError(f"unknown flag --{flag}: " + (f"did you mean {' or '.join(meant)}?" if meant
                                                          else nearest(name, list(kinds))))
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{flag} needs a value: --{flag}=...")
            text = rest.pop(0)
        typed[name] = value(flag, text, kinds[name])
    return [{f.name: typed[f.name] for f in dataclasses.fields(c) if f.name in typed} for c in classes], words


def peek(argv, name, default):
    """The value of one flag before the others can be parsed: --model decides which other flags there are. As in
    `parse`, the last one counts."""
    found = default
    for arg, following in zip(argv, [*argv[1:], ""]):
        flag, equals, text = arg.partition("=")
        if flag == f"--{name}":
            found = text if equals else following
    return found


def variant(text):
    """A name with settings: "hmt:slots=1:search=uniform" -> ("hmt", {"slots": "1", "search": "uniform"})."""
    name, rest = re.fullmatch(r"(.+?\.py(?=:|$)|[^:]*)(.*)", text, re.S).groups()    # a path on Windows has a colon
    settings = rest.split(":")[1:]
    for s in settings:
        if "=" not in s:
            raise UserError(f"{text}: settings follow a name as :field=value, got :{s}")
    return name, dict(s.split("=", 1) for s in settings)


def comments(cls):
    """{field: the comment behind it}, from the source code of the dataclass and of its parents, which come first."""
    found = {}
    for c in reversed(cls.__mro__):
        if dataclasses.is_dataclass(c):
            found.update(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(c), re.M))
    return found


def usage(*classes):
    """Print the docstring of the script that runs, and every flag with its default and its help."""
    print(inspect.cleandoc(sys.modules["__main__"].__doc__ or ""))
    for c in classes:
        print(f"\n{'flags' if c.__module__ == '__main__' else Path(inspect.getfile(c)).stem}:")
        help_of = comments(c)
        for f in dataclasses.fields(c):
            print(f"  --{f.name + '=' + str(f.default):28s} {help_of.get(f.name, '')}")


@contextlib.contextmanager
def catch_stop():
    """A list that the first Ctrl-C fills, or the end of the terminal or of the job, so that the work at hand can be
    ended and saved. The second one does not wait."""
    stop, names = [], [s for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]
    if "SIGHUP" in names and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:    # nohup: goes on without a terminal
        names.remove("SIGHUP")
    before = {s: signal.signal(getattr(signal, s), lambda *_: sys.exit(130) if stop else stop.append(1)) for s in names}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(getattr(signal, s), handler)


def run(main):
    """Run main(argv) of a script. A UserError becomes one line and exit code 2, and so does a lack of memory. Where a
    terminal cannot show a character, it gets a question mark."""
    for out in filter(None, (sys.stdout, sys.stderr)):     # closed ones are None
        out.reconfigure(errors="replace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8-sig")        # as files are read, wherever this runs
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except NotImplementedError as e:
        if not unwritten(e):
            raise
        print(f"error: not written yet: {e}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not re.search("out of memory|enough memory|allocate memory", str(e)):
            raise
        why = (str(e).splitlines() or ["no more is free"])[0][:90]
        print(f"error: out of memory: try a smaller batch, seg, width or vocab ({why})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:   # the program behind a pipe has read enough, as in: | head
        sys.stderr.close()
        sys.exit(141)         # what a shell says for this
    except OSError as e:
        print(f"error: {f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", file=sys.stderr)
        sys.exit(2)
