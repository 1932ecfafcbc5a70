"""Features by chunk: killed evaluations go on, processes share them, and no number notices.

Run as a program it scores: `python test_chunks.py IMAGES REFERENCE CACHE KILL_AFTER`.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import Pixels, pictures, save_pngs
from test_generate import ten
from torch import Tensor

from erw.dist import World
from erw.errors import DataError
from erw.evaluation import evaluate
from erw.evaluation.evaluate import Scores
from erw.evaluation.features import Wanted, extract
from erw.evaluation.inputs import image_set
from erw.evaluation.stored import Chunks
from erw.sampling.save import read_images, write

METRICS = ["fd-lite2", "pr-lite2", "kid-lite2", "mmd-lite2"]


def score(images: Path, reference: Path, cache: Path, *, kill_after: int = 0) -> Scores:
    """Under `Pixels`, by chunks of 8; kills itself, for real, after that many batches of 4."""
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += 1
        if done == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    return evaluate(
        images, reference=reference, metric=METRICS, encoder=Pixels(), cache=cache, batch_size=4,
        chunk=8, progress=progress,
    )  # fmt: skip


def test_a_killed_evaluation_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    images = save_pngs(tmp_path / "images", pictures(43))
    reference = save_pngs(tmp_path / "reference", pictures(30, seed=1))
    whole = score(images, reference, tmp_path / "whole")
    cache = tmp_path / "cache"
    code = f"import test_chunks as t; t.main({[str(p) for p in (images, reference, cache)]})"
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    kept = sorted(cache.rglob("chunks/*/*/*.safetensors"))
    assert [path.name for path in kept] == ["00000.safetensors", "00001.safetensors"]
    kept[0].write_bytes(kept[0].read_bytes()[:50])  # one of them cut short: made again
    encoder = Pixels()
    again = evaluate(
        images, reference=reference, metric=METRICS, encoder=encoder, cache=cache, batch_size=4,
        chunk=8,
    )  # fmt: skip
    assert encoder.calls == 2 * 4 + 1  # 4 chunks in full, the last of 3 images
    assert again.to_dict() == whole.to_dict()
    assert not list(cache.rglob("chunks/*"))


def test_other_images_weights_or_chunks_are_not_mistaken_for_these(tmp_path: Path) -> None:
    chunks, held = Chunks(tmp_path), image_set(pictures(20))
    first = extract(held, [Wanted(Pixels(), True, "a")], chunks=chunks, chunk=8)
    encoder = Pixels()
    again = extract(held, [Wanted(encoder, True, "a")], chunks=chunks, chunk=8)
    assert encoder.calls == 0 and first is not None and again is not None
    assert torch.equal(first[0].moments.scatter, again[0].moments.scatter)
    assert torch.equal(first[0].features, again[0].features)  # type: ignore[arg-type]
    extract(held, [Wanted(encoder, True, "b")], chunks=chunks, chunk=8)
    assert encoder.calls == 3


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """The command line under torchrun, gloo; every metric that needs moments, order or features."""
    images = save_pngs(tmp_path / "images", pictures(26, side=32))
    reference = save_pngs(tmp_path / "reference", pictures(21, side=32, seed=1))
    found = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*(run if processes > 1 else []), "-m", "erw", "eval", images]
        command += ["--reference", reference, "--chunk", 8, "--out", out]
        command += ["--metrics", "fd-lite2", "pr-lite2", "kid-lite2", "fd-lite0"]
        home = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / f"home{processes}")}
        home["OMP_NUM_THREADS"] = "1"  # as torchrun has it: other threads sum in another order
        said = subprocess.run(
            [sys.executable, *map(str, command)], env=home, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
        assert len(said.stdout.splitlines()) == 5  # the first process alone prints
        found[processes] = json.loads(out.read_text())
    one, two = found[1], found[2]
    assert two["values"] == pytest.approx(one["values"], rel=1e-6)
    assert {**one, "values": 0} == {**two, "values": 0}


def test_what_cannot_be_shared_says_so(tmp_path: Path) -> None:
    pair = World(0, 2, torch.device("cpu"))
    stream = image_set(iter([pictures(4)]))
    with pytest.raises(DataError, match="cannot be split over 2 processes"):
        extract(stream, [Wanted(Pixels())], world=pair)


def test_a_stream_is_scored_as_it_passes(tmp_path: Path) -> None:
    held, real = pictures(40), pictures(30, seed=1)
    expected = evaluate(held, reference=real, metric=METRICS, encoder=Pixels(), cache=tmp_path)
    for parts in (held.split(7), [part.permute(0, 2, 3, 1).numpy() for part in held.split(40)]):
        found = evaluate(
            iter(parts), reference=iter(real.split(11)), metric=METRICS, encoder=Pixels(), chunk=16,
            batch_size=5,
        )  # fmt: skip
        assert found.values == pytest.approx(expected.values, rel=1e-9)
        assert (found.count, found.reference_count) == (40, 30) and found.images_hash == ""


def test_parts_of_every_kind_of_images(tmp_path: Path) -> None:
    """What a process reads of its chunk is what the whole holds there."""
    held = pictures(20)
    array = held.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", more=np.arange(9), arr_0=array)
    np.savez_compressed(tmp_path / "b.npz", arr_0=array)
    folder = save_pngs(tmp_path / "folder", held)
    for kind in (held, array, tmp_path / "a.npz", tmp_path / "b.npz", folder):
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

    def stream() -> Iterator[Tensor]:
        nonlocal before
        for i in range(count // 64):
            if i == 64:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            yield pictures(64, side=64, seed=i)

    before = 0
    found = extract(image_set(stream()), [Wanted(Wide(), keep)])
    assert found is not None and found[0].moments.count == count // 64 * 64
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "most"), [(False, 100), (True, 1000)])
def test_50_000_images_pass_in_bounded_memory(keep: bool, most: float) -> None:
    """Moments alone take 50 MB more at most, whatever the number; all features are 410 MB."""
    code = f"import test_chunks as t; print(t.growth(50_000, keep={keep}))"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert float(said.stdout) < most, said.stderr


def main(paths: list[str]) -> None:
    """Score, and die after the fifth batch: in the middle of the third chunk."""
    images, reference, cache = map(Path, paths)
    score(images, reference, cache, kill_after=5)
