"""`erw.json`: what an exported model is and how it was made, for programs and for the model card.

It holds no path of the machine that wrote it: of caches, files and folders only the last name.
"""

import json
from pathlib import Path
from typing import Any

from erw import __version__
from erw.config import to_dict
from erw.data.cache import Cache
from erw.data.sources.openmoji import ATTRIBUTION, groups
from erw.encoders.vae import ENTRIES, shipped
from erw.errors import CacheError, CheckpointError
from erw.io import hash_tensors
from erw.log import read_metrics
from erw.training.trained import Trained, read_recipe

RECORD, SCORES = "erw.json", "scores.jsonl"
VERSION = 1
TEXTS, LISTS = ("name", "vae", "average"), ("class_names", "scores")


def record_of(model: Trained, folder: Path | None = None, *, origin: str = "") -> dict[str, Any]:
    """Everything known of a model as JSON values.

    Args:
        folder: its run's, with cost, data and scores; None where there is none.
        origin: what a released checkpoint was read as, in words.
    """
    recipe = read_recipe(folder) if folder else {}
    weights = hash_tensors(model.net)
    metrics = folder / "metrics.jsonl" if folder else None
    log = read_metrics(metrics) if metrics and metrics.exists() else []
    return {
        "version": VERSION,
        "exported_by": __version__,
        "name": model.run.name,
        "step": model.step,
        "average": model.average,
        "weights": weights,
        "origin": origin,
        "made_by": {name: recipe[name] for name in ("erw", "torch") if name in recipe},
        "run": _public(to_dict(model.run)),
        "vae": public_name(model.vae),
        "scaling": model.scaling,
        "class_names": list(model.class_names),
        "data": _data(model, recipe),
        "begins_with": _begins_with(recipe.get("init")),
        "spent": _spent(log, model.step),
        "scores": _public(_scores(log, folder / SCORES, weights) if folder else []),
    }


def read_record(folder: Path) -> dict[str, Any]:
    """`erw.json` of an exported folder, its outer form checked.

    Raises:
        CheckpointError: missing, damaged, or written by a later version of erw.
    """
    path = folder / RECORD
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {RECORD}: it was not exported by erw; read a run with erw.load, a "
            "released checkpoint with erw.load_pretrained"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); get it again") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        version = found.get("version") if isinstance(found, dict) else "none"
        raise CheckpointError(f"{path} has version {version}, this erw reads {VERSION}: update erw")
    kinds = dict.fromkeys(TEXTS, str) | dict.fromkeys(LISTS, list) | {"run": dict, "step": int}
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise CheckpointError(f"{path} is damaged: {name} is no {kind.__name__}; get it again")
    if not all(isinstance(name, str) for name in found["class_names"]):
        raise CheckpointError(f"{path} is damaged: class_names are not all text; get it again")
    if not _is_scaling(found.get("scaling")):
        raise CheckpointError(f"{path} is damaged: scaling is no shift and scale; get it again")
    return found


def _is_scaling(value: Any) -> bool:
    """Whether it is `Trained.scaling`: None, or shift and scale as numbers."""
    if value is None or not isinstance(value, dict) or value.keys() != {"shift", "scale"}:
        return value is None
    return all(
        isinstance(part, list) and all(isinstance(x, int | float) for x in part)
        for part in value.values()
    )


def known_vae(name: str) -> bool:
    """Whether a VAE's weights come with the package or from the hub by that name alone."""
    return name == "none" or name in shipped() or name in ENTRIES


def public_name(vae: str) -> str:
    """A name, of a VAE or anything, without the path that it may have been read from."""
    if known_vae(vae):
        return vae
    kind, _, local = vae.partition("=")
    return kind if local else Path(vae).name


def _public(values: Any) -> Any:
    """JSON values in which nothing is a path: of each the last name is left."""
    if isinstance(values, dict):
        return {key: _public(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_public(value) for value in values]
    return public_name(values) if isinstance(values, str) and "/" in values else values


def _data(model: Trained, recipe: dict[str, Any]) -> dict[str, Any]:
    """What is known of the images that a run learned from."""
    if not recipe:
        return {}
    kept = recipe["cache"]
    about = {"images": kept.get("rows"), "identity": kept.get("identity")}
    try:
        cache = Cache.open(model.run.data.cache)
        if cache.identity == kept.get("identity"):
            about["source"] = Path(cache.manifest.settings["source"]["name"]).name
    except (CacheError, KeyError):  # moved away, or it encodes while training
        pass
    if str(about.get("source", "")).startswith("openmoji") or model.class_names == tuple(groups()):
        about |= {"source": "OpenMoji 17, composed", "licence": ATTRIBUTION}
    return about


def _begins_with(init: dict[str, str] | None) -> str:
    """What was fine-tuned, in words."""
    return f"{Path(init['source']).name} ({init.get('message', init.get('said'))})" if init else ""


def _spent(log: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Cost up to `step`, from the run's log."""
    done = [line for line in log if line["kind"] == "train" and line["step"] <= step]
    names = ("step", "images", "flops_total", "flops_warmup", "flops_teacher", "seconds")
    return {name: done[-1][name] for name in names} if done else {}


def _scores(log: list[dict[str, Any]], file: Path, weights: str) -> list[dict[str, Any]]:
    """The results of `erw eval`, and of scores while training, for exactly these weights."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines if line.strip()]
    found += [line["how"] | {"values": line["values"]} for line in log if line["kind"] == "eval"]
    return [score for score in found if (score.get("settings") or {}).get("weights") == weights]
