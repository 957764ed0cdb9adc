"""Dataclass -> command line: a field's name is its flag, its default its type, its comment its help."""
import dataclasses
import difflib
import inspect
import re
import sys


class UserError(Exception):
    """Something that the user can put right: what is wrong, where, and what to do, in one sentence."""


def nearest(word, words):
    """A hint that ends a refusal: the nearest of the right words, or all of them."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(words)}"


def comments(cls):
    """{field: the comment behind it}, read from the source of the class and its parents."""
    found = {}
    for c in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        found.update(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(c), re.M))
    return found


def value(flag, text, kind):
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"--{flag} is a switch: write --{flag} or --no-{flag}, not --{flag}={text}")
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{flag} takes a {'whole ' if kind is int else ''}number, got '{text}'") from None


def parse(argv, *classes):
    """What argv sets of the fields of some dataclasses: one dict a class, and the words that are no flags.

    Flags: --field=value, --field value, and for booleans --field or --no-field. Raises UserError for an unknown flag,
    a missing or a bad value; prints the help and exits for -h.
    """
    kinds = {f.name: f.type for c in classes for f in dataclasses.fields(c)}
    if "-h" in argv or "--help" in argv:
        usage(*classes)
        sys.exit(0)
    found, words, rest = {}, [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            words.append(arg)
            continue
        flag, given, text = arg[2:].partition("=")
        name = flag.replace("-", "_")
        if kinds.get(name.removeprefix("no_")) is bool and not given:
            found[name.removeprefix("no_")] = not name.startswith("no_")
            continue
        if name not in kinds:
            raise UserError(f"unknown flag --{flag}: {nearest(name, list(kinds))}")
        if not given:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{flag} needs a value: --{flag}=...")
            text = rest.pop(0)
        found[name] = value(flag, text, kinds[name])
    return [{f.name: found[f.name] for f in dataclasses.fields(c) if f.name in found} for c in classes], words


def peek(argv, name, default):
    """The value of one flag, which decides what the others can be."""
    for word, after in zip(reversed(argv), ["", *reversed(argv)]):
        flag, given, text = word.partition("=")
        if flag == f"--{name}":
            return text if given else after
    return default


def variant(text):
    """A name with settings behind it, "hmt:slots=1:search=uniform" -> ("hmt", {"slots": "1", "search": "uniform"})."""
    name, *settings = text.split(":")
    for s in settings:
        if "=" not in s:
            raise UserError(f"{text}: settings follow a name as :field=value, got :{s}")
    return name, dict(s.split("=", 1) for s in settings)


def usage(*classes):
    """Print the docstring of the script that runs and every field with its default and comment."""
    print(inspect.cleandoc(sys.modules["__main__"].__doc__ or ""))
    seen = set()
    for c in classes:
        print(f"\n{c.__module__.removeprefix('nanomem.') if c.__module__ != '__main__' else 'flags'}:")
        for f in dataclasses.fields(c):
            if f.name not in seen:
                print(f"  --{f.name + '=' + str(f.default):28s} {comments(c).get(f.name, '')}")
        seen |= {f.name for f in dataclasses.fields(c)}


def run(main):
    """Run a script's main(argv): a UserError becomes one line and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:   # somebody read enough of our output: | head
        sys.stderr.close()
