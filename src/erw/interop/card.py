"""The model card: `README.md` of an exported folder, from its `erw.json`."""

import json
from typing import Any

from erw.config import Run, Sample, from_dict, to_dict

CODE = "erw_transformer.py"
TASK = "unconditional-image-generation"  # the hub's nearest name, also used for class labels


def card(record: dict[str, Any], *, repo: str, diffusers: bool, parameters: int) -> str:
    """Markdown with YAML front matter that says what the model is, how made, what it scores.

    Args:
        record: what `erw.json` holds.
        repo: name on the hub, or "" where it has none yet.
        diffusers: whether plain diffusers can load the folder.
        parameters: of the transformer.
    """
    parts = [
        _front(record, diffusers=diffusers),
        f"# {record['name']}\n\n{_about(record, parameters)}",
        "## Use\n\n" + _use(record, repo or "path/to/this/folder", diffusers=diffusers),
        "## How it was made\n\n" + _made(record),
        "## Scores\n\n" + _scores(record),
        "## Licence\n\n" + _licence(record),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front(record: dict[str, Any], *, diffusers: bool) -> str:
    """YAML for the hub's search, made and checked by huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="custom",
            dataset_name=str(score.get("reference", "")) or "images",
            metric_type=name,
            metric_value=value,
            metric_name=name,
        )
        for score in record["scores"]
        for name, value in score["values"].items()
    ]
    data = ModelCardData(
        library_name="diffusers" if diffusers else "erw",
        pipeline_tag=TASK,
        tags=["erw", "sit", "flow-matching", "image-generation"],
        model_name=record["name"] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _about(record: dict[str, Any], parameters: int) -> str:
    model = record["run"]["model"]
    count = model["num_classes"]
    what = f"{count} classes" if count else "no classes (unconditional)"
    side = model["input_size"]
    ddpm = record["run"]["flow"]["objective"] == "ddpm"
    kind = "noise network (DiT)" if ddpm else "velocity network (SiT)"
    text = (
        f"A {kind} of {parameters / 1e6:.1f} M parameters, {model['depth']} blocks "
        f"of width {model['width']}, for latents {model['channels']} x {side} x {side} of the VAE "
        f"`{record['vae']}`, with {what}. Time 0 is data, time 1 is noise."
    )
    names = record["class_names"]
    if names:
        shown = ", ".join(names[:20])
        text += f"\n\nClasses: {shown}{f' and {len(names) - 20} more' * (len(names) > 20)}."
    return text


def _use(record: dict[str, Any], where: str, *, diffusers: bool) -> str:
    run = from_dict(Run, record["run"])
    how, classed = run.sample, bool(run.model.num_classes)
    usual = to_dict(Sample(steps=how.steps, solver=how.solver))
    given = {k: v for k, v in to_dict(how).items() if v != usual[k] or k in ("steps", "solver")}
    text = f"""With `erw`, which reads nothing but safetensors and JSON:

```python
import erw

model = erw.from_pretrained("{where}")
how = {given}
images = erw.generate(model, range(8), **how).collect().images  # uint8 (8, 3, H, W)
```"""
    if not diffusers:
        return text
    if run.flow.objective == "ddpm":
        return f"""{text}

With diffusers' DiTPipeline, which runs `transformer/erw_dit.py` and `scheduler/erw_ddim.py` here:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{where}", trust_remote_code=True)
images = pipe(class_labels=[0] * 8, guidance_scale={how.guidance}, num_inference_steps=50).images
```

The steps are those of `erw.generate(..., solver="ddim")`."""
    first = repr(record["class_names"][0]) if record["class_names"] else "0"
    ask = f"{first}, guidance_scale={how.guidance}, " if classed else ""
    return f"""{text}

With diffusers, which runs this folder's `pipeline.py` and `transformer/{CODE}`:

```python
from diffusers import DiffusionPipeline

where = "{where}"
pipe = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)
images = pipe({ask}num_images=8, num_inference_steps=50).images
```

The scheduler takes Euler steps: from the same noise (`latents=`) the images are those of
`erw.generate(..., solver="euler")`."""


def _made(record: dict[str, Any]) -> str:
    spent, data, made = record["spent"], record.get("data") or {}, record["made_by"]
    rows = [("recipe", f"`{record['run']['name']}`"), ("optimiser steps", f"{record['step']:,}")]
    if record["origin"]:
        rows = [("read from a released checkpoint", record["origin"])]
    if record["begins_with"]:
        rows.append(("began with", record["begins_with"]))
    rows.append(("objective", _objective(record["run"])))
    if data:
        images = f"{data['images']:,} images" if data.get("images") else "images"
        rows.append(("data", f"{images} of {data.get('source', 'a source not recorded')}"))
    if spent:
        total = spent["flops_total"] or 1
        rows += [
            ("images seen", f"{spent['images']:,}"),
            (
                "cost",
                f"{total:.3g} FLOPs (multiply-add = 2), of which warm-up "
                f"{spent['flops_warmup'] / total:.0%}, teacher "
                f"{spent['flops_teacher'] / total:.0%}; {spent['seconds']:,.0f} s of training",
            ),
        ]
    if made:
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in made.items())))
    average = record["average"] or f"decay {record['run']['optim']['ema']}"
    kind = "as in the file" if record["origin"] else f"moving average ({average})"
    rows.append(("weights", f"{kind}, blake3 `{record['weights']}`"))
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    known = ("model", "flow") if record["origin"] else tuple(record["run"])
    settings = json.dumps({name: record["run"][name] for name in known}, indent=1)
    return (
        f"| | |\n|---|---|\n{table}\n\n<details><summary>All settings</summary>\n\n"
        f"```json\n{settings}\n```\n\n</details>"
    )


def _objective(run: dict[str, Any]) -> str:
    flow, plan = run["flow"], run["plan"]
    said = [f"flow matching, {flow['path']} path, {flow['prediction']} prediction"]
    if flow["objective"] == "ddpm":
        said = ["noise prediction with learned variance on 1,000 steps (DiT)"]
    if plan["warmup"]:
        said.append(f"after a warm-up (ERW) of {plan['depth']} blocks for {plan['warmup']:,} steps")
    if plan["align"]["value"]:
        said.append(
            f"aligned at block {plan['align_depth']} ({plan['loss']}, weight "
            f"{plan['align']['value']:g}, {plan['align']['kind']})"
        )
    return ", ".join(said)


def _scores(record: dict[str, Any]) -> str:
    if not record["scores"]:
        return "None were measured for these weights (`erw eval` does, before the export)."
    lines = ["| score | value | images | reference | sampler |", "|---|---|---|---|---|"]
    for score in record["scores"]:
        how = score.get("settings") or {}
        sampler = (
            f"{how.get('solver')}, {how.get('steps')} steps, guidance {how.get('guidance')} in "
            f"{how.get('interval')}, labels {how.get('labels')}, {how.get('precision')}"
        )
        for name, value in score["values"].items():
            cells = [f"{name} ({score['encoder']})", f"{value:.4f}", f"{score['count']:,}"]
            cells += [f"{score['reference_count']:,} of {score['reference']}", sampler]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _licence(record: dict[str, Any]) -> str:
    data = record.get("data") or {}
    text = "The licence of these weights is for their owner to state."
    if licence := data.get("licence"):
        text += f"\n\nThe images that it learned from: {licence}."
    return text


def _cell(text: Any) -> str:
    """Text that cannot break out of a table's cell."""
    return " ".join(str(text).replace("|", "\\|").split())
