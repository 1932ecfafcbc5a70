"""What records of settings share: the range of a number stands with its field."""

import dataclasses
from typing import Any

from erw.errors import ConfigError


def ranged(default: Any, interval: str) -> Any:
    """A field whose number, or numbers, lie in `interval`, such as "[1, inf)", unless None."""
    return dataclasses.field(default=default, metadata={"interval": interval})


class Settings:
    """Base of the frozen records; raises ConfigError for a number out of its range, or NaN.

    `group` names the record in messages; by default its class does.
    """

    group: str

    def __init_subclass__(cls, group: str = "") -> None:
        cls.group = group or cls.__name__.lower()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, interval = getattr(self, field.name), field.metadata.get("interval")
            if value is None or interval is None:
                continue
            low, high = map(float, interval[1:-1].split(","))
            for x in value if isinstance(value, tuple | list) else (value,):
                closed = (interval[0] == "[" and x == low) or (interval[-1] == "]" and x == high)
                if not closed and not (isinstance(x, int | float) and low < x < high):
                    problem = (
                        f"{self.group}.{field.name} is {value}; expected a number in {interval}"
                    )
                    raise ConfigError(problem)
