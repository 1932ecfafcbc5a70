"""The registry of features x distances: pooled features as published, each distance by another way.

Encoders are tiny random ones in the format of their family on disk.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from erw import evaluate
from erw.cli import main
from erw.data.sources import Source
from erw.encoders import load_encoder
from erw.encoders.base import resize
from erw.errors import ConfigError, DataError
from erw.evaluation.distances import Moments, cmmd, frechet, kid, precision_recall
from erw.evaluation.evaluate import SPACES, extractors_of, metrics_of
from helpers.images import Pixels, pictures, save_pngs
from helpers.vits import FAMILIES, TEXT, TINY, images, saved


def normalised(batch: Tensor, entry: str) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in FAMILIES[entry][2])
    return (batch.float() / 255 - mean) / std


def clip_336(folder: Path) -> Any:
    """A tiny CLIP, saved whole as on the hub."""
    vision = {**TINY, "image_size": 56, "patch_size": 14, "projection_dim": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=8)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def stretched(positions: Tensor, tokens: int) -> Tensor:
    """(1, n^2, D) -> (1, tokens^2, D) as DINOv2's code, read off at its coordinates one by one."""
    side = round(positions.shape[1] ** 0.5)
    grid = positions.transpose(1, 2).unflatten(2, (side, side))
    step = side / (tokens + 0.1)
    at = (torch.arange(tokens) + 0.5) * step - 0.5  # in steps of the stored grid
    at = (2 * at + 1) / side - 1
    where = torch.stack(torch.meshgrid(at, at, indexing="ij")[::-1], -1)[None]
    found = F.grid_sample(grid, where, mode="bicubic", padding_mode="border", align_corners=False)
    return found.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("entry", FAMILIES)
def test_pooled_features_are_those_of_the_librarys_model(entry: str, tmp_path: Path) -> None:
    model: Any = saved(entry, tmp_path)
    side = 224 if entry.startswith("dinov2") else FAMILIES[entry][1][1]["image_size"]
    batch = images(2, side)
    with torch.no_grad():
        if entry in ("clip-l", "siglip2-b"):
            expected = model.vision_model(pixel_values=normalised(batch, entry)).pooler_output
        elif entry == "mae-l":
            model.vit.config.mask_ratio = 0.0
            noise = torch.arange((side // 16) ** 2).float()[None].expand(2, -1)
            expected = model.vit(pixel_values=normalised(batch, entry), noise=noise)[0][:, 0]
        else:
            if entry == "dinov2-b":  # stored for 4 x 4 patches, 16 x 16 are shown
                positions = model.embeddings.position_embeddings
                positions.data = torch.cat([positions[:, :1], stretched(positions[:, 1:], 16)], 1)
            tokens = model(pixel_values=normalised(batch, entry)).last_hidden_state
            expected = tokens.mean(1) if entry == "ijepa-h" else tokens[:, 0]
    encoder = load_encoder(f"{entry}={tmp_path}")
    pooled = encoder.pooled(batch)
    assert pooled.shape == (2, encoder.dim_pooled) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)


def test_cmmds_features_are_clips_embeddings_of_length_1(tmp_path: Path) -> None:
    model = clip_336(tmp_path)
    encoder = load_encoder(f"clip-l-336={tmp_path}")
    batch = images(3, 56)
    with torch.no_grad():
        seen = model.vision_model(pixel_values=normalised(batch, "clip-l")).pooler_output
        expected = F.normalize(model.visual_projection(seen), dim=1)
    torch.testing.assert_close(encoder.pooled(batch), expected, atol=1e-5, rtol=1e-4)
    assert encoder.dim_pooled == 8 and encoder.dim == 24


def test_convnext_gives_its_last_map_and_the_maps_mean(tmp_path: Path) -> None:
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1])
    torch.manual_seed(0)
    model = transformers.ConvNextV2ForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"convnextv2-b={tmp_path}")
    batch = images(2, 224)
    with torch.no_grad():
        expected = model.convnextv2(normalised(batch, "dinov2-b")).last_hidden_state
    assert encoder.grid(224) == (7, 7) and encoder.dim_pooled == encoder.dim == 20
    torch.testing.assert_close(encoder.pooled(batch), expected.mean((2, 3)), atol=1e-5, rtol=1e-4)
    tokens = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(batch), tokens, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="multiple of its patch, 32"):
        load_encoder(f"convnextv2-b={tmp_path}@100")
    with pytest.raises(DataError, match="convnextv2-b@512"):
        encoder(images(1, 100))


@pytest.mark.parametrize(("before", "after"), [(64, 224), (256, 224), (256, 336)])
def test_pooled_features_see_pillows_resize(before: int, after: int) -> None:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (2, 3, before, before), generator=rng, dtype=torch.uint8)
    for batch, share in ((noise, 0.02), (images(2, before), 0.02)):
        pillow = [
            np.asarray(Image.fromarray(x).resize((after, after), Image.Resampling.BICUBIC))
            for x in batch.permute(0, 2, 3, 1).numpy()
        ]
        expected = torch.from_numpy(np.stack(pillow)).permute(0, 3, 1, 2)
        gap = (resize(batch, after, rounded=True).int() - expected.int()).abs()
        assert gap.max() <= 2 and (gap > 0).float().mean() < share


def test_cmmd_is_its_formula() -> None:
    assert cmmd(torch.zeros(3, 4), torch.full((5, 4), 5.0)) == pytest.approx(
        2000 * (1 - np.exp(-100 / 200)), rel=1e-12
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), 3 * rng.normal(size=(30, 6)) + 1

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10**2)).mean()  # type: ignore[no-any-return]

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert cmmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)
    assert cmmd(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-9)


class Counted(Source):
    """A source that counts how often an image is read."""

    name = "counted"
    class_names = ()

    def __init__(self, held: Tensor) -> None:
        self.held, self.reads = held.permute(0, 2, 3, 1).numpy(), 0

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self.reads += 1
        return self.held[index], 0

    def fingerprint(self) -> str:
        return "counted"


def test_several_spaces_in_one_pass_are_what_each_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"dinov2": tmp_path / "dino", "clip-embedding": tmp_path / "clip"}
    saved("dinov2-b", weights["dinov2"])
    clip_336(weights["clip-embedding"])
    monkeypatch.setitem(SPACES, "dinov2", f"dinov2-l={weights['dinov2']}@224")
    monkeypatch.setitem(SPACES, "clip-embedding", f"clip-l-336={weights['clip-embedding']}")
    real, fake = pictures(12, side=32), pictures(11, side=32, seed=1)
    source = Counted(fake)
    names = ["fd-dinov2", "pr-dinov2", "kid-dinov2", "cmmd", "fd-lite2"]
    found = evaluate(source, reference=real, metric=names, cache=tmp_path / "kept")
    assert source.reads == 11 + 1  # the first one also tells their size
    dino = load_encoder(f"dinov2-l={weights['dinov2']}@224")
    a, b = dino.pooled(real), dino.pooled(fake)
    assert found["fd-dinov2"] == pytest.approx(frechet(Moments.of(a), Moments.of(b)), rel=1e-6)
    assert found["kid_dinov2"] == pytest.approx(kid(a, b), rel=1e-5)
    pr = precision_recall(a, b, k=5)  # dgm-eval's
    assert (found["precision_dinov2"], found["recall_dinov2"]) == pr
    clip = load_encoder(f"clip-l-336={weights['clip-embedding']}")
    assert found["cmmd"] == pytest.approx(cmmd(clip.pooled(real), clip.pooled(fake)), rel=1e-4)
    alone = evaluate(fake, reference=real, metric="fd-lite2", cache=tmp_path / "other")
    assert found["fd-lite2"] == pytest.approx(alone["fd-lite2"], rel=1e-9)
    said = found.to_dict()["features"]
    assert (
        said["cmmd"]["encoder"] == "clip-l-336" and said["fd_lite2"] == alone.features["fd_lite2"]
    )
    assert said["fd_dinov2"]["encoder"] == "dinov2-l@224" == said["precision_dinov2"]["encoder"]


def test_names_of_metrics(tmp_path: Path) -> None:
    names = ["fid", "sfid", "is", "pr", "kid", "fd-dinov2", "cmmd", "fd-lite2"]
    assert [metric.space for metric in metrics_of(names)] == [
        *["inception"] * 5, "dinov2", "clip-embedding", "lite2"
    ]  # fmt: skip
    assert metrics_of(["adm"]) == metrics_of(["adm", "fid", "pr"])
    assert metrics_of(["dc-siglip2-b@224"])
    keeps = extractors_of(metrics_of(["fd-lite0", "fd-lite2", "kid-lite2"]))
    assert {space: one.kept for space, one in keeps.items()} == {"lite0": 0, "lite2": None}
    for wrong, near in (("cmd", "cmmd"), ("fid-lite2", "fd-lite2")):
        with pytest.raises(ConfigError, match=f"did you mean {near}"):
            metrics_of([wrong])
    with pytest.raises(ConfigError, match="mix features"):
        evaluate(
            pictures(), reference=pictures(), metric=["fd-lite0", "fd-lite2"], encoder=Pixels()
        )
    with pytest.raises(ConfigError, match="without effect"):
        evaluate(pictures(), reference=pictures(), weights="x")


def test_metrics_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    saved("dinov2-b", tmp_path / "dino")
    one, other = save_pngs(tmp_path / "a", pictures(7)), save_pngs(tmp_path / "b", pictures(7))
    monkeypatch.setitem(SPACES, "dinov2", f"dinov2-l={tmp_path / 'dino'}@224")
    asked = ["eval", str(one), "--reference", str(other), "--metrics", "fd-dinov2", "pr-dinov2"]
    out = tmp_path / "scores.json"
    assert main([*asked, "--out", str(out)]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["fd_dinov2", "precision_dinov2", "recall_dinov2"]
    assert json.loads(out.read_text())["features"]["fd_dinov2"]["weights"]
