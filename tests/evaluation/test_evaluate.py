"""Evaluation end to end: every kind of input gives the same score, references are kept."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from erw.data.sources.openmoji import OpenMojiSet
from erw.encoders.registry import load_encoder
from erw.errors import ConfigError, DataError, NumericsError
from erw.evaluation.distances import Moments, frechet
from erw.evaluation.evaluate import evaluate
from erw.sampling.generation import generate
from erw.sampling.save import write
from helpers.images import Pixels, pictures, save_pngs
from helpers.pixels import MODEL, ten


def test_every_kind_of_input_gives_the_same_score(tmp_path: Path) -> None:
    images, reference, encoder = pictures(), pictures(60, seed=1), Pixels()
    kinds: dict[str, object] = {"tensor": images}
    kinds["folder"] = save_pngs(tmp_path / "folder", images)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "folder").iterdir()):
            archive.write(path, path.name)
    kinds["zip"] = str(tmp_path / "all.zip")
    array = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=array)
    np.savez_compressed(tmp_path / "b.npz", arr_0=array)
    kinds |= {"npz": tmp_path / "a.npz", "packed npz": tmp_path / "b.npz"}
    scores = {
        name: evaluate(kind, reference=reference, encoder=encoder, cache=tmp_path, batch_size=16)
        for name, kind in kinds.items()
    }
    whole = Moments.of(encoder.pooled(reference)), Moments.of(encoder.pooled(images))
    for name, found in scores.items():
        assert found["fd-lite2"] == pytest.approx(frechet(*whole), rel=1e-9), name
        assert (found.count, found.reference_count, found.resolution) == (40, 60, (8, 8))


def test_a_set_against_itself_is_perfect(tmp_path: Path) -> None:
    images = pictures(60)
    metrics = ["fd-lite2", "kid-lite2", "pr-lite2", "dc-lite2"]
    found = evaluate(images, reference=images, metric=metrics, encoder=Pixels(), cache=tmp_path)
    assert abs(found["fd_lite2"]) < 1e-6
    assert found["precision_lite2"] == found["recall_lite2"] == found["coverage_lite2"] == 1
    names = ("fd", "kid", "precision", "recall", "density", "coverage")
    assert tuple(found.values) == tuple(f"{name}_lite2" for name in names)


def test_a_generation_carries_its_settings_into_the_score(tmp_path: Path) -> None:
    reference, encoder = pictures(30), Pixels()
    direct = evaluate(ten(), reference=reference, encoder=encoder, cache=tmp_path)
    written = write(ten(), tmp_path / "ten.npz")
    read = evaluate(written, reference=reference, encoder=encoder, cache=tmp_path)
    folder = write(ten(), tmp_path / "ten")
    pngs = evaluate(folder, reference=reference, encoder=encoder, cache=tmp_path)
    for found in (read, pngs):
        assert found["fd-lite2"] == pytest.approx(direct["fd-lite2"], rel=1e-9)
    record = json.loads(json.dumps(direct.to_dict()))
    assert record["settings"]["solver"] == "heun" and record["settings"]["steps"] == 2
    assert record["settings"] == read.to_dict()["settings"] == pngs.to_dict()["settings"]
    assert record["features"]["fd_lite2"]["encoder"] == "pixels"


def test_reference_statistics_are_kept_by_content(tmp_path: Path) -> None:
    images, encoder = pictures(), Pixels()
    folder = save_pngs(tmp_path / "real", pictures(50, seed=1))

    def score(metric: str = "fd-lite2") -> int:
        before = encoder.calls
        evaluate(images, reference=folder, metric=metric, encoder=encoder, cache=tmp_path / "kept")
        return encoder.calls - before - 1  # one call is for the images themselves

    assert score() == 1
    assert score() == 0
    assert score("pr-lite2") == 1  # needs the features too
    assert score("kid-lite2") == score() == 0
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # cut short: made again
    assert score() == 1
    first = folder / "000.png"  # other content under the same names
    first.write_bytes((folder / "001.png").read_bytes())
    assert score() == 1


def test_fd_lite2_tells_real_images_from_noise(tmp_path: Path) -> None:
    real = OpenMojiSet("test", size=32, count=24)
    other = OpenMojiSet("test", size=32, count=24, seed=1)
    encoder = load_encoder("efficientnet-lite2")
    near = evaluate(other, reference=real, cache=tmp_path, encoder=encoder)
    far = evaluate(pictures(24, side=32), reference=real, cache=tmp_path)
    same = evaluate(real, reference=real, cache=tmp_path, encoder=encoder)
    assert abs(same["fd-lite2"]) < 1e-6 < near["fd-lite2"] < far["fd-lite2"]
    assert near.features == far.features
    assert near.images_hash != near.reference_hash == far.reference_hash


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (pictures(1), DataError, "at least 2"),
        (pictures().float(), DataError, "expected uint8"),
        (pictures()[:, :1], DataError, "expected uint8"),
        (pictures(side=16), DataError, "images tensor are 16 x 16, the reference tensor is 8 x 8"),
        (generate(MODEL, range(2), decode=False), DataError, "latents"),
        ("no/such/folder", FileNotFoundError, "no/such/folder"),
        ("no/such/file.npz", FileNotFoundError, "no/such/file.npz"),
        (3, DataError, "are a int"),
    ],
)
def test_bad_images_say_so(tmp_path: Path, images: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        evaluate(images, reference=pictures(), encoder=Pixels(), cache=tmp_path)
    assert "\n" not in str(raised.value)


def test_mixed_sizes_and_unknown_metrics_say_so(tmp_path: Path) -> None:
    folder = save_pngs(tmp_path / "mixed", pictures(3))
    save_pngs(tmp_path / "big", pictures(1, side=16))
    (tmp_path / "big" / "000.png").rename(folder / "100.png")
    with pytest.raises(DataError, match="16 x 16, the images before it 8 x 8"):
        evaluate(folder, reference=pictures(), encoder=Pixels(), cache=tmp_path)
    with pytest.raises(ConfigError, match="did you mean fd-lite2"):
        evaluate(pictures(), reference=pictures(), metric="fid-lite2")


def test_nan_features_say_so(tmp_path: Path) -> None:
    class Broken(Pixels):
        def pooled(self, images: Tensor) -> Tensor:
            return super().pooled(images) / 0 * 0

    with pytest.raises(NumericsError, match="not finite"):
        evaluate(pictures(), reference=pictures(), encoder=Broken(), cache=tmp_path)
