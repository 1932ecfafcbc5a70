"""Write docs/methods.md and its pictures: from docs/methods.toml what methods are, from the recipes
what they do and cost, from benchmarks/results what was measured here.

    python scripts/methods.py            # --check: change nothing, fail where the page is not so
"""

import argparse
import dataclasses
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from erw.config import Run
from erw.models import build_model
from erw.recipes import names, recipe
from erw.training.flops import step_flops
from erw.training.network import build_network

ROOT = Path(__file__).parents[1]
DOCS, BASE, SMALL = ROOT / "docs", "sit_xl2_in256_", "quickstart_"
WIDTHS = {"dinov2-b": 768, "clip-l": 1024, "vae:sd-vae-ft-ema": 512}
"""Channels of the encoders that recipes for ImageNet name; of attention: queries and keys."""
RESULTS = ROOT / "benchmarks" / "results"

SECTION = """## {title}

![{title}: which block is aligned with what](images/methods/{name}.svg)

- **What** {what}
- **Formula** {formula}. *Source:* {source}.
- **Cost** {cost}
- **Recipe** {recipes}
- **Measured** here: {here} Elsewhere: {elsewhere}
- **When** {when}
"""


def resolved(run: Run) -> tuple[Run, dict[str, int]]:
    """The run as a cache of 256 px images resolves it, and the widths of its teachers."""
    size = {"input_size": run.model.input_size or 32, "channels": run.model.channels or 4}
    model = dataclasses.replace(run.model, num_classes=1000, **size)
    named = [term.encoder or "dinov2-b" for term in run.plan.active if term.reads_encoder]
    features = tuple(dict.fromkeys(named))
    widths = {name: 1536 if "#attention" in name else WIDTHS.get(name, 1152) for name in features}
    data = dataclasses.replace(run.data, features=features)
    return run.replace(model=model, data=data), widths


def cost_text(run: Run, base: Run, whole: int) -> str:
    """FLOPs of each kind of step beside `base`'s, parameters in training, the teacher."""
    run, widths = resolved(run)
    parts = []
    for start, _ in run.plan.segments(run.steps):
        phase = run.phase(start)
        kind = "a warm-up step" if phase.warmup else "a step" if start == 0 else f"from {start:,}"
        parts.append(f"{kind} {step_flops(run, widths, phase) / whole:.3f}")
    parts[0] += " of SiT's"
    if run.optim.name != "adamw":
        own = step_flops(run, widths, run.phase(run.steps - 1), own=True)
        parts.append(f"the optimiser {own / 256 / whole:.3f} at a batch of 256")
    with torch.device("meta"):
        nets = build_network(run, widths), build_model(resolved(base)[0].model)
    more, less = (sum(p.numel() for p in net.parameters()) / 1e6 for net in nets)
    if more - less >= 0.05:
        parts.append(f"{more - less:.1f} M more parameters in training")
    teachers = [term.encoder or "dinov2-b" for term in run.plan.active if term.reads_encoder]
    unique = ", ".join(dict.fromkeys(teachers))
    return "; ".join([*parts, f"teacher: {unique}" if teachers else "no encoder"]) + "."


def picture(run: Run) -> str:
    """The blocks of a run's network and what its plan does with them, as SVG."""
    ink, aligned, target, output = "#7a8290", "#d55e00", "#0072b2", "#009e73"
    terms = sorted(run.plan.active, key=lambda term: -term.block)  # so that no line crosses a text
    depth, pitch, high = run.model.depth, 18, 34
    top = 30 + 17 * max(1, len(terms)) + 20 * any(term.target == "block" for term in terms)
    parts = [text(0, top + 21, "x_t, t, class"), text(90 + pitch * depth, top + 21, "velocity")]
    center = [80 + pitch * (block - 0.5) for block in range(depth + 1)]  # by block, from 1
    fill = dict.fromkeys(range(1, depth + 1), (ink, 0.18))
    if run.plan.warmup:
        fill |= dict.fromkeys(range(1, run.plan.depth + 1), (ink, 0.6))
        parts.append(text(center[1] - 7, top + high + 16, "warmed up first"))
    for row, term in enumerate(terms):
        fill[term.block] = (aligned, 0.85)
        start, y = center[term.block], top - 22 - 17 * row
        said = f"{term.encoder or 'encoder'}, weight {term.weight.value:g}"
        if term.target in ("block", "ema"):
            of = "of the average " * (term.target == "ema")
            said = f"block {term.target_block} {of}, weight {term.weight.value:g}".replace(
                " ,", ","
            )
        said = f"other images, weight {term.weight.value:g}" if term.target == "none" else said
        said += f" for {term.weight.ends:,} steps" if term.weight.ends else ""
        curve = f"M{start} {top} V{y}"
        if term.target == "block":
            end = center[term.target_block or 1]
            curve = f"M{start} {top} C{start} {y - 10} {end} {y - 10} {end} {top}"
            fill[term.target_block or 1] = (target, 0.85)
            y -= 24
        x = min(start + 5, 86 + pitch * depth - 6.2 * len(said))
        parts += [path(curve, aligned), text(x, y + 4, said)]
    if run.model.internal:
        start, y = center[run.model.internal], top + high
        parts.append(path(f"M{start} {y} v14 h12", output))
        parts.append(text(start + 16, y + 18, f"velocity, weight {run.flow.internal_weight:g}"))
    if run.plan.routing.kind != "none":
        first, last = run.plan.routing.blocks
        fill |= dict.fromkeys(range(first, last + 1), (target, 0.3))
        said = f"{run.plan.routing.keep:.0%} of the patches until step {run.plan.routing.until:,}"
        parts.append(text(center[first] - 7, top + high + 16, said))
    if run.flow.contrastive:
        said = f"and away from the next image's, weight {run.flow.contrastive:g}"
        parts.append(text(center[-1] - 230, top + high + 16, said))
    parts += [
        f'<rect x="{center[block] - 7}" y="{top}" width="14" height="{high}" rx="2" '
        f'fill="{color}" fill-opacity="{opacity}" stroke="{color}"/>'
        for block, (color, opacity) in fill.items()
    ]
    size = f'viewBox="0 0 {160 + pitch * depth} {top + 64}" width="{160 + pitch * depth}"'
    look = f'font-family="sans-serif" font-size="12" fill="{ink}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>{"".join(parts)}</svg>\n'


def text(x: float, y: float, content: str) -> str:
    return f'<text x="{x:g}" y="{y:g}">{content}</text>'


def path(curve: str, color: str) -> str:
    return f'<path d="{curve}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def newest(setting: str) -> tuple[dict[str, Any], str]:
    """Rows by recipe of the newest committed comparison of methods, and `setting` filled in."""
    files = {file: json.loads(file.read_text()) for file in RESULTS.glob("methods-*.json")}
    if not files:
        return {}, "Nothing of this has been compared here yet."
    file = max(files, key=lambda file: files[file]["date"])
    found = files[file]
    seeds = sorted({run["seed"] for row in found["rows"].values() for run in row["runs"]})
    return found["rows"], setting.format(
        **found | found["machine"],
        day=found["date"][:10],
        seeds=", ".join(map(str, seeds)),
        name=file.name,
    )


def spread(row: dict[str, Any], key: str, form: str) -> str:
    """The mean of a number over seeds, and from where to where it goes."""
    values = [run[key] for run in row["runs"]]
    mean = format(sum(values) / len(values), form)
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def measured_text(names: Sequence[str], rows: dict[str, Any]) -> str:
    """What was measured of these recipes, beside SiT and REPA."""
    said = []
    for name in names:
        if row := rows.get(name):
            text = f"`{name}`, {row['steps']:,} steps: FD-Lite2 {spread(row, 'fd_lite2', '.0f')}, "
            text += f"held-out loss {spread(row, 'held_out_flow', '.3f')}"
            if row["teachers"]:
                text += f", the training of {', '.join(row['teachers'])} not counted"
            said.append(text)
    if not said:
        return "not compared."
    others = {"SiT": "quickstart_sit", "REPA": "quickstart_repa"}
    beside = [
        f"{title} {spread(rows[name], 'fd_lite2', '.0f')}, "
        f"{spread(rows[name], 'held_out_flow', '.3f')}"
        for title, name in others.items()
        if name in rows and name not in names
    ]
    return "; ".join([*said, *beside]) + "."


def by_tokens(routing: str) -> list[str]:
    """What routing came to at several numbers of tokens, as a section; none without results."""
    files = RESULTS.glob("routing-scores-*.json")
    found = [json.loads(file.read_text()) for file in files]
    if not found:
        return []
    found.sort(key=lambda one: one["image_size"])
    lines = [
        "| tokens | | steps | FD-Lite2 | held-out loss |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for one in found:
        tokens = (one["image_size"] // 8) ** 2
        for name, row in one["rows"].items():
            scores = spread(row, "fd_lite2", ".0f"), spread(row, "held_out_flow", ".3f")
            method = name.removeprefix(SMALL)
            lines.append(f"| {tokens:,} | {method} | {row['steps']:,} | {' | '.join(scores)} |")
    return [f"{routing.strip()}\n\n" + "\n".join(lines) + "\n"]


def page() -> dict[Path, str]:
    """Every file of the page."""
    texts: dict[str, Any] = tomllib.loads((DOCS / "methods.toml").read_text())
    intro, setting, routing = (texts.pop(name) for name in ("intro", "measured", "routing"))
    base = recipe(f"{BASE}base")
    whole = step_flops(*resolved(base), base.phase(0))
    rows, measured = newest(setting.strip())
    sections, files = [], {}
    for name, words in texts.items():
        suffix = words.pop("recipe", name)
        full = suffix if suffix in names() else BASE + suffix
        run = recipe(full)
        small = words.pop("small", [SMALL + suffix] if SMALL + suffix in names() else [])
        here = measured_text(small, rows)
        files[DOCS / "images" / "methods" / f"{name}.svg"] = picture(run)
        known = {"cost": cost_text(run, base, whole), "here": here}
        known["recipes"] = ", ".join(f"`{one}`" for one in (full, *small)) + "."
        sections.append(SECTION.format(name=name, **words, **known))
    begin = intro.format(base=whole / 1e9, measured=measured)
    written = "\n".join([begin, *sections, *by_tokens(routing)])
    return {DOCS / "methods.md": written, **files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for file, content in page().items():
        if check and (not file.exists() or file.read_text() != content):
            stale.append(file.name)
        elif not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
    sys.exit(f"not as the code is: {', '.join(stale)}; run scripts/methods.py" if stale else 0)
