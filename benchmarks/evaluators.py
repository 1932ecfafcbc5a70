"""One contender of `evaluate.py`, in its own process: reads orders on stdin, answers on stdout.

An order is a JSON line {"warm"}; the answer {"wall", "cpu", "found"} has the seconds of one turn by
either clock, CPU time summed over threads, and what came out, so that contenders can be held
against each other. A warm-up turn is a small one.

The peers need torchvision to be imported, which this project does without. torch-fidelity's network
has none in it and is loaded past its package's `__init__`. pytorch-fid's is torchvision's Inception
with patched blocks: `stand_in` gives it erw's blocks, which have the same layers; the patched
forwards are its own.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.evaluation.inception import BLOCKS, POOL, Branches, Inception, Mixed

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from helpers.inception import random_state

Turn = Callable[[int], dict[str, float]]
"""How many images or features -> what came out."""


def pictures(count: int, side: int) -> Tensor:
    """Smooth random images, uint8 (count, 3, side, side)."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=rng)
    fine = F.interpolate(coarse, (side, side), mode="bicubic")
    return (fine * 255).clamp(0, 255).to(torch.uint8)


def features(count: int) -> tuple[Tensor, Tensor]:
    """Real and fake features (count, 2048): not negative, of 64 dimensions and noise."""
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 2048, generator=rng)
    made = []
    for scale in (1.0, 1.05):
        inner = torch.randn(count, 64, generator=rng) * scale
        noise = torch.randn(count, 2048, generator=rng)
        made.append(F.relu(inner @ mix / 8 + 0.3 * noise))
    return made[0], made[1]


def summed(mu: Any, sigma: Any) -> dict[str, float]:
    return {"mean": float(np.mean(mu)), "trace": float(np.trace(sigma))}


def erw_fid(spec: dict[str, Any]) -> Turn:
    """erw.evaluate's statistics."""
    from erw.evaluation.features import Extractor, extract
    from erw.evaluation.images import image_set

    class Pool(Inception):
        """Of `pool_3` alone, as the other contenders."""

        name = "inception-2015"

        def pooled(self, images: Tensor) -> Tensor:
            return super().pooled(images)[:, :POOL]

    net = Pool()
    net.load_state_dict(random_state())
    net.fold()
    images = pictures(spec["images"], spec["side"])

    def turn(count: int) -> dict[str, float]:
        given, extractors = image_set(images[:count]), {"pool": Extractor(net)}
        moments = extract(given, extractors, batch_size=spec["batch"])["pool"].moments
        return summed(moments.mean.numpy(), moments.cov.numpy())

    return turn


def torch_fidelity(spec: dict[str, Any]) -> Turn:
    """Its extractor on batches, then its statistics of all features."""
    package = types.ModuleType("torch_fidelity")  # its __init__ would import torchvision
    package.__path__ = [str(Path(spec["peers"]) / "torch_fidelity")]
    sys.modules["torch_fidelity"] = package
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    state = random_state()

    class Theirs(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: object, **kwargs: object) -> object:
            return nn.Module.load_state_dict(self, state, strict=False)

    loading, torch.load = torch.load, lambda *args, **kwargs: state  # no file, no download
    try:
        net = Theirs("x", ["2048"], feature_extractor_weights_path="none").eval()
    finally:
        torch.load = loading
    images = pictures(spec["images"], spec["side"])

    def turn(count: int) -> dict[str, float]:
        with torch.no_grad():
            parts = [net(part)[0].cpu() for part in images[:count].split(spec["batch"])]
        found = torch.cat(parts).numpy()  # as its fid_features_to_statistics
        return summed(np.mean(found, axis=0), np.cov(found, rowvar=False))

    return turn


def pytorch_fid(spec: dict[str, Any]) -> Turn:
    """Its network and its loop, over decoded images instead of files."""
    stand_in(random_state())
    sys.path.append(spec["peers"])
    module = importlib.import_module("pytorch_fid.inception")
    net = module.InceptionV3([3]).eval()
    images = pictures(spec["images"], spec["side"])

    def turn(count: int) -> dict[str, float]:
        found, start = np.empty((count, 2048)), 0
        for part in images[:count].split(spec["batch"]):
            with torch.no_grad():
                pred = net(part.float().div(255))[0]
            pred = pred.squeeze(3).squeeze(2).cpu().numpy()
            found[start : start + len(pred)] = pred
            start += len(pred)
        return summed(np.mean(found, axis=0), np.cov(found, rowvar=False))

    return turn


def stand_in(state: dict[str, Tensor]) -> None:
    """Modules in torchvision's place, with the weights at hand in place of a download."""

    def stands_for(branches: Callable[..., Branches]) -> type[Mixed]:
        class Block(Mixed):
            def __init__(self, inputs: int, *args: int) -> None:
                super().__init__(inputs, branches(*args))

        return Block

    vision = types.ModuleType("torchvision")
    vision.__version__ = "0.28"
    models = types.ModuleType("torchvision.models")
    models.inception_v3 = lambda **_: Inception()
    inner = types.ModuleType("torchvision.models.inception")
    blocks = {32: "Mixed_5b", 64: "Mixed_5c", 128: "Mixed_6b", 160: "Mixed_6c", 192: "Mixed_6e"}
    inner.InceptionA = inner.InceptionC = stands_for(lambda channels: BLOCKS[blocks[channels]])
    inner.InceptionE = stands_for(lambda: BLOCKS["Mixed_7b"])
    loads = types.ModuleType("torchvision.models.utils")
    loads.load_state_dict_from_url = lambda url, progress: state
    vision.models, models.inception, models.utils = models, inner, loads
    for module in (vision, models, inner, loads):
        sys.modules[module.__name__] = module


def prdc(spec: dict[str, Any]) -> Turn:
    """Its one function; its print goes to stderr."""
    sys.path.append(spec["peers"])
    module = importlib.import_module("prdc")
    real, fake = (x.numpy() for x in features(spec["features"]))

    def turn(count: int) -> dict[str, float]:
        found = module.compute_prdc(real[:count], fake[:count], nearest_k=3)
        return {key: float(value) for key, value in found.items()}

    return turn


def erw_pr(spec: dict[str, Any]) -> Turn:
    """erw.evaluate's precision and recall."""
    from erw.evaluation.distances import precision_recall

    real, fake = features(spec["features"])
    names = "precision", "recall"
    return lambda count: dict(zip(names, precision_recall(real[:count], fake[:count]), strict=True))


CONTENDERS = {
    ("fid", "erw"): erw_fid,
    ("fid", "torch-fidelity"): torch_fidelity,
    ("fid", "pytorch-fid"): pytorch_fid,
    ("pr", "erw"): erw_pr,
    ("pr", "prdc"): prdc,
}


def main() -> None:
    """Build the contender that argv[1] describes and serve orders until stdin closes."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    torch.set_num_threads(spec["threads"])
    turn = CONTENDERS[spec["task"], spec["name"]](spec)
    whole, small = (spec["images"], 32) if spec["task"] == "fid" else (spec["features"], 500)
    for line in sys.stdin:
        count = min(small, whole) if json.loads(line)["warm"] else whole
        start, start_cpu = time.perf_counter(), time.process_time()
        found = turn(count)
        took = {"wall": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
        print(json.dumps(took | {"found": found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
