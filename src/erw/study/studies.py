"""Studies as values: rows of runs, what the paper says of them, what it claims. Those with names
stand in `studies.toml`, written for the paper's setting, from which the small one is derived.

    Study("mine", "Depths", rows=grid(recipe("quickstart"), {"plan.depth": (1, 2, 4)}))
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from erw import recipes, training
from erw.config import Eval, Run, flat, from_dict, to_dict
from erw.errors import ConfigError, nearest
from erw.plan import Align
from erw.settings import Settings, ranged

SMALL = "quickstart"
"""The small setting: recipes of this name and `_sit`, `_repa` and others behind it."""
DEFINED: dict[str, Any] = tomllib.loads(Path(__file__).with_name("studies.toml").read_text())
STUDIES = tuple(DEFINED)
ADM = "VIRTUAL_imagenet256_labeled.npz"
"""ADM's reference batch, in the current folder."""
LONG = 10**9
"""Steps that no budget buys."""
PAPER = ("FID", "sFID", "IS", "Prec.", "Rec.")
"""The numbers of a row in the papers, on ImageNet at 256."""


@dataclass(frozen=True)
class Row(Settings):
    """A line of a study's table. Rows of the same run are trained once."""

    label: str  # unique in the study
    run: Run | None = None  # whose name is a recipe's; None: the row is quoted, not run
    paper: tuple[float, ...] = ()  # as many of `PAPER` as are published
    at: int | None = ranged(None, "[1, inf)")  # the step whose numbers it shows; None: the last
    # share of the study's FLOPs that its warm-up has, in place of plan.warmup, if all cost the same
    share: float = ranged(0.0, "[0, 1)")
    start: str = ""  # label of the row whose model it begins with (fine-tuning); empty: fresh
    groups: tuple[str, ...] = ()  # of the built-in images, that it is trained on; empty: all
    points: tuple[int, ...] = ()  # steps at which it is scored; empty: evenly over full training


@dataclass(frozen=True)
class Study(Settings):
    """Runs that are compared."""

    name: str
    title: str  # of its page
    claim: str = ""  # the paper's, in a sentence
    rows: tuple[Row, ...] = ()
    better: tuple[tuple[str, str], ...] = ()  # claimed: the first row ends better than the second
    metric: str = "fd_lite2"  # the score that the verdict is by
    seeds: tuple[int, ...] = (0,)  # every run is trained once with each
    scale: Literal["small", "full"] = "small"
    # with one seed, two scores whose difference is within this share of them are not told apart
    noise: float = ranged(0.05, "[0, 1)")
    equal: bool = False  # every run ends at the total FLOPs of the first, warm-up and all
    # as many steps as end within these minutes, which are timed, in place of the rows' own; 0: not
    minutes: float = ranged(0.0, "[0, inf)")
    # successive halving: so often the worse half of the rows drops out, by the first seed, after
    # ..., a quarter, a half of the FLOPs of a study where all cost the same
    halvings: int = ranged(0, "[0, 6]")
    points: int = ranged(4, "[1, inf)")  # scores of a run
    probed: int = ranged(1000, "[0, inf)")  # images that hidden states are probed on; 0: none
    images: int = ranged(2048, "[2, inf)")  # in the cache of the built-in images
    figure: Literal["score", "blocks", "samples"] = "score"
    small: bool = False  # every recipe's tiny twin, for a check of the machinery alone

    def __post_init__(self) -> None:
        super().__post_init__()
        labels = [row.label for row in self.rows]
        if not labels or len({folder_of(label, 0) for label in labels}) < len(labels):
            raise ConfigError(f"study {self.name}: its rows {labels} need a name each")
        named = [*(x for pair in self.better for x in pair), *(row.start for row in self.rows)]
        if unknown := [name for name in named if name and name not in labels]:
            raise ConfigError(
                f"study {self.name}: no row {unknown[0]!r}{nearest(unknown[0], labels)}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study.seeds {self.seeds}: give at least one, and each once")

    def changed(self, change: Callable[[Run], Run]) -> "Study":
        """The study with every run changed."""
        return replace(self, rows=tuple(replace(r, run=r.run and change(r.run)) for r in self.rows))


def folder_of(label: str, seed: int) -> str:
    """The name of a run's folder: "repa-stopped-0" for seed 0 of "REPA, stopped"."""
    return f"{re.sub(r'[^a-z0-9.+]+', '-', label.lower()).strip('-')}-{seed}"


def with_settings(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run with settings changed by their dotted names, as in {"plan.align.0.block": 8}.

    Raises ConfigError: no such setting, or an impossible value.
    """
    record: dict[str, Any] = json.loads(json.dumps(to_dict(run)))
    for name, value in changes.items():
        place: Any = record
        *path, last = (int(part) if part.isdecimal() else part for part in name.split("."))
        try:
            for part in path:
                if isinstance(place, list) and part == len(place):  # one more alignment term
                    place.append(to_dict(Align(name=f"align{part}", block=1)))
                place = place[part]
            place[last], _ = value, place[last]
        except (LookupError, TypeError) as error:
            hint = nearest(name, flat(to_dict(run)))
            raise ConfigError(f"recipe {run.name} has no setting {name}{hint}") from error
    return from_dict(Run, record)


def values_of(word: str) -> tuple[str, list[Any]]:
    """Setting and values of "plan.depth=3,4,5". Raises ConfigError for anything else."""

    def value(text: str) -> Any:
        try:
            return None if text == "none" else json.loads(text)
        except json.JSONDecodeError:
            return text

    name, _, text = word.partition("=")
    if not (name and text):
        raise ConfigError(f"{word!r} is no setting: expected NAME=VALUE, as in plan.depth=3,4,5")
    return name, [value(part) for part in re.split(r",(?![^\[]*\])", text)]


def grid(run: Run, axes: Mapping[str, Sequence[Any]]) -> tuple[Row, ...]:
    """A row for every combination of values of some settings. Raises as `with_settings`."""
    return tuple(
        Row(", ".join(f"{k.removeprefix('plan.')} {v}" for k, v in one.items()), changed)
        for values in product(*axes.values())
        for one in [dict(zip(axes, values, strict=True))]
        for changed in [with_settings(run, one)]
    )


def study_plan(
    name: str, *, scale: str = "small", steps: int | None = None, small: bool = False
) -> Study:
    """The study of that name; `steps`: of full training in the small setting, in place of its own;
    `small`: with tiny twins.

    Raises ConfigError if there is none, with the nearest.
    """
    for kind, value, known in (("study", name, DEFINED), ("scale", scale, ("small", "full"))):
        if value not in known:
            raise ConfigError(f"no {kind} {value!r}{nearest(value, known)}")
    entry = {k: v for k, v in DEFINED[name].items() if k not in ("in_small", "in_full")}
    entry |= DEFINED[name].get(f"in_{scale}", {}) | {"name": name, "scale": scale}
    entry.setdefault("metric", "fid" if scale == "full" else "fd_lite2")
    entry["small"] = small or entry.get("small", False)
    own, eval_, size = entry.pop("steps"), entry.pop("eval", {}), entry.pop("size", "xl")
    unit = entry.pop("unit", own)
    ratio = 1.0 if scale == "full" else (steps or own) / unit
    rows = [_row(dict(row), entry, ratio, unit, size, eval_) for row in entry["rows"]]
    return from_dict(Study, entry | {"rows": [to_dict(row) for row in rows]})


def _row(
    row: dict[str, Any], study: dict[str, Any], ratio: float, unit: int, size: str,
    scoring: dict[str, Any],
) -> Row:  # fmt: skip
    """A row of `studies.toml`, whose depths and steps are the paper's, in the study's setting."""
    kind, full_scale = row.pop("kind", None), study["scale"] == "full"
    by_scale = {scale: row.pop(scale, {}) for scale in ("small", "full")}
    settings = flat(row.pop("set", {})) | flat(by_scale[study["scale"]])
    if kind is None:
        return from_dict(Row, row)
    full, small = recipes.recipe(f"sit_{size}2_in256_base"), recipes.recipe(f"{SMALL}_sit")
    depth = 1.0 if full_scale else small.model.depth / full.model.depth

    def scaled(name: str, value: Any) -> Any:
        last = name.rpartition(".")[2]
        if last in ("steps", "warmup", "over", "at") and value:
            return max(1, round(value * ratio))
        blocks = ("depth", "block", "target_block", "warmup_first", "internal")
        part = last in blocks and value and name not in ("model.depth", "sample.internal")
        return max(1, round(value * depth)) if part else value

    name = f"sit_{size}2_in256_{'base' if kind == 'sit' else kind}" if full_scale else SMALL
    name += "" if full_scale else "_repa" if kind == "erw" else f"_{kind}"
    run = recipes.recipe(name if name in recipes.names() else kind).replace(steps=LONG)
    if kind == "erw" and not full_scale:
        plan = flat({"plan": to_dict(recipes.recipe(f"sit_{size}2_in256_erw").plan)})
        run = with_settings(run, {name: scaled(name, value) for name, value in plan.items()})
    steps = scaled("steps", settings.pop("steps", unit))
    run = with_settings(run, {name: scaled(name, value) for name, value in settings.items()})
    if study["small"]:
        # A little more than tiny: else the teacher alone would cost more than the budget.
        name, run = run.name, recipes.tiny(run)
        model, data = replace(run.model, width=64), replace(run.data, batch_size=32)
        run = run.replace(name=name, model=model, data=data)
    every, warmup = max(1, steps // study.get("points", 4)), run.plan.warmup
    if full_scale:
        options: dict[str, Any] = {"samples": 50_000, "metric": ("adm",), "reference": ADM}
    else:
        # The built-in held-out images have no class tokens to be validated with.
        options = {"loss": 0 if run.model.needs_token else every, **scoring}
    scored = Eval(every=every, keep_best=False, **options)
    run = run.replace(steps=warmup + steps, eval=scored)
    at = {"at": warmup + scaled("at", row["at"])} if "at" in row else {}
    return from_dict(Row, row | at | {"run": to_dict(run)})


def settled(
    study: Study, ledger_of: Callable[[Run], "training.Ledger"], part: float = 1.0
) -> Study:
    """The study with the steps that cost what it says, up to a `part` of the budget, and scores
    after equal shares of it. Raises ConfigError where some are none, or end within a warm-up."""
    if not study.equal:
        return study
    first = next(row.run for row in study.rows if row.run)
    # A ledger sees schedules end within the run: give it more steps than any budget buys.
    budget = ledger_of(first.replace(steps=LONG)).spent(first.steps).total

    def fitted(row: Row) -> Row:
        if row.run is None:
            return row
        run = row.run.replace(steps=LONG)
        if row.share:
            long = run.replace(plan=replace(run.plan, warmup=run.steps))
            warmup = max(1, ledger_of(long).steps_for(budget * row.share))
            run = run.replace(plan=replace(run.plan, warmup=warmup))
        points = shares(ledger_of(run), budget * part, study.points, row.label)
        return replace(row, run=run.replace(steps=points[-1]), points=points)

    return replace(study, rows=tuple(map(fitted, study.rows)))


def shares(ledger: "training.Ledger", budget: float, count: int, label: str) -> tuple[int, ...]:
    """The last steps whose total cost is within 1, 2, ... `count` equal parts of `budget` FLOPs,
    of those in full training.

    Warm-up, projector and teacher are counted. Raises ConfigError if two coincide or none is left.
    """
    every = [ledger.steps_for(budget * i / count) for i in range(1, count + 1)]
    points = tuple(step for step in every if step > ledger.plan.warmup)
    if not points or len({0, *every}) <= count:
        problem = f"the points {tuple(every)} of {label} are not {count} different steps"
        hint = "give more steps or fewer points"
        raise ConfigError(f"{problem} after its warm-up of {ledger.plan.warmup}; {hint}")
    return points
