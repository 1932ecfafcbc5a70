"""The model card: `README.md` of an exported folder, from its `erw.json`."""

import json
from pathlib import Path
from typing import Any

from erw.config import Run, Sample, from_dict, to_dict

TASK = "unconditional-image-generation"  # the hub's nearest name, also used for class labels


def card(meta: dict[str, Any], *, repo: str, diffusers: bool, parameters: int) -> str:
    """Markdown with YAML front matter: what the model is, how it was made, what it scores.

    Args:
        meta: what `erw.json` holds.
        repo: name on the hub, or "" where it has none yet.
        diffusers: whether plain diffusers can load the folder.
        parameters: of the transformer.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    scores = [
        {"name": name, "value": value, "result": score, "sampler": _sampler(score)}
        for score in meta["scores"]
        for name, value in score["values"].items()
    ]
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="custom",
            dataset_name=str(score["result"].get("reference", "")) or "images",
            metric_type=score["name"],
            metric_value=score["value"],
        )
        for score in scores
    ]
    data = ModelCardData(
        library_name="diffusers" if diffusers else "erw",
        pipeline_tag=TASK,
        tags=["erw", "sit", "flow-matching", "image-generation"],
        model_name=meta["name"] if results else None,
        eval_results=results or None,
    )
    sample = from_dict(Run, meta["run"]).sample
    usual = to_dict(Sample(steps=sample.steps, solver=sample.solver))
    options = {k: v for k, v in to_dict(sample).items() if v != usual[k]}
    options = {"steps": sample.steps, "solver": sample.solver} | options
    sections = ("model", "flow") if meta["origin"] else tuple(meta["run"])
    template = Path(__file__).with_name("card.md.j2").read_text("utf-8")
    text = ModelCard.from_template(
        data,
        template_str=template,
        meta=meta,
        diffusers=diffusers,
        where=repo or "path/to/this/folder",
        millions=f"{parameters / 1e6:.1f}",
        options=options,
        scores=scores,
        settings=json.dumps({name: meta["run"][name] for name in sections}, indent=1),
    ).content
    return text.rstrip() + "\n"


def _sampler(score: dict[str, Any]) -> str:
    how = score.get("settings") or {}
    return (
        f"{how.get('solver')}, {how.get('steps')} steps, guidance {how.get('guidance')} in "
        f"{how.get('interval')}, labels {how.get('labels')}, {how.get('precision')}"
    )
