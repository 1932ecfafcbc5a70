"""Write `src/erw/study/curves.json`: the curves that `erw doctor` lays beside a run.

python scripts/curves.py RUN...     # folders of healthy runs; several seeds of one are averaged
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from erw.study.doctor import kind_of
from erw.study.results import by_method, read_runs

OUT = Path(__file__).parents[1] / "src" / "erw" / "study" / "curves.json"


def main() -> None:
    curves: dict[str, dict[str, object]] = {}
    for group in by_method(read_runs(sys.argv[1:])).values():
        lines = [[x for x in run.lines["train"] if "flow" in x["losses"]] for run in group]
        steps = sorted(set.intersection(*({x["step"] for x in some} for some in lines)))
        steps = steps[:: max(1, len(steps) // 40)]
        by_step = [{x["step"]: x for x in some} for some in lines]
        flow = [fmean(some[s]["losses"]["flow"] for some in by_step) for s in steps]
        norm = [fmean(some[s]["grad_norm"] for some in by_step) for s in steps]
        run = group[0].recipe["run"]
        if (kind := kind_of(run)) in curves:
            raise SystemExit(f"{run['name']} differs from {curves[kind]['name']} by rates alone")
        curves[kind] = {
            "name": run["name"],
            "step": steps,
            "flow": [round(x, 4) for x in flow],
            "grad_norm": [round(x, 4) for x in norm],
        }
    text = ",\n".join(f" {json.dumps(name)}: {json.dumps(v)}" for name, v in sorted(curves.items()))
    OUT.write_text("{\n" + text + "\n}\n")
    print(f"{OUT}: {', '.join(str(curve['name']) for curve in curves.values())}")


if __name__ == "__main__":
    main()
