"""What an exported model is and how it was made: `erw.json` for programs, `README.md` for people.

They hold no path of the machine that wrote it: only the last name of caches, files and folders.
"""

import json
from pathlib import Path
from typing import Any

from erw import __version__
from erw.config import Run, Sample, from_dict, to_dict
from erw.data.sources.openmoji import ATTRIBUTION, groups
from erw.encoders.vae import ENTRIES, shipped
from erw.errors import CheckpointError
from erw.io import hash_tensors
from erw.log import read_metrics
from erw.training.trained import RECIPE, Trained, read_recipe

METADATA, SCORES = "erw.json", "scores.jsonl"
VERSION = 1
TASK = "unconditional-image-generation"  # the hub's nearest name, also used for class labels
KINDS: dict[str, type] = {
    **dict.fromkeys(("name", "vae", "average"), str),
    **dict.fromkeys(("class_names", "scores"), list),
    **{"run": dict, "step": int},
}
COST = ("step", "images", "flops_total", "flops_warmup", "flops_teacher", "seconds")


def describe(model: Trained) -> dict[str, Any]:
    """Everything known of a model as JSON values; of a run's also its cost, data and scores."""
    folder = _run_folder(model)
    recipe = read_recipe(folder) if folder else {}
    log = folder / "metrics.jsonl" if folder else None
    lines = read_metrics(log) if log and log.exists() else []
    spent = [line for line in lines if line["kind"] == "train" and line["step"] <= model.step]
    weights, run, init = hash_tensors(model.net), public(to_dict(model.run)), recipe.get("init")
    data = {"images": recipe["cache"].get("rows"), "source": run["data"]["cache"]} if recipe else {}
    if model.class_names == tuple(groups()):
        data |= {"source": "OpenMoji 17, composed", "licence": ATTRIBUTION}
    message = init.get("message", init.get("said")) if init else ""
    return {
        "version": VERSION,
        "exported_by": __version__,
        "name": model.run.name,
        "step": model.step,
        "average": model.average,
        "weights": weights,
        "origin": model.origin,
        "made_by": {name: recipe[name] for name in ("erw", "torch") if name in recipe},
        "run": run,
        "vae": public(model.vae),
        "scaling": model.scaling,
        "class_names": list(model.class_names),
        "data": data,
        "begins_with": f"{Path(init['source']).name} ({message})" if init else "",
        "spent": {name: spent[-1][name] for name in COST} if spent else {},
        "scores": public(_scores(lines, folder / SCORES, weights) if folder else []),
    }


def read_metadata(folder: Path) -> dict[str, Any]:
    """`erw.json` of an exported folder, with the types of its values checked.

    Raises:
        CheckpointError: missing, damaged, or written by a later version of erw.
    """
    path = folder / METADATA
    try:
        meta = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {METADATA}: it was not exported by erw; read a run with erw.load, a "
            "released checkpoint with erw.load_pretrained"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); get it again") from error
    version = meta.get("version") if isinstance(meta, dict) else "none"
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}, this erw reads {VERSION}: update erw")
    wrong = [name for name, kind in KINDS.items() if not isinstance(meta.get(name), kind)]
    if not wrong and not all(isinstance(name, str) for name in meta["class_names"]):
        wrong = ["class_names"]
    scaling = meta.get("scaling")
    if scaling is not None and not (
        isinstance(scaling, dict)
        and scaling.keys() == {"shift", "scale"}
        and all(isinstance(x, int | float) for values in scaling.values() for x in values)
    ):
        wrong.append("scaling")
    if wrong:
        raise CheckpointError(f"{path} is damaged in {', '.join(wrong)}; get it again")
    return meta


def model_card(meta: dict[str, Any], *, repo: str, diffusers: bool, parameters: int) -> str:
    """Markdown with YAML front matter: what the model is, how it was made, what it scores.

    Args:
        meta: contents of `erw.json`.
        repo: name on the hub, or "" where it has none yet.
        diffusers: whether plain diffusers can load the folder.
        parameters: of the transformer.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    scores = [s | {"name": k, "value": v} for s in meta["scores"] for k, v in s["values"].items()]
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="custom",
            dataset_name=str(score.get("reference", "")) or "images",
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
    sample, usual = to_dict(from_dict(Run, meta["run"]).sample), to_dict(Sample())
    options = {k: v for k, v in sample.items() if v != usual[k] or k in ("steps", "solver")}
    sections = ("model", "flow") if meta["origin"] else tuple(meta["run"])
    card = ModelCard.from_template(
        data,
        template_str=Path(__file__).with_name("card.md.j2").read_text("utf-8"),
        meta=meta,
        diffusers=diffusers,
        where=repo or "path/to/this/folder",
        millions=f"{parameters / 1e6:.1f}",
        options=options,
        scores=scores,
        settings=json.dumps({name: meta["run"][name] for name in sections}, indent=1),
    )
    return str(card.content).rstrip() + "\n"


def known_vae(name: str) -> bool:
    """Whether a VAE's weights come with the package or from the hub by that name alone."""
    return name == "none" or name in shipped() or name in ENTRIES


def public(values: Any) -> Any:
    """JSON values with only the last name of every path; of a VAE NAME=PATH the name."""
    if isinstance(values, dict):
        return {key: public(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [public(value) for value in values]
    if not isinstance(values, str) or "/" not in values or known_vae(values):
        return values
    kind, _, path = values.partition("=")
    return kind if path else Path(values).name


def _run_folder(model: Trained) -> Path | None:
    """The folder of the run that the model was loaded from."""
    path = Path(model.source)
    for folder in (path, path.parent, path.parent.parent) if model.source else ():
        if (folder / RECIPE).is_file():
            same = from_dict(Run, read_recipe(folder)["resolved"]) == model.run
            return folder if same else None
    return None


def _scores(lines: list[dict[str, Any]], file: Path, weights: str) -> list[dict[str, Any]]:
    """The results of `erw eval`, and of scores while training, for exactly these weights."""
    saved = file.read_text("utf-8").splitlines() if file.exists() else []
    scores = [json.loads(line) for line in saved if line.strip()]
    scores += [line["how"] | {"values": line["values"]} for line in lines if line["kind"] == "eval"]
    return [score for score in scores if (score.get("settings") or {}).get("weights") == weights]
