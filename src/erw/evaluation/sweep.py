"""Which sampling settings score best, in rounds: all with few images, the best few again.

A round draws the same seeds for each of its settings, so that they differ in nothing else, and
seeds that no earlier round had, so that luck does not win twice. Scores of few images are biased;
they are compared within a round alone.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from erw.config import Grid, Sample, to_dict
from erw.errors import ConfigError
from erw.evaluation.callback import HIGHER
from erw.evaluation.evaluate import evaluate
from erw.io import weight_hash, write_json
from erw.sampling import generate
from erw.training.trained import Trained


class Candidate(NamedTuple):
    """Settings to try: the name of an average of the weights, a sampler, and whether the weaker
    model guides in place of the null class."""

    average: str
    sample: Sample
    weak: bool


Row = dict[str, Any]
"""`round`, `images`, `average`, `weights`, `weak`, `metric`, `sample` (its settings), `score`."""


def candidates(
    models: dict[str, Trained], grid: Grid, sample: Sample, *, weak: bool
) -> list[Candidate]:
    """All settings of the grid that differ in effect. ConfigError where there is one alone."""
    model = next(iter(models.values()))
    classes = bool(model.num_classes * model.run.data.class_dropout)
    path = bool(model.run.plan.routing.path_drop)
    kinds = ["class"] * classes + ["path"] * path + ["weak"] * weak
    scales = grid.scales if kinds else (1.0,)
    internals = grid.internals if getattr(model.net, "internal", 0) else (1.0,)
    candidates: dict[Candidate, None] = {}
    tried = product(models, kinds or ["class"], scales, internals, grid.until)
    for name, kind, scale, internal, end in tried:
        kind = "class" if scale == 1 else kind
        changes: dict[str, Any] = {"guidance": scale, "internal": internal}
        changes |= {"guide": "path" if kind == "path" else "class"}
        changes |= {"interval": (0.0, end if scale != 1 else 1.0)}
        changes |= {"internal_interval": (0.0, end if internal != 1 else 1.0)}
        candidates[Candidate(name, replace(sample, **changes), kind == "weak")] = None
    if len(candidates) == 1:
        raise ConfigError(
            "nothing to sweep: the model has no kind of guidance, and no --ema widths"
        )
    return list(candidates)


def sweep(
    models: dict[str, Trained], grid: Grid, sample: Sample, *, path: Path, reference: Any,
    weak: Trained | None = None, progress: Callable[[Row], object] = lambda row: None,
    **options: Any,
) -> list[Row]:  # fmt: skip
    """Rows of all rounds; the last is the best one of the last round.

    Args:
        models: averages of one model's weights by name.
        sample: what the grid does not vary.
        path: a JSON file of rows; those that it has are not drawn again.
        reference: as for `erw.evaluate`.
        progress: called with every row.
        options: of `erw.generate`, such as batch_size.
    """
    todo, rows, first = candidates(models, grid, sample, weak=weak is not None), [], 0
    hashes = {name: weight_hash(model.net) for name, model in models.items()}
    done: list[Row] = json.loads(path.read_text()) if path.exists() else []
    for number in range(grid.rounds):
        seeds = range(first, first := first + grid.images * 2**number)
        scored: list[tuple[float, int, Row]] = []
        for order, (average, settings, guided) in enumerate(todo):
            row: Row = {"round": number + 1, "images": len(seeds), "average": average}
            row |= {
                "weights": hashes[average],
                "weak": guided,
                "metric": grid.metric,
                "sample": to_dict(settings),
            }
            row = json.loads(json.dumps(row))
            result = next((old for old in done if row.items() <= old.items()), None)
            if result is None:
                own = to_dict(settings) | {"autoguidance": weak if guided else None}
                drawn = generate(models[average], seeds, **own, **options)
                scores = evaluate(drawn, reference=reference, metric=grid.metric)
                result = row | {"score": next(iter(scores.values.values()))}
                done.append(result)
                write_json(path, done)
            progress(result)
            sense = -1 if grid.metric.startswith(HIGHER) else 1
            scored.append((sense * result["score"], order, result))
        scored.sort()
        rows += [row for *_, row in reversed(scored)]
        todo = [todo[order] for _, order, _ in scored[: grid.kept(len(todo))]]
    return rows
