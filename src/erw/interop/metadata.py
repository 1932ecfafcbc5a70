"""`erw.json`: what an exported model is and how it was made, for programs and for the model card.

It holds no path of the machine that wrote it: only the last name of caches, files and folders.
"""

import json
from pathlib import Path
from typing import Any

from erw import __version__
from erw.config import Run, from_dict, to_dict
from erw.data.cache import Cache
from erw.data.sources.openmoji import ATTRIBUTION, groups
from erw.encoders.vae import ENTRIES, shipped
from erw.errors import CacheError, CheckpointError
from erw.io import hash_tensors
from erw.log import read_metrics
from erw.training.trained import RECIPE, Trained, read_recipe

METADATA, SCORES = "erw.json", "scores.jsonl"
VERSION = 1
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
    weights, init = hash_tensors(model.net), recipe.get("init")
    return {
        "version": VERSION,
        "exported_by": __version__,
        "name": model.run.name,
        "step": model.step,
        "average": model.average,
        "weights": weights,
        "origin": model.origin,
        "made_by": {name: recipe[name] for name in ("erw", "torch") if name in recipe},
        "run": _public(to_dict(model.run)),
        "vae": public_name(model.vae),
        "scaling": model.scaling,
        "class_names": list(model.class_names),
        "data": _data(model, recipe),
        "begins_with": f"{Path(init['source']).name} ({init.get('message', init.get('said'))})"
        if init
        else "",
        "spent": {name: spent[-1][name] for name in COST} if spent else {},
        "scores": _public(_scores(lines, folder / SCORES, weights) if folder else []),
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
    problems = [f"{k} is no {kind.__name__}" for k, kind in KINDS.items()
                if not isinstance(meta.get(k), kind)]  # fmt: skip
    if not all(isinstance(name, str) for name in meta.get("class_names") or ()):
        problems.append("class_names are not all text")
    if not _is_scaling(meta.get("scaling")):
        problems.append("scaling is no shift and scale")
    if problems:
        raise CheckpointError(f"{path} is damaged: {problems[0]}; get it again")
    return meta


def known_vae(name: str) -> bool:
    """Whether a VAE's weights come with the package or from the hub by that name alone."""
    return name == "none" or name in shipped() or name in ENTRIES


def public_name(name: str) -> str:
    """A name without the path that it may have been read from."""
    if known_vae(name):
        return name
    kind, _, path = name.partition("=")
    return kind if path else Path(name).name


def _public(values: Any) -> Any:
    """JSON values with only the last name of every path."""
    if isinstance(values, dict):
        return {key: _public(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_public(value) for value in values]
    return public_name(values) if isinstance(values, str) and "/" in values else values


def _is_scaling(value: Any) -> bool:
    """Whether it is `Trained.scaling`: None, or shift and scale as numbers."""
    if not isinstance(value, dict) or value.keys() != {"shift", "scale"}:
        return value is None
    return all(
        isinstance(part, list) and all(isinstance(x, int | float) for x in part)
        for part in value.values()
    )


def _run_folder(model: Trained) -> Path | None:
    """The folder of the run that the model was loaded from."""
    if not model.source:
        return None
    path = Path(model.source)
    for folder in (path, path.parent, path.parent.parent):
        if (folder / RECIPE).is_file():
            same = from_dict(Run, read_recipe(folder)["resolved"]) == model.run
            return folder if same else None
    return None


def _data(model: Trained, recipe: dict[str, Any]) -> dict[str, Any]:
    """What is known of the images that a run learned from."""
    if not recipe:
        return {}
    cached = recipe["cache"]
    data = {"images": cached.get("rows"), "identity": cached.get("identity")}
    try:
        cache = Cache.open(model.run.data.cache)
        if cache.identity == cached.get("identity"):
            data["source"] = Path(cache.spec.source.name).name
    except (CacheError, KeyError):  # moved away, or it encodes while training
        pass
    if str(data.get("source", "")).startswith("openmoji") or model.class_names == tuple(groups()):
        data |= {"source": "OpenMoji 17, composed", "licence": ATTRIBUTION}
    return data


def _scores(lines: list[dict[str, Any]], file: Path, weights: str) -> list[dict[str, Any]]:
    """The results of `erw eval`, and of scores while training, for exactly these weights."""
    saved = file.read_text("utf-8").splitlines() if file.exists() else []
    scores = [json.loads(line) for line in saved if line.strip()]
    scores += [line["how"] | {"values": line["values"]} for line in lines if line["kind"] == "eval"]
    return [score for score in scores if (score.get("settings") or {}).get("weights") == weights]
