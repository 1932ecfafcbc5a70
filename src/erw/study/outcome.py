"""What became of a study: its numbers with their spread over seeds, a verdict, table and figure."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from erw.evaluation.callback import HIGHER
from erw.io import write_bytes, write_text
from erw.study.compare import amount, label_of
from erw.study.knowledge import history, save_knowledge
from erw.study.plots import LIGHT, dots_figure, samples_figure, score_figure, to_bytes
from erw.study.results import RunResult, begun, by_method, read_runs
from erw.study.studies import PAPER, Row, Study, folder_of

SCORES = {"flow": "held-out loss", "knn": "k-NN", "cknna": "CKNNA"}
COSTS = {"FLOPs": "flops_total", "of it warm-up": "flops_warmup", "seconds": "seconds"}
CURVES = 8
"""Methods whose curves a figure can hold."""
LATEX = str.maketrans({c: f"\\{c}" for c in "&%_#$"} | {"λ": r"$\lambda$", "×": r"$\times$"})


class Number(NamedTuple):
    """A score or cost of a row, by its seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        """The mean, and the extremes over seeds: "463 (453 to 469)"."""
        few = [f"{value:.4g}" for value in (self.mean, min(self.values), max(self.values))]
        return few[0] if len(self.values) == 1 else f"{few[0]} ({few[1]} to {few[2]})"


class Line(NamedTuple):
    """A row with its numbers by name; those of steps that are not reached yet are absent."""

    row: Row
    scores: dict[str, Number]
    costs: dict[str, Number]


def lines_of(study: Study, out: Path) -> list[Line]:
    """Every row with what the `metrics.jsonl` of its runs say."""
    first: dict[tuple[object, str], str] = {}
    lines = []
    for row in study.rows:
        label, numbers = first.setdefault((row.run, row.start), row.label), []
        for folder in (out / "runs" / folder_of(label, seed) for seed in study.seeds):
            if row.run and begun(folder):
                numbers.append(numbers_at(read_runs([folder])[0], row.at or row.run.steps))
        every = [dict.fromkeys(name for one in numbers for name in one[i]) for i in (0, 1)]
        scores, costs = (
            {
                name: Number(tuple(one[i][name] for one in numbers if name in one[i]))
                for name in names
            }
            for i, names in enumerate(every)
        )
        lines.append(Line(row, scores, costs))
    return lines


def numbers_at(run: RunResult, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """Scores and costs of a run after a step; none where it is not there yet."""
    lines = [line for some in run.lines.values() for line in some if line["step"] == step]
    by_kind = {line["kind"]: line for line in lines}
    scores = dict(by_kind.get("eval", {}).get("values", {}))
    scores |= {"flow": by_kind["validation"]["flow"]} if "validation" in by_kind else {}
    scores |= by_kind.get("probe", {}).get("probes", {})
    return scores, {k: lines[0][key] for k, key in COSTS.items() if lines and lines[0][key]}


def judge(ours: Number, theirs: Number, *, higher: bool, noise: float) -> str:
    """Whether the first is better: "agree", "differ" or, where the ranges of seeds overlap, or one
    seed's difference is chance (`Study.noise`), "not told apart"."""
    if len(ours.values) == 1 and abs(ours.mean - theirs.mean) <= noise * max(
        ours.mean, theirs.mean
    ):
        return "not told apart"
    a, b = ([value if higher else -value for value in one.values] for one in (ours, theirs))
    return "agree" if min(a) > max(b) else "differ" if max(a) < min(b) else "not told apart"


def judged(study: Study, lines: Sequence[Line]) -> dict[str, list[tuple[str, str]]]:
    """The pairs of `study.better` that are scored, by what `judge` says of them."""
    by = {x.row.label: x.scores[study.metric] for x in lines if study.metric in x.scores}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for a, b in study.better:
        if a in by and b in by:
            word = judge(by[a], by[b], higher=study.metric.startswith(HIGHER), noise=study.noise)
            pairs.setdefault(word, []).append((a, b))
    return pairs


def verdict(study: Study, lines: Sequence[Line]) -> str:
    """In one line, what of the claim the numbers bear out, and which row is best."""
    compare = partial(judge, higher=study.metric.startswith(HIGHER), noise=study.noise)
    by = {x.row.label: x.scores[study.metric] for x in lines if study.metric in x.scores}
    if not by:
        return "Nothing is scored yet."
    words = {
        word: [f"{a} against {b} ({by[a].mean:.4g}, {by[b].mean:.4g})" for a, b in pairs]
        for word, pairs in judged(study, lines).items()
    }
    order = max if study.metric.startswith(HIGHER) else min
    # What others begin with was trained on other images, and is compared with those.
    starts = {row.start for row in study.rows}
    alike = [label for label in by if label not in starts] or list(by)
    best = order(alike, key=lambda label: by[label].mean)
    near = [x for x in alike if x != best and compare(by[best], by[x]) != "agree"]
    few = min(len(number.values) for number in by.values())
    seeds = f"{few} seeds" if few > 1 else f"one seed, up to {study.noise:.0%} taken for chance"
    parts = [f"{word}: {'; '.join(pairs)}" for word, pairs in words.items()]
    parts += [f"best is {best}" + f", not told apart from {', '.join(near)}" * bool(near)]
    left = sum(line.row.run is not None for line in lines) - len(by)
    text = f"By {label_of(study.metric)}, {seeds}: {'. '.join(parts)}."
    return text + f" {left} rows are still to come." * bool(left)


def cells(lines: Sequence[Line]) -> list[list[str]]:
    """The table as text, its head first: the paper's numbers, ours beside them, costs."""
    quoted = PAPER[: max(len(line.row.paper) for line in lines)]
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    heads = [SCORES.get(name, label_of(name)) for name in names]
    rows = [["", *(f"paper {name}" for name in quoted), *heads, *COSTS]]
    for row, scores, costs in lines:
        paper = [f"{value:g}" for value in row.paper] + [""] * (len(quoted) - len(row.paper))
        spent = {k: f"{v.mean:.0f}" if k == "seconds" else amount(v.mean) for k, v in costs.items()}
        ours = [str(scores.get(name, "")) for name in names]
        rows.append([row.label, *paper, *ours, *(spent.get(name, "") for name in COSTS)])
    return rows


def write_table(study: Study, out: Path) -> None:
    """Write `table.md`, `.tex` (for booktabs) and `.csv` into a study's folder."""
    lines = lines_of(study, out)
    table = cells(lines)
    marks = ["---", *["---:"] * (len(table[0]) - 1)]
    pipes = [f"| {' | '.join(row)} |" for row in (table[0], marks, *table[1:])]
    claim = [f"Claim: {study.claim}", ""] if study.claim else []
    summary = verdict(study, lines)
    if study.figure == "blocks" and (bends := history(longest(alignment_of(read_runs([out]))))):
        bent = sum(bend["u_shaped"] for bend in bends)
        summary += f" In the longest run {bent} of {len(bends)} blocks' alignment falls and rises."
    text = [f"# {study.title}", "", *claim, summary, "", *pipes, ""]
    write_text(out / "table.md", "\n".join(text))
    rows = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in table]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}"
    text = [begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"]
    write_text(out / "table.tex", "\n".join(text) + "\n")
    csv.writer(stream := io.StringIO(), lineterminator="\n").writerows(table)
    write_text(out / "table.csv", stream.getvalue())


def write_figure(study: Study, out: Path) -> None:
    """Write the figure as SVG: scores over total FLOPs, alignment over blocks, or samples.

    A run that several rows show is named by the last of them, which has it to its end.
    """
    rows = [row for row in study.rows if row.run]
    last = {(row.run, row.start): row.label for row in rows}
    names = {row.label: last[row.run, row.start] for row in rows}
    runs = [replace(run, method=names.get(run.method, run.method)) for run in read_runs([out])]
    if study.figure == "blocks" and (known := alignment_of(runs))["points"]:
        end = {point["run"]: point["step"] for point in known["points"]}
        ends = [point for point in known["points"] if point["step"] == end[point["run"]]]
        save_knowledge(known | {"points": ends}, out / "figure", axes=["depth"])
        save_knowledge(known | {"points": longest(known)}, out / "figure-step", axes=["step"])
        return
    scored = [run for run in runs if study.metric in run.names("values")]
    if not scored:
        return
    plot = score_figure if len(by_method(scored)) <= CURVES else dots_figure
    draw = samples_figure(runs) if study.figure == "samples" else plot(scored, study.metric)
    write_bytes(out / "figure.svg", to_bytes(draw, LIGHT, "svg"))


def longest(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of the run, or runs, with the most steps."""
    every = known["points"]
    last = max((point["step"] for point in every), default=0)
    runs = {point["run"] for point in every if point["step"] == last}
    return [point for point in every if point["run"] in runs]


def alignment_of(runs: Sequence[RunResult]) -> dict[str, Any]:
    """CKNNA of each method's first seed after every block and probe, as `erw analyze` has it."""
    points: list[dict[str, Any]] = [
        {"run": run.method, "step": line["step"], "time": 0.0, "depth": block, "value": value}
        for run, *_ in by_method(runs).values()
        for line in run.lines["probe"]
        for block, value in enumerate(line["by_block"]["cknna"], start=1)
    ]
    encoder = next((line["encoder"] for run in runs for line in run.lines["probe"]), "")
    return {"metric": "cknna", "encoder": encoder, "reference": None, "points": points}
