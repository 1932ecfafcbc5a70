"""What a study or a run leaves behind, read into records: `results.json` and `metrics.jsonl`.

`results.json` holds everything the report draws (pictures lie beside it, by relative path), so that
a committed result can be looked at without the run that made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from erw.errors import DataError
from erw.io import write_text

ROW_KEYS = (
    "method",
    "seed",
    "step",
    "images",
    "flops_total",
    "flops_warmup",
    "flops_teacher",
    "seconds",
    "fd_lite2",
    "loss",
    "align",
)
CURVE_KEYS = ("step", "images", "flops_total", "seconds", "loss", "flow", "align", "align_weight")
CURVE_POINTS = 160  # more are not seen on a page and only make the file long


class Row(NamedTuple):
    """One method, one seed, one evaluation point. Costs are totals since the first step.

    `seconds` is training time: evaluation and preparation are not in it. `loss` (flow matching, so
    that methods compare) and `align` are means over the training steps since the point before; None
    where the loss was not computed.
    `picture` is the sample grid, relative to the results file; `fraction` the share of the budget.
    """

    method: str
    seed: int
    step: int
    images: int
    flops_total: int
    flops_warmup: int
    flops_teacher: int
    seconds: float
    fd_lite2: float
    loss: float | None
    align: float | None
    fraction: float | None = None
    picture: str | None = None
    eval_seconds: float | None = None


@dataclass(frozen=True)
class Results:
    """A study's outcome. `curves` has one entry per "method/seed", lists of equal length per key.

    `ledger` is per method what a step costs by part (see `erw.study.budget`), `floors` the scores
    that no method is expected to beat, `pictures` images of no method (held out, through the VAE).
    """

    rows: tuple[Row, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    attribution: str = ""
    title: str = ""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in the order of their first row or, without rows, of their curves."""
        names = [row.method for row in self.rows] or [key.split("/")[0] for key in self.curves]
        return tuple(dict.fromkeys(names))

    def seeds(self, method: str) -> tuple[int, ...]:
        """The seeds that a method was run with, in order."""
        return tuple(sorted({row.seed for row in self.rows if row.method == method}))

    def of(self, method: str, seed: int) -> tuple[Row, ...]:
        """The rows of one run by step."""
        rows = [row for row in self.rows if row.method == method and row.seed == seed]
        return tuple(sorted(rows, key=lambda row: row.step))


def write_results(results: Results, path: str | Path) -> None:
    """Write `results.json` beside its name, then rename, so that no reader meets half a file."""
    content = asdict(results)
    content["rows"] = [row._asdict() for row in results.rows]
    write_json(content, path)


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON beside its name, then rename. NaN is refused: such a result is a bug."""
    write_text(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_results(path: str | Path) -> Results:
    """Read `results.json` (or the folder that holds it).

    Raises FileNotFoundError if it is absent and DataError if it is cut short or lacks a key.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise DataError(
            f'{path} is no study result: expected {{"rows": [...]}}; run `erw study demo` anew'
        )
    rows = tuple(
        row_from(entry, where=f"{path}, row {i}") for i, entry in enumerate(content.pop("rows"))
    )
    known = set(Results.__dataclass_fields__)
    unknown = sorted(set(content) - known)
    if unknown:
        raise DataError(
            f"{path} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
    return Results(rows=rows, **content)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; FileNotFoundError or DataError name the file and the place."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: nothing was finished there yet")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        place = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "its bytes"
        raise DataError(
            f"{path} is damaged at {place}; delete it and run the same command again"
        ) from None


def row_from(entry: Mapping[str, Any], *, where: str) -> Row:
    """A checked `Row`; DataError says which key of which row is missing or unknown."""
    missing = [key for key in ROW_KEYS if key not in entry]
    unknown = [key for key in entry if key not in Row._fields]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown key {unknown[0]!r}"
        raise DataError(f"{where} {what}; a row has {', '.join(Row._fields)}")
    return Row(**entry)


def read_metrics(run: str | Path, *, empty: bool = False) -> tuple[dict[str, Any], ...]:
    """The training lines of a run folder's `metrics.jsonl`, by step; `window` is the steps of each.

    Raises FileNotFoundError if there is none and DataError if a line is cut short or out of order,
    or if there is no line, unless `empty` allows that.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics.jsonl in {run}: it is not the folder of a training run"
        )
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            advice = "run the same train command again, which repairs it"
            raise DataError(f"{path}, line {number} is cut short or damaged; {advice}") from None
        if not isinstance(line, dict) or line.get("kind") != "train":
            continue
        absent = [key for key in ("step", "flops_total", "seconds", "loss") if key not in line]
        if absent:
            raise DataError(
                f"{path}, line {number} has no {absent[0]!r}: written by another version?"
            )
        if lines and line["step"] <= lines[-1]["step"]:
            raise DataError(
                f"{path}, line {number}: step {line['step']} follows {lines[-1]['step']}"
            )
        before = lines[-1]["step"] if lines else 0
        lines.append(line | {"window": line["step"] - before})
    if not lines and not empty:
        raise DataError(f"{path} has no training line yet; train first, then report")
    return tuple(lines)


def curve_from(
    lines: Sequence[Mapping[str, Any]], *, points: int = CURVE_POINTS
) -> dict[str, list[Any]]:
    """Metrics lines averaged in about `points` bins; positions are a bin's last, values its mean.

    A bin never holds steps of both phases, so the boundary stays where it was. Key "warmup" says
    for each bin whether it lies in warm-up.
    """
    curve: dict[str, list[Any]] = {key: [] for key in (*CURVE_KEYS, "warmup")}
    for part in _bins(lines, points):
        last = part[-1]
        for key in CURVE_KEYS[:4]:
            curve[key].append(last.get(key))
        for key in CURVE_KEYS[4:]:
            curve[key].append(mean_of(part, key))
        # The log says 0 for a loss that was not computed; a curve has nothing there.
        if is_warmup(last):
            curve["flow"][-1] = None
        if not curve["align_weight"][-1]:
            curve["align"][-1] = None
        curve["warmup"].append(is_warmup(last))
    return curve


def is_warmup(line: Mapping[str, Any]) -> bool:
    """Whether a metrics line belongs to phase 1."""
    return line.get("phase") == "warmup"


def mean_of(lines: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Mean of a key over the steps of the lines that have a number there; None if none has."""
    found = [(line[key], line.get("window", 1)) for line in lines if line.get(key) is not None]
    steps = sum(window for _, window in found)
    return sum(value * window for value, window in found) / steps if steps else None


def _bins(lines: Sequence[Mapping[str, Any]], points: int) -> list[Sequence[Mapping[str, Any]]]:
    """Consecutive groups of lines, near-equal in steps, split at the phase boundary."""
    size = max(1, -(-len(lines) // points))
    groups: list[Sequence[Mapping[str, Any]]] = []
    for warm in (True, False):
        part = [line for line in lines if is_warmup(line) is warm]
        cut = [part[start : start + size] for start in range(0, len(part), size)]
        # A last bin of a few steps would be noise at the end of the line.
        if len(cut) > 1 and 2 * _steps(cut[-1]) < _steps(cut[-2]):
            cut[-2:] = [[*cut[-2], *cut[-1]]]
        groups += cut
    return groups


def _steps(lines: Sequence[Mapping[str, Any]]) -> int:
    return sum(line.get("window", 1) for line in lines)
