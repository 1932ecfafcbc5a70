"""Settings found by short trials: one after the other, by halving steps around the best so far, as
the paper finds depth, projection depth and weight (arXiv 2504.10188v3, appendix D.1: three to five
trials of 10K warm-up and 20K full steps for each).

A trial is an ordinary run in `OUT/trials`. Their numbers stand in a journal of Optuna, which
several processes share: the same command, started again beside the first, takes the next trial.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erw.config import Run, to_dict
from erw.errors import ConfigError
from erw.evaluation.callback import HIGHER, scoring, together
from erw.io import lock, write_bytes
from erw.log import read_metrics, say
from erw.sampling.preview import watched_steps
from erw.study.compare import label_of
from erw.study.plots import LIGHT, Line, lines_figure, to_bytes
from erw.study.results import METRICS
from erw.study.studies import with_settings
from erw.training.loop import train

Point = tuple[int, ...]
"""For each axis which of its values."""


def wanted(sizes: Sequence[int], scores: Mapping[Point, float]) -> list[Point]:
    """The points that are to be tried next, none where the search has ended.

    Axis by axis, the others held at the best so far: the middle value first, then those half of the
    rest away, a step that halves whenever both are worse.

    Args:
        sizes: how many values each axis has.
        scores: of the points that have been tried; the lower, the better.
    """
    at = tuple(size // 2 for size in sizes)
    if at not in scores:
        return [at]
    for axis, size in enumerate(sizes):
        step = max(1, size // 4)
        while step:
            near = [i for i in (at[axis] - step, at[axis] + step) if 0 <= i < size]
            points = [(*at[:axis], i, *at[axis + 1 :]) for i in near]
            if new := [point for point in points if point not in scores]:
                return new
            best = min([at, *points], key=scores.__getitem__)
            step = step // 2 if best == at else step
            at = best
    return []


def search(
    run: Run, axes: Mapping[str, Sequence[Any]], out: str | Path, *, trials: int
) -> dict[str, Any]:
    """Try settings of a run in the folder `out` until none is left or so many trials are made; the
    best as {name: value}. The same call goes on, also a trial that was killed.

    Args:
        axes: names of settings and their values in order, so that neighbours are alike.

    Raises ConfigError without Optuna, without scores, or for impossible settings.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError("erw search needs optuna: pip install 'erw[search]'") from error
    if not run.eval.every:
        raise ConfigError("a search needs scores: give --eval.every, such as the number of steps")
    out, names, sizes = Path(out), [*axes], [len(values) for values in axes.values()]
    sign = -1 if run.eval.metric[0].startswith(HIGHER) else 1
    for name, values in axes.items():
        for value in values:
            with_settings(run, {name: value})  # an impossible one is named before the first trial
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(out / "search.journal")))
    content = json.dumps([to_dict(run), dict(axes)])
    study = optuna.create_study(storage=storage, study_name="search", load_if_exists=True)
    if study.user_attrs.get("content", content) != content:
        raise ConfigError(f"{out} holds another search; choose another --out")
    study.set_user_attr("content", content)
    while True:
        scores = {
            tuple(trial.params[n] for n in names): trial.value
            for trial in study.get_trials(deepcopy=False)
            if trial.value is not None
        }
        points = wanted(sizes, scores) if len(scores) < trials else []
        if not points:
            break
        for point in points:
            setting = {n: axes[n][i] for n, i in zip(names, point, strict=True)}
            label = ", ".join(f"{n} {v}" for n, v in setting.items())
            folder = out / "trials" / "-".join(map(str, point))
            with lock(out / "trials" / f".{folder.name}.lock") as mine:
                if not mine:
                    continue  # another process is at it
                say(f"trial {len(scores) + 1} of {trials} at most: {label}")
                score = sign * _score(with_settings(run, setting), folder)
                study.enqueue_trial(dict(zip(names, point, strict=True)))
                trial = study.ask({
                    n: optuna.distributions.IntDistribution(0, size - 1)
                    for n, size in zip(names, sizes, strict=True)
                })  # fmt: skip
                study.tell(trial, score)
                say(f"{label}: {run.eval.metric[0]} {sign * score:.4g}")
                break
        else:
            say("all that is to be tried next is under way in other processes")
            break
    best = min(scores, key=scores.__getitem__)
    write_bytes(
        out / "search.svg", _picture(axes, scores, best, label_of(run.eval.metric[0]), sign)
    )
    return {n: axes[n][i] for n, i in zip(names, best, strict=True)}


def _score(run: Run, folder: Path) -> float:
    """Train a trial, or go on with it; its last score."""
    pairs = [(watched_steps(run, run.eval.every), scoring(run, folder, say=say))]
    train(run, folder, **together(pairs))
    scored = [line for line in read_metrics(folder / METRICS) if line["kind"] == "eval"]
    return float(next(iter(scored[-1]["values"].values())))


def _picture(
    axes: Mapping[str, Sequence[Any]], scores: Mapping[Point, float], best: Point, label: str,
    sign: int,
) -> bytes:  # fmt: skip
    """Scores along each axis through the best point, as SVG."""
    lines = []
    for axis, (name, values) in enumerate(axes.items()):
        along = [(*best[:axis], i, *best[axis + 1 :]) for i in range(len(values))]
        points = [
            (p[axis] / max(1, len(values) - 1), sign * scores[p]) for p in along if p in scores
        ]
        span = f"{name}, {values[0]} to {values[-1]}"
        lines.append(Line(name, [x for x, _ in points], [y for _, y in points], span))
    title = f"{label} along each setting through the best"
    figure = lines_figure(
        lines, LIGHT, title=title, label="from a setting's first value to its last"
    )
    return to_bytes(figure, LIGHT, "svg")
