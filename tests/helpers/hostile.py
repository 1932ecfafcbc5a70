"""JSON as a stranger might have written it: each value of a record replaced by others, by rule."""

import copy
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (None, -1, "x", [], {}, 1e9, 10**9, "delete")


def variants(record: Any) -> Iterator[tuple[str, Any]]:
    """(what was done, the record) for every value in it at any depth and every one of `VALUES`."""
    for path in paths(record):
        for value in VALUES:
            changed = copy.deepcopy(record)
            at = changed
            for key in path[:-1]:
                at = at[key]
            if value == "delete":
                del at[path[-1]]
            else:
                at[path[-1]] = value
            yield f"{'.'.join(map(str, path))} = {value!r}", changed


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values; of a list's items the first alone."""
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from paths(inner, (*path, key))
