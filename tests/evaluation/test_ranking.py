"""Which encoder suits some images: each number against its definition, and the verb."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import erw
from erw.cli import main
from erw.data.sources import open_source
from erw.data.statistics import statistics
from erw.encoders import ModuleEncoder
from erw.encoders.names import at_hand, described
from erw.encoders.registry import ENCODERS, load_encoder
from erw.errors import ConfigError
from erw.evaluation.alignment import knn_accuracy, spatial_structure
from erw.evaluation.ranking import rate
from erw.plan import Align
from helpers.images import pictures
from helpers.parts import photos
from helpers.tiny import tiny_run
from helpers.training import go, logged


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (2, 6)])
def test_spatial_structure_by_pairs(grid: tuple[int, int]) -> None:
    rows, columns = grid
    z = torch.randn(3, rows * columns, 5) + 0.3
    far_from = {8: 3, 6: 2, 4: 2}[max(grid)]
    near, far = [], []
    for image in z:
        for i in range(rows * columns):
            for j in range(rows * columns):
                steps = abs(i // columns - j // columns) + abs(i % columns - j % columns)
                value = cosine(image[i], image[j])
                near += [value] * (steps == 1)
                far += [value] * (steps >= far_from)
    wanted = sum(near) / len(near) - sum(far) / len(far)
    assert spatial_structure(z, grid) == pytest.approx(wanted, abs=1e-5)
    assert spatial_structure(z[:, :1].expand_as(z), grid) == pytest.approx(0, abs=1e-6)


def test_images_of_one_origin_do_not_vote_on_each_other() -> None:
    """Pairs of twins with a class of their own each: they alone would know it."""
    torch.manual_seed(0)
    features = torch.randn(40, 6).repeat_interleave(2, 0) + 0.01 * torch.randn(80, 6)
    labels, origins = torch.randint(4, (40,)).repeat_interleave(2), torch.arange(80) // 2
    right = 0
    for i in range(80):
        others = sorted(
            (-cosine(features[i], features[j]), j) for j in range(80) if origins[i] != origins[j]
        )
        votes = torch.zeros(4, dtype=torch.float64)
        for value, j in others[:20]:
            votes[labels[j]] += torch.tensor(-value / 0.07, dtype=torch.float64).exp()
        right += int(votes.argmax() == labels[i])
    assert knn_accuracy(features, labels, origins) == pytest.approx(right / 80)
    assert knn_accuracy(features, labels, torch.arange(80)) > right / 80 + 0.2


def test_statistics_are_those_of_all_tokens_however_they_are_cut() -> None:
    z = torch.randn(10, 7, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + torch.tensor([9.0, 0, 0, 1, 2])
    found, flat = statistics(z.split([4, 1, 5])), z.flatten(0, 1)
    deviation, mean = torch.std_mean(flat, dim=0, correction=0)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.deviation, deviation)
    near = sum(cosine(token, mean) for token in flat) / len(flat)
    assert found.nearness == pytest.approx(near, abs=1e-5)
    deviation, mean = torch.std_mean(found.standardized(flat), dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(5), atol=1e-5, rtol=0)
    assert statistics([torch.ones(2, 3, 4)]).nearness == pytest.approx(1)


def test_targets_standardised_over_images_are_features_stored_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same run, to the bit, as one that reads them standardised and leaves them alone."""
    term = Align(block=2, normalize="images")
    run = tiny_run(cache, plan=erw.Plan(align=(term,)))
    go(run, tmp_path / "a")
    opened = erw.Cache.open(cache)
    (name,) = opened.features
    every = opened.read(range(len(opened)), features=(name,)).features[0]
    stats = statistics(every.split(64))
    unpack = erw.data.cache.unpack
    monkeypatch.setattr("erw.data.cache.unpack", lambda x: stats.standardized(unpack(x)))
    go(tiny_run(cache, plan=erw.Plan(align=(Align(block=2),))), tmp_path / "b")
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    with pytest.raises(ConfigError, match="images is for encoders, not ema"):
        Align(target="ema", target_block=1, phase="full", normalize="images")


def test_numbers_of_an_encoder_are_those_of_their_definitions() -> None:
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    labels, origins = torch.arange(20) % 2, torch.arange(20)
    encoder = ModuleEncoder("mean", nn.AvgPool2d(4), dim=3, patch=4, side=32)
    found, z = rate(encoder, images, labels, origins), encoder(images)
    assert (found["grid"], found["width"], found["gflops"]) == ((8, 8), 3, 0)
    assert found["spatial"] == pytest.approx(spatial_structure(z, (8, 8)), abs=1e-5)
    pooled = statistics([z]).standardized(z.mean(1))
    assert found["knn"] == knn_accuracy(pooled, labels, origins)
    assert rate(encoder, images, torch.zeros_like(labels), origins)["knn"] is None


def test_the_verb_lists_and_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["encoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*ENCODERS, "vae:openmoji-f4c4"]
    widths = {name: width for name, width, _ in described()}
    assert widths["siglip2-so400m"] == 1152
    assert at_hand() == [*list(ENCODERS)[:6], "vae:openmoji-f4c4"]
    assert all(load_encoder(name).dim == widths[name] for name in at_hand())
    out = tmp_path / "table.json"
    few = ["--count", "54", "--encoders", "pixels", "efficientnet-lite0@64"]
    assert main(["encoders", "--rank", "openmoji", *few, "--out", str(out)]) == 0
    table = json.loads(out.read_text())["encoders"]
    assert [row["encoder"] for row in table] == ["efficientnet-lite0@64", "pixels"]
    assert table[0]["knn"] > table[1]["knn"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:]] == ["efficientnet-lite0@64", "pixels"]
    assert main(["encoders", "--encoders", "pixels"]) == 2
    assert main(["encoders", "--rank", "openmoji", "--encoders", "nothing"]) == 2
    for i, image in enumerate(pictures(12, side=64)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    assert main(["encoders", "--rank", str(tmp_path), "--encoders", "pixels@4"]) == 2
    assert "1 x 1 tokens an image are too few" in capsys.readouterr().err
    (tmp_path / "3.png").write_bytes(b"no image")
    assert main(["encoders", "--rank", str(tmp_path), "--encoders", "pixels"]) == 2
    assert re.search(r"3\.png: take it out", capsys.readouterr().err)


def test_a_part_of_the_images_is_ranked_as_if_it_were_all(tmp_path: Path) -> None:
    """A split as its folder, and named columns as a table that has no others."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    photos(tmp_path / "set" / "train", each=4)
    photos(tmp_path / "set" / "test", each=5)
    files = sorted((tmp_path / "set" / "test").rglob("*.*"))
    columns = {"photo": [file.read_bytes() for file in files], "kind": [i % 3 for i in range(15)]}
    parquet.write_table(pyarrow.table(columns | {"no": [0] * 15}), tmp_path / "other.parquet")
    usual = pyarrow.table({"image": columns["photo"], "label": columns["kind"]})
    parquet.write_table(usual, tmp_path / "usual.parquet")

    def ranked(*args: object) -> list[dict[str, Any]]:
        out = tmp_path / "table.json"
        words = ["encoders", "--encoders", "pixels", "--out", out, "--rank", *args]
        assert main([str(word) for word in words]) == 0
        rows: list[dict[str, Any]] = json.loads(out.read_text())["encoders"]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert ranked(tmp_path / "set", "--split", "test") == ranked(tmp_path / "set" / "test")
    assert ranked(tmp_path / "set", "--split", "test") != ranked(tmp_path / "set" / "train")
    named = ranked(tmp_path / "other.parquet", "--columns", "photo", "kind")
    assert named == ranked(tmp_path / "usual.parquet")
    assert main(["encoders", "--split", "test"]) == 2


def test_the_origin_of_a_composed_image_is_its_glyph() -> None:
    source = open_source("openmoji-test", count=400)
    names = [source.origin(i) for i in range(400)]
    assert len(set(names)) < 400
    assert all(name == source.composition(i).hexcode for i, name in enumerate(names))
