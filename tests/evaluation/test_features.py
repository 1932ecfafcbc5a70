"""Features in one pass: ranks share the images, streams pass by, and no number changes."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from erw.evaluation.features import Extractor, extract
from erw.evaluation.images import ImageSet, image_set
from erw.sampling.save import read_images, write
from helpers.forked import Python, ranks
from helpers.images import Pixels, pictures, save_pngs
from helpers.pixels import ten


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """The command line with gloo; every metric that needs moments, order or features."""
    images = save_pngs(tmp_path / "images", pictures(26, side=32))
    reference = save_pngs(tmp_path / "reference", pictures(21, side=32, seed=1))
    found = {}
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        command = ["erw", "eval", images, "--reference", reference, "--out", out]
        command += ["--metrics", "fd-lite2", "pr-lite2", "kid-lite2", "fd-lite0"]
        home = {"XDG_CACHE_HOME": str(tmp_path / f"home{count}")}
        started = [
            Python("-m", *command, env=rank | home) for rank in (ranks(2) if count == 2 else [{}])
        ]
        assert [each.wait() for each in started] == [0] * count, [each.err for each in started]
        said = [len(each.out.splitlines()) for each in started]
        assert said == [5, 0][:count]  # the first process alone prints
        found[count] = json.loads(out.read_text())
    one, two = found[1], found[2]
    assert two["values"] == pytest.approx(one["values"], rel=1e-6, abs=1e-6)
    assert {**one, "values": 0} == {**two, "values": 0}


def test_parts_of_every_kind_of_images(tmp_path: Path) -> None:
    """The range of images that one rank reads is that part of the whole."""
    held = pictures(20)
    array = held.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", more=np.arange(9), arr_0=array)
    np.savez_compressed(tmp_path / "b.npz", arr_0=array)
    folder = save_pngs(tmp_path / "folder", held)
    for kind in (held, tmp_path / "a.npz", tmp_path / "b.npz", folder):
        found = image_set(kind)
        assert torch.equal(torch.cat(list(found.batches(3, 5, 13))), held[5:13]), kind
        assert torch.equal(torch.cat(list(found.batches(6))), held), kind
    assert np.array_equal(
        np.concatenate(list(read_images(tmp_path / "a.npz", first=18))), array[18:]
    )
    drawn = image_set(ten())
    part = torch.cat(list(drawn.batches(3, 4, 9)))
    whole = torch.cat(list(drawn.batches(3)))[4:9]
    assert (part.int() - whole.int()).abs().max() <= 1
    written = image_set(write(ten(), tmp_path / "ten.npz"))
    assert drawn.content and drawn.content != written.content
    assert drawn.content == image_set(ten()).content


class Wide(Pixels):
    """2,052 features an image, as many as Inception's, without its hours."""

    def pooled(self, images: Tensor) -> Tensor:
        return super().pooled(images).repeat(1, 171)


def growth(count: int, *, keep: bool) -> float:
    """MB by which this process's peak memory rises while `count` images pass, after 4,096."""

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        nonlocal before
        for lo in range(first, stop, batch_size):
            if lo == 4096:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            yield pictures(batch_size, side=64, seed=lo)

    before, images = 0, ImageSet("random", count, "", (64, 64), read)
    found = extract(images, {"wide": Extractor(Wide(), kept=None if keep else 0)})
    assert found["wide"].moments.count == count
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "most"), [(False, 100), (True, 1000)])
def test_50_000_images_pass_in_bounded_memory(keep: bool, most: float) -> None:
    """Moments alone take 50 MB more at most, whatever the number; all features are 410 MB."""
    code = f"import test_features as t; print(t.growth(49_984, keep={keep}))"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert float(said.stdout) < most, said.stderr
