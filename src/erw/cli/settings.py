"""The command line by tyro: a verb is a typed function, a settings record is its dotted options."""

import contextlib
import dataclasses
import functools
import inspect
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from erw.config import Run, flat
from erw.dist import current, world
from erw.errors import ConfigError

T = TypeVar("T")
Settings = Annotated[T, arg(name=""), FlagConversionOff]
"""A record whose fields are options; its switches take values too: --model.rope false."""
Recipe = Annotated[Positional[str], arg(metavar="RECIPE")]
RunDir = Annotated[Positional[str], arg(metavar="RUN")]
RunDirs = Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")]
RunOrImages = Annotated[Positional[str], arg(metavar="RUN|IMAGES")]

HELP = {"-h", "--help"}
GIVEN = ("model", "start", "base")
"""Parameters of verbs that are no options: what is read first, for the options' defaults."""
TRUTH = {"": True, "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
REGISTRY, CONFIG = ConstructorRegistry(), (FlagCreatePairsOff,)


def call(verb: str, function: Callable[..., Any], args: Sequence[str], **defaults: Any) -> None:
    """Call a verb's function with what `args` say.

    `defaults` take the place of the function's own; those of `run` are the recipe's, those of
    `draw` the sampler of the `model` that the first argument names.

    Raises ConfigError: an option is unknown (the nearest is named), or its value is missing or
    wrong.
    """
    parameters = inspect.signature(function).parameters
    if "recipe" in parameters:
        defaults = {"run": recipe_of(verb, args)} | defaults
    with world() if "model" in parameters else contextlib.nullcontext():
        if "model" in parameters and (model := model_of(verb, args)):
            sampler = dataclasses.asdict(model.run.sample)
            draw = dataclasses.replace(parameters["draw"].default, **sampler)
            defaults |= {"model": model, "draw": draw}
        args = ["--help"] if HELP & set(args) else args
        given = {name: defaults.pop(name) for name in GIVEN if name in defaults}
        _parse(verb, functools.partial(bound(function), **defaults), args)(**given)


def model_of(verb: str, args: Sequence[str]) -> Any:
    """The `Trained` that the first argument names, on this process's device; None for images."""
    from erw.data.sources import BUILT_IN
    from erw.interop import kind_of, open_model

    def opened(run: RunDir, *, checkpoint: str = "last", layout: str = "auto") -> Any:
        return open_model(run, checkpoint=checkpoint, layout=layout, device=current().device)

    name = first(verb, args, "a run (or images)")
    if name and kind_of(name):
        return peek(verb, opened, args)
    if name and name not in BUILT_IN and not Path(name).exists():
        raise FileNotFoundError(f"{name} is neither a run nor images; there is nothing there")
    return None


def recipe_of(verb: str, args: Sequence[str]) -> Run:
    """The recipe that `args` begin with, or its twin with --tiny.

    `--plan.align.N.` with the number after the last alignment term adds a term: a copy of that one.
    """
    from erw.plan import Align
    from erw.recipes import recipe, tiny

    run = recipe(first(verb, args, "a recipe (erw show lists them)") or "quickstart")
    run = tiny(run) if "--tiny" in args else run
    for word in args:
        terms, count = run.plan.align, len(run.plan.align)
        if word.startswith(f"--plan.align.{count}."):
            last = terms[-1] if terms else Align(block=min(8, run.model.depth))
            new = dataclasses.replace(last, name=f"align{count}" if terms else "align")
            run = run.replace(plan=dataclasses.replace(run.plan, align=(*terms, new)))
    return run


def first(verb: str, args: Sequence[str], what: str) -> str | None:
    """The first argument, which the defaults of the others depend on; None: --help alone."""
    if args and not args[0].startswith("-"):
        return args[0]
    if HELP & set(args):
        return None
    raise ConfigError(f"erw {verb} needs {what} first; see erw {verb} --help")


def peek(verb: str, function: Callable[..., Any], args: Sequence[str]) -> Any:
    """Call the function with those of `args` that it knows, before the others have defaults."""
    args = [word for word in args if word not in HELP]
    return _parse(verb, bound(function), args, add_help=False, return_unknown_args=True)[0]()


def print_completion(verbs: Mapping[str, Callable[..., Any]], shell: str) -> None:
    """Print a script that completes the verbs and their options in bash, zsh or tcsh."""
    words = ["--tyro-print-completion", shell]
    tyro.extras.subcommand_cli_from_dict(
        {verb: bound(function) for verb, function in verbs.items()},
        prog="erw", args=words, registry=REGISTRY, config=CONFIG,
    )  # fmt: skip


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same options, which give the function with its arguments but do not run it yet."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(function, *args, **kwargs)

    signature = inspect.signature(function)
    options = [p for name, p in signature.parameters.items() if name not in GIVEN]
    bind.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return bind


def _parse(verb: str, function: Callable[..., Any], args: Sequence[str], **options: Any) -> Any:
    """What tyro makes of `args`; its box around an error becomes one line with the nearest name."""
    box = io.StringIO()
    options |= {"prog": f"erw {verb}", "registry": REGISTRY, "config": CONFIG}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(function, args=args, **options)
    except SystemExit as end:
        if not end.code:
            raise
    text = re.sub(r"\x1b\[[\d;]*m|[╭╮╰╯│]", "", box.getvalue())
    _, message, *more = re.split("[─-]{4,}", text)
    near = re.search(r"Perhaps you meant:\s+(--\S+)", " ".join(more))
    message = re.sub(r"^Error parsing [^-]\S*: ", "", " ".join(message.split()))  # a record's own
    message = message.rstrip(".") + (f"; did you mean {near[1]}?" if near else "")
    raise ConfigError(f"{message}; see erw {verb} --help")


@REGISTRY.primitive_rule
def plain(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A switch with or without a value; `int | None` and the like, for which none is None."""
    kind, *others = getattr(info.type, "__args__", (info.type,))
    optional = kind in (int, float, str) and others == [type(None)]
    if not optional and info.type is not bool:
        return None

    def read(args: list[str]) -> Any:
        word = args[0].lower() if args and args[0] else ""  # a positional left out is [[]]
        if optional:
            return None if word in ("", "none") else kind(args[0])
        if word not in TRUTH:
            raise ValueError(f"expected true or false, got {args[0]!r}")
        return TRUTH[word]

    return PrimitiveConstructorSpec(
        nargs=1 if optional else (0, 1),
        metavar=f"{kind.__name__.upper()}|none" if optional else "true|false",
        instance_from_str=read,
        is_instance=lambda value: (optional and value is None) or isinstance(value, kind),
        str_from_instance=lambda value: [typed(value)],
    )


def typed(value: Any) -> str:
    """A value as one types it; an empty list is the option alone."""
    text = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return text.lower() if text in ("True", "False", "None") else text


def as_options(settings: dict[str, Any]) -> Iterator[str]:
    """Every setting of a record's dictionary, and of those inside it, as it is typed."""
    for name, value in flat(settings).items():
        yield f"--{name.replace('_', '-')} {typed(value)}".rstrip()
