"""Write docs/results.md: of every study in benchmarks/results/studies the paper's claim, our
numbers and whether they agree; from docs/results.toml what is to be made of it.

    python scripts/results.py [STUDY...]     # --check: change nothing, fail where it is not so

Of each STUDY, a folder of `erw study`, what is kept of it is taken into benchmarks/results first.
"""

import argparse
import shutil
import sys
import tomllib
from pathlib import Path

from erw.config import from_dict
from erw.study.outcome import judged, lines_of, write_figure, write_table
from erw.study.results import STUDY, read_study
from erw.study.studies import STUDIES, Study

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results" / "studies"
FIGURES = ("figure.svg", "figure-light.svg", "figure-step-light.svg")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="change nothing, say what would")
    parser.add_argument("studies", nargs="*", type=Path, help="folders to take in")
    options = parser.parse_args()
    check = options.check
    for folder in options.studies:
        take(folder)
    if not check:
        PAGE.write_text(page(), "utf-8")
    elif PAGE.read_text("utf-8") != page():
        sys.exit("docs/results.md is not what the studies say; run scripts/results.py")


def take(folder: Path) -> None:
    """Copy a study's settings, runs (lines and recipes), and table and figure, made anew."""
    study, runs = from_dict(Study, read_study(folder)["study"]), sorted(folder.glob("runs/*"))
    out = RESULTS / study.name
    for run in runs:
        (out / "runs" / run.name).mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "recipe.json"):
            shutil.copy(run / name, out / "runs" / run.name)
    write_table(study, folder)
    write_figure(study, folder)
    for path in (folder / STUDY, *folder.glob("table.*"), *folder.glob("figure*")):
        shutil.copy(path, out)


def page() -> str:
    """The whole page."""
    words = tomllib.loads(PAGE.with_suffix(".toml").read_text("utf-8"))
    here = [name for name in STUDIES if (RESULTS / name).is_dir()]
    rows = [[f"[{name}](#{name})", words[name]["short"], *counted(name)] for name in here]
    head = ["study", "the paper's claim", "agree", "differ", "not told apart", "seeds"]
    parts = [f"# {words['title']}", words["begin"].strip(), table([head, *rows])]
    for name in here:
        link = f"../benchmarks/results/studies/{name}"
        text = (RESULTS / name / "table.md").read_text("utf-8")
        title, _, body = text.partition("\n")
        parts += [f"## {name}", f"**{title.removeprefix('# ')}.** `erw study {name} --out DIR`"]
        parts += [words[name]["say"].strip(), body.strip()]
        parts += [f"![{name}]({link}/{x})" for x in FIGURES if (RESULTS / name / x).is_file()]
    missing = [name for name in STUDIES if name in words and name not in here]
    parts += [f"Not made yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join([*parts, words["end"].strip()]) + "\n"


def counted(name: str) -> list[str]:
    """How many of the claimed orders hold, do not, and are not told apart; how many seeds."""
    study = from_dict(Study, read_study(RESULTS / name)["study"])
    lines = lines_of(study, RESULTS / name)
    said, metric = judged(study, lines), study.metric
    seeds = {len(x.scores[metric].values) for x in lines if metric in x.scores}
    counts = [str(len(said.get(word, ()))) for word in ("agree", "differ", "not told apart")]
    return [*counts, " to ".join(map(str, sorted({min(seeds), max(seeds)})))]


def table(rows: list[list[str]]) -> str:
    marks = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:]))


if __name__ == "__main__":
    main()
