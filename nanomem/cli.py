"""Command lines from dataclasses: a field is a flag, its default is typed, and the comment behind it is the help."""
import dataclasses
import difflib
import inspect
import re
import sys


class UserError(Exception):
    """A mistake that the user can correct. The message is one sentence: what is wrong, where, and what to do."""


def nearest(word, words):
    """The end of an error message: the word that was probably meant, or all words that are right."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(words)}"


def value(flag, text, kind):
    """The text behind a flag as a value of type `kind`: bool, int, float or str."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"--{flag} is a switch: write --{flag} or --no-{flag}, not --{flag}={text}")
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{flag} takes a {'whole ' if kind is int else ''}number, got '{text}'") from None


def parse(argv, *classes):
    """Read the flags in argv, which are fields of these dataclasses: --field=value, --field value, and for booleans
    --field or --no-field. Returns a list with a dict {field: value} for each class, which holds only what was typed,
    and the list of words that are no flags. Raises UserError for an unknown flag and for a missing or bad value. With
    -h or --help, prints the help and exits.
    """
    kinds = {f.name: f.type for c in classes for f in dataclasses.fields(c)}
    if "-h" in argv or "--help" in argv:
        usage(*classes)
        sys.exit(0)
    typed, words, rest = {}, [], list(argv)
    while rest:
        arg = rest.pop(0)
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
            raise UserError(f"unknown flag --{flag}: {nearest(name, list(kinds))}")
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
    for i, arg in enumerate(argv):
        flag, equals, text = arg.partition("=")
        if flag == f"--{name}":
            following = argv[i + 1] if i + 1 < len(argv) else ""
            found = text if equals else following
    return found


def variant(text):
    """A name with settings: "hmt:slots=1:search=uniform" -> ("hmt", {"slots": "1", "search": "uniform"})."""
    name, *settings = text.split(":")
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
    shown = set()
    for c in classes:
        print(f"\n{'flags' if c.__module__ == '__main__' else c.__module__.split('.')[-1]}:")
        help_of = comments(c)
        for f in dataclasses.fields(c):
            if f.name not in shown:
                print(f"  --{f.name + '=' + str(f.default):28s} {help_of.get(f.name, '')}")
                shown.add(f.name)


def run(main):
    """Run main(argv) of a script. A UserError becomes one line and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:   # the program behind a pipe has read enough, as in: | head
        sys.stderr.close()
