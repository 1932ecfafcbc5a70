"""What an exported model is and how it was made: `erw.json` for programs, `README.md` for people.

They hold no path of the machine that wrote them: only the last name of caches, files and folders.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from erw import __version__
from erw.config import Run, Sample, from_dict, to_dict
from erw.data.sources.openmoji import ATTRIBUTION, groups
from erw.encoders.names import SHIPPED
from erw.encoders.vae import ENTRIES
from erw.errors import CheckpointError, ConfigError
from erw.io import weight_hash
from erw.log import read_metrics
from erw.training.trained import RECIPE, Trained, read_recipe

METADATA, SCORES = "erw.json", "scores.jsonl"
VERSION = 1
COST = ("step", "images", "flops_total", "flops_warmup", "flops_teacher", "seconds")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Contents of `erw.json`. `weights`: their hash. `origin`: what a released file was read as.
    `made_by`: versions. `data`, `spent`, `scores`: of a run. `begins_with`: what it fine-tuned."""

    name: str
    run: Run
    vae: str
    step: int = 0
    class_names: tuple[str, ...] = ()
    empty_classes: tuple[int, ...] = ()  # numbers of those without images
    scaling: dict[str, list[float]] | None = None
    average: str = ""
    weights: str = ""
    origin: str = ""
    begins_with: str = ""
    made_by: dict = dataclasses.field(default_factory=dict)
    data: dict = dataclasses.field(default_factory=dict)
    spent: dict = dataclasses.field(default_factory=dict)
    scores: list = dataclasses.field(default_factory=list)
    version: int = VERSION
    exported_by: str = __version__


def describe(model: Trained) -> Metadata:
    """Everything known of a model; of a run's also its cost, data and scores."""
    weights, run, about = weight_hash(model.net), public(to_dict(model.run)), dict[str, Any]()
    path = Path(model.source)
    folder = next((p for p in (path, *path.parents[:2]) if (p / RECIPE).is_file()), None)
    if folder and model.source and not model.origin:
        recipe, log, saved = read_recipe(folder), folder / "metrics.jsonl", folder / SCORES
        lines = read_metrics(log) if log.exists() else []
        steps = [line for line in lines if line["kind"] == "train" and line["step"] <= model.step]
        text = saved.read_text("utf-8") if saved.exists() else ""
        scores: list[Any] = [json.loads(line) for line in text.splitlines() if line.strip()]
        scores += [line["how"] | {"values": line["values"]} for line in lines if "how" in line]
        scores = [s for s in scores if (s.get("settings") or {}).get("weights") == weights]
        about = {
            "made_by": {name: recipe[name] for name in ("erw", "torch") if name in recipe},
            "data": {
                "images": recipe["cache"].get("rows"), "source": ", ".join(run["data"]["cache"])
            },
            "spent": {name: steps[-1][name] for name in COST} if steps else {},
            "scores": public(scores),
        }  # fmt: skip
        if init := recipe.get("init"):
            message = init.get("message", init.get("said"))  # the latter of erw 0.1
            about["begins_with"] = f"{Path(init['source']).name} ({message})"
    if model.class_names == tuple(groups()):
        openmoji = {"source": "OpenMoji 17, composed", "licence": ATTRIBUTION}
        about["data"] = about.get("data", {}) | openmoji
    same = ("step", "class_names", "empty_classes", "scaling", "average", "origin")
    about |= {name: getattr(model, name) for name in same}
    vae, run = public(model.vae), from_dict(Run, run)
    return Metadata(model.run.name, run, vae, weights=weights, **about)


def read_metadata(folder: Path) -> Metadata:
    """`erw.json` of an exported folder. Raises CheckpointError: missing, damaged, or of a later
    version of erw."""
    path = folder / METADATA
    try:
        values = json.loads(path.read_text("utf-8"))
        version = values["version"]
        if version == VERSION:
            return from_dict(Metadata, values)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {METADATA}: it was not exported by erw") from error
    except (ConfigError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get it again") from error
    raise CheckpointError(f"{path} has version {version}, this erw reads {VERSION}: update erw")


def model_card(meta: Metadata, *, repo: str, diffusers: bool, parameters: int) -> str:
    """Markdown with YAML front matter: what the model is, how it was made, what it scores."""
    from jinja2 import Template

    sample, usual, run = to_dict(meta.run.sample), to_dict(Sample()), to_dict(meta.run)
    settings = {k: run[k] for k in (("model", "flow") if meta.origin else run)}
    return Template(Path(__file__).with_name("card.md.j2").read_text("utf-8")).render(
        meta=meta,
        run=run,
        diffusers=diffusers,
        where=repo or "path/to/this/folder",
        parameters=parameters,
        options={k: v for k, v in sample.items() if v != usual[k] or k in ("steps", "solver")},
        scores=[s | {"name": k, "value": v} for s in meta.scores for k, v in s["values"].items()],
        settings=json.dumps(settings, indent=1),
    )


def known_vae(name: str) -> bool:
    """Whether a VAE's weights come with the package or from the hub by that name alone."""
    return name == "none" or name in SHIPPED or name in ENTRIES


def public(values: Any) -> Any:
    """JSON values with only the last name of every path; of NAME=PATH the name."""
    if isinstance(values, dict):
        return {key: public(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [public(value) for value in values]
    if not isinstance(values, str) or "/" not in values or known_vae(values):
        return values
    kind, _, path = values.partition("=")
    return kind if path else re.sub("^((encoder:|run:|vae:)*).*/", r"\1", values.rstrip("/"))
