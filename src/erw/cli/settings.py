"""Settings records as command-line options: one typed, dotted option per field."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from erw.config import Run, from_dict, nearest, to_dict
from erw.errors import ConfigError

T = TypeVar("T")
NUMBER = re.compile(r"-(\d|\.\d|inf|nan)")  # a value that begins with a minus sign, not an option
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Setting(NamedTuple):
    """One field of a settings record: dotted name, type, present value and what it means."""

    name: str
    hint: Any
    value: Any
    text: str


class Wide(argparse.RawDescriptionHelpFormatter):
    """Help with room for dotted names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one-line exceptions that name the nearest option."""

    def __init__(self, prog: str, description: str, *, usage: str) -> None:
        super().__init__(
            prog,
            usage=f"{prog} {usage}".strip(),
            description=description,
            allow_abbrev=False,
            formatter_class=Wide,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of exit, so that there is one place that prints and one that exits."""
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "missing")
        raise ConfigError(f"{message}; see {self.prog} --help")

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse all of `args`. Raises ConfigError at the first thing that is not understood."""
        found, unknown = self.parse_known_args(tidy(args))
        for name in (word.split("=")[0] for word in unknown if word.startswith("-")):
            close = nearest(name, self._option_string_actions)
            hint = close if "did you mean" in close else ""  # the full list is too long for a line
            raise ConfigError(f"unknown setting {name}{hint}; see {self.prog} --help")
        if unknown:
            self.error(f"unexpected {unknown[0]!r}")
        return found


def tidy(args: Sequence[str]) -> list[str]:
    """--a_b as --a-b, and `--a -1e-3` as `--a=-1e-3`, which argparse would take for an option."""
    words: list[str] = []
    for word in args:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words.append(name.replace("_", "-") + equals + value)
        elif NUMBER.match(word) and words and re.fullmatch(r"--[^=]+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def settings(record: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a record and of the records inside it, in order."""
    hints, texts = typing.get_type_hints(type(record)), attributes(type(record))
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")
        else:
            name = f"{prefix}{field.name}"
            yield Setting(name, hints[field.name], value, texts.get(field.name, ""))


def attributes(kind: type) -> dict[str, str]:
    """Field -> its text in the "Attributes:" part of the docstring; a line may name several."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in (kind.__doc__ or "").partition("Attributes:")[2].splitlines():
        if start := re.match(r" {8}(\w+(?:, \w+)*): (.*)", line):
            names = start[1].split(", ")
            texts |= dict.fromkeys(names, start[2])
        elif line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def add_settings(
    parser: argparse.ArgumentParser, record: Any, *, leave: Sequence[str] = ()
) -> None:
    """Give the parser an option for every setting of the record but those in `leave`."""
    groups: dict[str, Any] = {}
    for name, hint, value, text in settings(record):
        if name in leave:
            continue
        title = name.rpartition(".")[0]
        if title not in groups:
            groups[title] = parser.add_argument_group(f"{title} settings".strip())
        groups[title].add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=f"{text} [{shown(value)}]".strip().replace("%", "%%"),
            **reading(hint),
        )


def changed(record: T, found: argparse.Namespace) -> T:
    """The record with the settings that were given; its own checks run again.

    Raises ConfigError for impossible values.
    """
    values = to_dict(record)
    for setting in settings(record):
        if setting.name in found:
            *groups, last = setting.name.split(".")
            place = values
            for group in groups:
                place = place[group]
            place[last] = getattr(found, setting.name)
    return from_dict(type(record), values)


def typed(setting: Setting) -> str:
    """The setting as one types it; an empty list is the option alone."""
    value = "" if setting.value == () else shown(setting.value)
    return f"--{setting.name.replace('_', '-')} {value}".rstrip()


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def reading(hint: Any) -> dict[str, Any]:
    """argparse's keywords for a value of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"choices": args, "metavar": "{" + ",".join(args) + "}"}
    if origin is tuple:
        count = "*" if args[-1] is Ellipsis else len(args)
        return {**reading(args[0]), "nargs": count}
    if origin in (typing.Union, types.UnionType):
        kind = next(arg for arg in args if arg is not type(None))
        return {"type": converter(kind, optional=True), "metavar": f"{kind.__name__.upper()}|none"}
    flag = {"nargs": "?", "const": True} if hint is bool else {}
    return {"type": converter(hint), "metavar": hint.__name__.upper(), **flag}


def converter(kind: type, *, optional: bool = False) -> Any:
    """A function from text to `kind` whose error says what was expected."""

    def convert(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        try:
            return TRUTH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            wanted = KINDS[kind] + " or none" * optional
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None

    return convert


def read_recipe(
    verb: str,
    args: Sequence[str],
    *,
    usage: str,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[Run, argparse.Namespace]:
    """The recipe named first in `args` with the settings after it, and the verb's own options.

    Raises ConfigError for an unknown recipe or setting, with the nearest name.
    """
    from erw.recipes import names, note, recipe, tiny

    named = bool(args) and not args[0].startswith("-")
    if not named and not set(args) & {"-h", "--help"}:
        raise ConfigError(
            f"erw {verb} needs a recipe first, such as {names()[0]}; erw show lists them"
        )
    if not named:
        text = "recipes: " + ", ".join(names())
        text += f"\n\n`erw {verb} RECIPE --help` lists all settings of one with their values."
        parser = Parser(f"erw {verb}", text, usage=f"RECIPE {usage}")
        more(parser)
        parser.parse_args(["--help"])
    run = tiny(recipe(args[0])) if "--tiny" in args else recipe(args[0])
    parser = Parser(f"erw {verb} {args[0]}", note(args[0]), usage=usage)
    more(parser)
    parser.add_argument("--tiny", action="store_true", help="its twin of a few seconds on a CPU")
    add_settings(parser, run)
    found = parser.read(args[1:])
    if vars(found).get("init"):
        from erw.interop import adopt, open_model
        from erw.interop.pretrained import is_ours

        given = vars(found)
        how = {
            "layout": found.init_layout,
            "num_heads": given.get("model.heads"),
            "depth": given.get("model.depth"),
        }
        found.start = open_model(found.init, **({} if is_ours(found.init) else how))
        run = adopt(run, found.start)
    return changed(run, found), found
