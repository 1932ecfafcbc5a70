"""The validation loss: closed forms, fixed noise, and the same number however it is split."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from erw import ddpm, flow
from erw.config import Eval, Flow, Run, Sample
from erw.data.cache import Batch, Cache
from erw.dist import World
from erw.errors import ConfigError
from erw.evaluation.callback import TIMES, loss_sums, validating
from erw.log import read_metrics
from erw.training import load
from helpers.forked import both
from helpers.parts import make, photos
from helpers.pixels import trained
from helpers.scoring import call, watch, watch_in_two
from helpers.tiny import tiny_run

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
COUNT = 40


class Scaled(nn.Module):
    """A network whose output is `by` times its input (and, of a DiT, as many variances)."""

    class_token = representation = null_class = 0

    def __init__(self, by: float, outputs: int = 1) -> None:
        super().__init__()
        self.by, self.outputs = by, outputs

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.by * x, *[torch.ones_like(x)] * (self.outputs - 1)], 1)


class Reg(Scaled):
    """The same with a class token of 5 channels beside the latents."""

    class_token = 5

    def join(self, latents: Tensor, token: Tensor) -> Tensor:
        return torch.cat([latents.flatten(1), token], 1)


def losses(net: nn.Module, settings: Flow) -> Tensor:
    """Of images that are all zero: what is noised is the noise alone."""
    zero, labels = torch.zeros(COUNT, 3, 8, 8), torch.zeros(COUNT, dtype=torch.int64)
    images = Batch(zero, zero, labels, (), torch.full((COUNT, 5), 1e3))
    sampler: Literal["ddim", "heun"] = "ddim" if settings.objective == "ddpm" else "heun"
    run = Run(flow=settings, sample=Sample(solver=sampler))
    model: Any = SimpleNamespace(net=net, run=run)
    return loss_sums(model, range(COUNT), images, device=CPU) / COUNT


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "x", "score"])
def test_loss_of_a_known_network(path: Any, prediction: Any) -> None:
    """With x = 0, x_t = sigma eps; a network that gives a x_t is off by (a sigma - b) eps."""
    settings = Flow(path=path, prediction=prediction)
    t = torch.tensor(TIMES, dtype=torch.float64)
    sigma = flow.PATHS[path].sigma(t)
    target = {
        "velocity": flow.PATHS[path].d_sigma(t),
        "noise": torch.ones_like(t),
        "x": torch.zeros_like(t),
        "score": -1 / sigma,
    }[prediction]
    weight = sigma if prediction == "score" else torch.ones_like(t)
    noise = losses(Scaled(0.0), Flow(prediction="noise"))  # eps^2, at each time
    assert torch.allclose(noise, torch.ones(12, dtype=torch.float64), atol=0.06)
    expected = (weight * (1.7 * sigma - target)).square() * noise
    torch.testing.assert_close(losses(Scaled(1.7), settings), expected, rtol=1e-4, atol=1e-6)


def test_loss_of_a_known_dit() -> None:
    """Noise alone is compared, at twelve fixed steps of the chain; the variance does not count."""
    settings = Flow(objective="ddpm")
    steps = ddpm.step_at(torch.tensor(TIMES))
    assert len(set(steps.tolist())) == 12
    sigma = (1 - ddpm.chain().abar[steps]).sqrt()
    noise = losses(Scaled(0.0, outputs=2), settings)
    expected = (0.7 * sigma - 1).square() * noise
    torch.testing.assert_close(
        losses(Scaled(0.7, outputs=2), settings), expected, rtol=1e-4, atol=0
    )


def test_a_class_token_beside_the_latents_does_not_count() -> None:
    sigma = torch.tensor(TIMES, dtype=torch.float64)
    noise = losses(Reg(0.0), Flow(prediction="noise"))
    expected = (0.7 * sigma - 1).square() * noise
    torch.testing.assert_close(losses(Reg(0.7), Flow()), expected, rtol=1e-4, atol=1e-6)


def test_batches_and_shares_do_not_matter() -> None:
    model = trained()
    rng = torch.Generator().manual_seed(0)
    mean, std = (torch.rand(COUNT, 3, 8, 8, generator=rng) for _ in range(2))
    batch = Batch(mean, std, torch.arange(COUNT) % 3)

    def sums(part: slice, images: Batch = batch, **options: Any) -> Tensor:
        return loss_sums(model, range(COUNT)[part], images.rows(part), device=CPU, **options)

    whole = sums(slice(None))
    torch.testing.assert_close(sums(slice(None), batch_size=7), whole, rtol=1e-6, atol=0)
    parts = [sums(part) for part in (slice(0, 11), slice(11, None))]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-6, atol=0)
    other = batch._replace(labels=(batch.labels + 1) % 3)  # the class is given
    assert not torch.allclose(sums(slice(None), other), whole)


def only(out: Path, kind: str) -> dict[str, Any]:
    (line,) = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == kind]
    return line


def test_two_ranks_score_and_validate_as_one(straight: Path, cache: Path, tmp_path: Path) -> None:
    run = tiny_run(cache, eval=Eval(samples=9, reference_count=15, loss_images=11))
    watch(run, straight, tmp_path / "one")
    arguments = (str(tmp_path / "store"), run, straight, tmp_path / "two")
    both(watch_in_two, *arguments)
    one, two = (only(tmp_path / name, "validation") for name in ("one", "two"))
    assert two["flow_by_time"] == pytest.approx(one["flow_by_time"], rel=1e-6)
    assert two["flow"] == pytest.approx(sum(one["flow_by_time"]) / 12, rel=1e-6)
    one, two = (only(tmp_path / name, "eval") for name in ("one", "two"))
    assert two["values"] == pytest.approx(one["values"], rel=1e-6)
    assert two["how"]["count"] == 9 and two["how"]["images_hash"] == one["how"]["images_hash"]


def test_held_out_images_from_a_cache(
    straight: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images built in and from a cache give the same loss, but for the cache's float16."""
    from erw.data.prepare import prepare
    from erw.data.sources.openmoji import OpenMojiSet
    from erw.encoders import load_encoder, load_vae

    run, model = tiny_run(cache, eval=Eval(loss_images=12)), load(straight)
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(straight / "metrics.jsonl", tmp_path / name)
    call(validating(run, tmp_path / "a"), tmp_path / "a", model, ALONE)
    source = OpenMojiSet("test", size=16, count=12)
    encoders = [load_encoder("efficientnet-lite0")]
    prepare(source, tmp_path / "c", vae=load_vae("none"), encoders=encoders, image_size=16)
    held = run.replace(eval=dataclasses.replace(run.eval, heldout=str(tmp_path / "c")))
    real = Cache.open

    def rescaled(path: Any) -> Cache:
        """The held-out cache as if it had measured another scaling of its latents."""
        opened = real(path)
        if path == str(tmp_path / "c"):
            opened.vae |= {"scale": 2.0, "shift": 0.3}
        return opened

    monkeypatch.setattr(Cache, "open", rescaled)
    call(validating(held, tmp_path / "b"), tmp_path / "b", model, ALONE)
    a, b = (only(tmp_path / name, "validation") for name in "ab")
    assert b["flow_by_time"] == pytest.approx(a["flow_by_time"], rel=1e-3)
    assert a["times"] == pytest.approx([(i + 0.5) / 12 for i in range(12)])
    call(validating(run, tmp_path / "a"), tmp_path / "a", model, ALONE)
    only(tmp_path / "a", "validation")  # not written twice
    many = dataclasses.replace(held.eval, loss_images=13)
    with pytest.raises(ConfigError, match=r"has 12 images instead of 13"):
        validating(run.replace(eval=many), tmp_path)


def test_held_out_images_that_do_not_fit(cache: Path, tmp_path: Path) -> None:
    other = str(make(photos(tmp_path / "photos"), tmp_path / "other", "none").path)
    with pytest.raises(ConfigError, match=r"eval\.heldout is missing"):
        validating(tiny_run(other), tmp_path)
    with pytest.raises(ConfigError, match=r"has latents of another shape: prepare it"):
        validating(tiny_run(cache, eval=Eval(heldout=other, loss_images=8)), tmp_path)
