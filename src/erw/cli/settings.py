"""The command line by tyro: a verb is a typed function, a settings record is its dotted options."""

import contextlib
import dataclasses
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from erw.config import Run, flat
from erw.data import BUILT_IN
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
FIELD = re.compile(r"((?:^    # .*\n)*)^    (\w+): .*?(?:  # (.*))?$", re.M)
"""The comments above a record's field, its name, and the comment beside it."""
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
    for parameter in parameters.values():
        explain(parameter.annotation)
    with contextlib.ExitStack() as stack:
        if "model" in parameters and (model := model_of(verb, function, args, stack)):
            sampler = dataclasses.asdict(model.run.sample)
            draw = dataclasses.replace(parameters["draw"].default, **sampler)
            defaults |= {"model": model, "draw": draw}
        args = ["--help"] if HELP & set(args) else args
        given = {name: defaults.pop(name) for name in GIVEN if name in defaults}
        _parse(verb, functools.partial(bound(function), **defaults), args)(**given)


def model_of(
    verb: str, function: Callable[..., Any], args: Sequence[str], stack: contextlib.ExitStack
) -> Any:
    """The `Trained` that the first argument names, on the device of this process, which joins the
    others within `stack`; None for images. What is typed wrong is said before torch is imported."""
    if (name := first(verb, args, "a run (or images)")) is None:
        return None
    if not HELP & set(args):
        _parse(verb, bound(function), args)
    required(name)
    from erw.dist import world
    from erw.interop import kind_of, open_model

    device = stack.enter_context(world()).device

    def opened(run: RunDir, *, checkpoint: str = "last", layout: str = "auto") -> Any:
        return open_model(run, checkpoint=checkpoint, layout=layout, device=device)

    return peek(verb, opened, args) if kind_of(name) else None


def required(*names: str) -> None:
    """Raises FileNotFoundError for a name of nothing that is there, before torch is imported."""
    for name in names:
        if not Path(name).expanduser().exists() and name not in BUILT_IN:
            made = "erw prepare makes a cache, erw train a run"
            raise FileNotFoundError(f"there is nothing at {name} ({made})")


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
    for function in verbs.values():
        for parameter in inspect.signature(function).parameters.values():
            explain(parameter.annotation)
    with trusted_defaults():
        tyro.extras.subcommand_cli_from_dict(
            {verb: bound(function) for verb, function in verbs.items()},
            prog="erw", args=words, registry=REGISTRY, config=CONFIG,
        )  # fmt: skip


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same options, which give the function with its arguments but do not run it yet."""

    def bind(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(function, *args, **kwargs)

    bind.__doc__, signature = function.__doc__, inspect.signature(function)
    options = [p for name, p in signature.parameters.items() if name not in GIVEN]
    bind.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    bind.__annotations__ = {option.name: option.annotation for option in options}
    return bind


def explain(kind: Any) -> None:
    """Make the comments of a record's fields their help; tyro takes far longer to find them."""
    record = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    for part in get_type_hints(kind).values() if record else get_args(kind):
        explain(part)
    for base in kind.__mro__ if record else ():
        if fields := vars(base).get("__dataclass_fields__"):
            lines = Path(inspect.getfile(base)).read_text("utf-8")
            _, _, lines = lines.partition(f"\nclass {base.__name__}")
            for above, name, beside in FIELD.findall(re.split(r"\n(?=\S)", lines)[0]):
                text = beside or " ".join(above.replace("    # ", "").split("\n")).strip()
                fields[name].metadata = {**fields[name].metadata, "help": text}


@contextlib.contextmanager
def trusted_defaults() -> Iterator[None]:
    """tyro does not ask whether defaults have their types: to import typeguard for that would take
    a third of its time."""
    trusting: Any = SimpleNamespace(check_type=lambda value, kind: value, TypeCheckError=TypeError)
    typeguard = sys.modules.setdefault("typeguard", trusting)
    try:
        yield
    finally:
        if typeguard is trusting:
            del sys.modules["typeguard"]


def _parse(verb: str, function: Callable[..., Any], args: Sequence[str], **options: Any) -> Any:
    """What tyro makes of `args`; its box around an error becomes one line with the nearest name."""
    box = io.StringIO()
    options |= {"prog": f"erw {verb}", "registry": REGISTRY, "config": CONFIG}
    try:
        with contextlib.redirect_stderr(box), trusted_defaults():
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
