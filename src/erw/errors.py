"""Errors meant for the user: one line that says what was wrong, where, and what to do next."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ErwError(Exception):
    """Base of every error that a user can cause and mend; scripts may catch this one."""


class ConfigError(ErwError, ValueError):
    """A setting is unknown, of the wrong type or impossible."""


class DataError(ErwError, ValueError):
    """Images, labels or a data source are missing or unusable."""


class CacheError(ErwError, ValueError):
    """A prepared cache is missing, cut short or made for something else."""


class CheckpointError(ErwError, ValueError):
    """A checkpoint or weights file is missing, damaged or belongs to another model."""


class Preempted(KeyboardInterrupt):
    """The system asked to stop (SIGTERM, SIGUSR1); the same command goes on."""


class NumericsError(ErwError, ArithmeticError):
    """A loss or gradient is not finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the closest of `known`, or the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


@contextmanager
def raised_as(kind: type[ErwError], what: str) -> Iterator[None]:
    """Raise any error of the block as `kind`: `what`, then the error's own text."""
    try:
        yield
    except Exception as error:  # of other libraries, which raise many types
        raise kind(f"{what} ({one_line(error)})") from error


def one_line(error: BaseException, most: int = 160) -> str:
    """What another library's error says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__
