"""The command line: `erw VERB ...` parses, calls public functions and prints what came of it.

Exit codes: 0 all well; 1 a bug of ours, with its traceback; 2 input that can be mended, with one
line on stderr; 3 a loss or gradient that is not finite; 4 a process hangs; 75 stopped
by SIGTERM or SIGUSR1, after saving: a queue may start the same command again; 130 interrupted,
after saving.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import erw
from erw.errors import ConfigError, ErwError, NumericsError, Preempted, nearest

# verb -> usage and what it does; its module, of the same name, is imported when it is called, and
# torch when it begins to work: help and what is typed wrong are answered without.
VERBS = {
    "train": ("RECIPE --out DIR", "train a recipe; the same command resumes"),
    "prepare": ("IMAGES --out DIR", "images -> cache of latents and features"),
    "sample": ("RUN --out DIR", "draw images from a trained run"),
    "eval": ("RUN|IMAGES", "score samples or images against a reference"),
    "ema": ("RUN --sigma-rel S --out F", "average a run's weights afterwards"),
    "memory": ("RUN|IMAGES", "the nearest training image of every sample"),
    "analyze": ("RUN...", "what runs know at which depth, noise and step"),
    "encoders": ("[--rank IMAGES]", "list encoders, or rank them on some images"),
    "report": ("RUN... --out FILE", "one page of plots from runs or a study"),
    "show": ("[RECIPE]", "list recipes, or one with its settings and cost"),
    "cost": ("RECIPE", "FLOPs by part, memory and time on a named GPU"),
    "bench": ("RECIPE", "time its training steps on this machine"),
    "convert": ("IN OUT --to LAYOUT", "weights in a released layout"),
    "export": ("RUN|CHECKPOINT --out DIR", "a folder for diffusers or the hub"),
    "doctor": ("RUN", "what looks off with a run, and the usual causes"),
    "search": ("RECIPE --out DIR", "the best of some settings by short trials"),
    "study": ("NAME --out DIR", "train and compare runs; the paper's tables"),
}
USAGE = (
    "usage: erw VERB ... [--help]\n\n"
    + "\n".join(f"  {f'{verb} {args}':<34}{text}" for verb, (args, text) in VERBS.items())
    + "\n\n`erw train RECIPE --help` lists all settings of a recipe with their values."
    "\n`erw train ... --engine slurm` makes a job of a command; prepare and eval too."
    "\n`source <(erw --completion bash)` completes verbs and options; zsh and tcsh too."
    "\nexit codes: 0 well, 1 a bug, 2 bad input, 3 loss or gradient not finite, 4 a process"
    "\nthat hangs, 75 preempted, 130 interrupted"
)
QUEUED = ("train", "prepare", "eval")
"""Verbs that `--engine slurm` makes a job of; `study` has the option itself."""
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give back its exit code (see the module)."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        dispatch(args)
        return 0
    except SystemExit as done:  # --help ends so
        return int(done.code or 0)
    except Preempted as stop:
        return fail(f"preempted: {stop}", 75)
    except KeyboardInterrupt as stop:
        return fail(f"interrupted: {str(stop) or 'the same command goes on'}", 130)
    except BrokenPipeError:  # the reader of a pipe such as `erw show | head` went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NumericsError as error:
        return fail(f"error: {error}", 3)
    except Exception as error:
        if isinstance(error, (ErwError, OSError)) or "No space left on device" in str(error):
            return fail(f"error: {describe(error)}", 2)
        traceback.print_exc()
        return fail(f"this is a bug in erw {erw.__version__}: please report the above", 1)


def dispatch(args: list[str]) -> None:
    """Call the verb's function with the rest of the arguments."""
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(USAGE)
    elif verb == "--version":
        print(f"erw {erw.__version__}")
    elif verb == "--completion":
        from erw.cli.settings import print_completion

        print_completion({v: function_of(v) for v in VERBS}, rest[0] if rest else "bash")
    elif verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
    elif verb in QUEUED and "--engine" in rest:
        queue(verb, rest)
    elif main := getattr(module_of(verb), "main", None):
        main(rest)
    else:
        from erw.cli.settings import call

        call(verb, function_of(verb), rest)


def queue(verb: str, args: list[str]) -> None:
    """Make a job of a command that has `--engine slurm`, and say which.

    Raises ConfigError: no such engine, or options that submitit has not.
    """
    from pathlib import Path

    from erw.study.engines import submit, torchrun_words
    from erw.study.studies import values_of

    at = args.index("--engine")
    engine, rest, options = args[at + 1 : at + 2], args[:at] + args[at + 2 :], list[str]()
    if engine != ["slurm"]:
        raise ConfigError(f"--engine {' '.join(engine)}: expected slurm")
    if "--engine-options" in rest:
        first = rest.index("--engine-options")
        last = next((i for i in range(first + 1, len(rest)) if "=" not in rest[i]), len(rest))
        options, rest = rest[first + 1 : last], rest[:first] + rest[last:]
    parameters = {name: values[0] for name, values in map(values_of, options)}
    logs = Path("logs")
    words = [*torchrun_words(int(parameters.get("gpus_per_node", 0))), verb, *rest]
    job = submit(words, logs, {"name": f"erw-{verb}", **parameters})
    print(f"job {job.job_id}, logs in {logs / str(job.job_id)}; queued again where it is preempted")


def module_of(verb: str) -> Any:
    return importlib.import_module(f"erw.cli.{verb}")


def function_of(verb: str) -> Callable[..., Any]:
    return getattr(module_of(verb), "evaluate" if verb == "eval" else verb)


def describe(error: Exception) -> str:
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    more = "; free some space, then run the same command again" * (error.errno in FULL_DISK)
    return f"{error.filename}: " * bool(error.filename) + error.strerror + more


def fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
