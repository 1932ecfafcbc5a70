"""What a network knows at which depth: hidden states, alignment, probes, and the verb for them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import erw
from erw.cli import main
from erw.config import Flow, Run, Sample
from erw.errors import CacheError, ConfigError, DataError
from erw.evaluation import alignment
from erw.evaluation.alignment import knn_accuracy, linear_probe
from erw.evaluation.probing import (
    METRICS,
    Material,
    curve,
    hidden_states,
    material,
)
from erw.models import SiT
from erw.rng import generator
from erw.sampling.generation import seed_noise
from erw.study.knowledge import axes_of, history, lines_over
from erw.training import Trained, load
from helpers.parts import make, photos, vae_folder
from helpers.tiny import tiny_run
from helpers.training import go


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    go(tiny_run(cache), out)
    return out


def network() -> Trained:
    torch.manual_seed(0)
    net = SiT(input_size=8, channels=3, patch=2, depth=3, width=32, heads=2, num_classes=4)
    for p in net.parameters():  # off the zeros of adaLN-Zero
        torch.nn.init.normal_(p, std=0.1)
    return Trained(net.eval(), Run(), "none")


def shown(count: int = 20) -> Material:
    rng = generator(0, "material")
    labels = torch.arange(count) % 4
    rows = tuple(range(5, 5 + count))
    latents = torch.randn(count, 3, 8, 8, generator=rng)
    return Material(rows, latents, labels, torch.randn(count, 6, generator=rng), "made up")


@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_states_are_those_of_the_network_at_that_noise(time: float) -> None:
    net, images = network(), shown()
    found = hidden_states(net, images, time=time)
    noise = seed_noise(images.rows, (3, 8, 8), "start")
    x_t = (1 - time) * images.latents + time * noise
    with torch.no_grad():
        hidden = net.net(x_t, torch.full((20,), time), None, tap=(1, 2, 3)).hidden
    for depth in (1, 2, 3):
        torch.testing.assert_close(found[depth], hidden[depth].mean(1))


@pytest.mark.parametrize("metric", ["cknna", "cka"])
def test_curve_is_the_alignment_of_means_of_length_one(metric: str) -> None:
    net, images = network(), shown()
    points = list(curve(net, images, metric=metric, times=(0.0, 0.5), depths=(1, 3), k=4))
    assert [(p.time, p.depth) for p in points] == [(0, 1), (0, 3), (0.5, 1), (0.5, 3)]
    pooled = hidden_states(net, images, time=0.5)[3]
    a, b = F.normalize(pooled.double(), dim=1), F.normalize(images.target.double(), dim=1)
    options = {} if metric == "cka" else {"k": 4}
    assert points[-1].value == pytest.approx(getattr(alignment, metric)(a, b, **options))


def test_a_layer_is_wholly_aligned_with_itself() -> None:
    net, images = network(), shown()
    own = images._replace(target=3 * hidden_states(net, images)[2])
    for metric in ("cknna", "cka"):
        (point,) = curve(net, own, metric=metric, depths=(2,), k=4)
        assert point.value == pytest.approx(1)


def blobs(count: int = 120, *, apart: float) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 3
    centres = apart * torch.eye(3, 8)
    return centres[labels] + torch.randn(count, 8, generator=generator(1, "blobs")), labels


@pytest.mark.parametrize("accuracy", [linear_probe, knn_accuracy])
def test_probes_tell_classes_apart_where_they_are(accuracy: object) -> None:
    assert accuracy(*blobs(apart=20.0)) == 1  # type: ignore[operator]
    assert accuracy(*blobs(apart=0.0)) < 0.7  # type: ignore[operator]
    features, labels = blobs(apart=20.0)
    stretched = features * torch.logspace(-3, 3, 8)
    assert linear_probe(stretched, labels) == 1  # standardised first
    with pytest.raises(DataError, match="one class"):
        accuracy(features, torch.zeros(120, dtype=torch.int64))  # type: ignore[operator]


def test_material_is_the_caches_own(cache: Path) -> None:
    found = material(cache, count=10)
    opened = erw.Cache.open(cache)
    batch = opened.read(list(found.rows), features=(found.encoder,))
    assert torch.equal(found.latents, batch.mean) and torch.equal(found.labels, batch.labels)
    assert torch.equal(found.target, batch.features[0].mean(1))
    assert material(cache, count=10).rows == found.rows and len(set(found.rows)) == 10
    with pytest.raises(CacheError, match="--encoders efficientnet-lite2"):
        material(cache, encoder="efficientnet-lite2")


def test_every_metric_of_a_run_from_the_command_line(
    cache: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = tmp_path / "plots" / "curve"
    asked = ["analyze", str(run), "--metric", "cknna", "--times", "0", "0.5", "--out", str(stem)]
    assert main([*asked, "--count", "24", "--k", "5"]) == 0
    record = json.loads(stem.with_suffix(".json").read_text())
    assert record["metric"] == "cknna" and record["count"] == 24
    steps = sorted({p["step"] for p in record["points"]})
    assert len(steps) == 2 and len(record["points"]) == 2 * 2 * 4  # checkpoints, times, blocks
    for ending in ("light.svg", "dark.svg", "light.png", "dark.png"):
        assert stem.with_name(f"curve-{ending}").stat().st_size > 1000
    layers = erw.cknna(load(run), data=cache, count=24, k=5)
    last = [p for p in record["points"] if p["step"] == steps[-1] and p["time"] == 0]
    assert layers == pytest.approx({p["depth"]: p["value"] for p in last})
    images = material(cache)
    for metric in METRICS:
        (point,) = curve(load(run), images, metric=metric, depths=(2,), k=5)
        assert -1.5 < point.value <= 1.0 + 1e-6, metric
    probe = [*asked[:2], "--metric", "probe", "--count", "24", "--out", str(stem)]
    assert main(probe) == 0 and "itself 0." in capsys.readouterr().out


def test_the_u_of_figure_5_is_one_command(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, stem = tmp_path / "kept", tmp_path / "u"
    run = tiny_run(cache)
    log = dataclasses.replace(run.log, checkpoint=4, keep=9)
    go(run.replace(log=log), out)
    asked = ["analyze", str(out), "--metric", "cknna", "--count", "24", "--k", "5"]
    assert main([*asked, "--out", str(stem)]) == 0
    assert "of 4 blocks fall and come back over steps" in capsys.readouterr().out
    record = json.loads(stem.with_suffix(".json").read_text())
    assert [(h["depth"], h["time"]) for h in record["history"]] == [(d, 0) for d in (1, 2, 3, 4)]
    for name in ("u-light.png", "u-step-dark.svg", "u-step.json"):
        assert (tmp_path / name).stat().st_size > 500
    last = {p["depth"]: p["value"] for p in record["points"] if p["step"] == 12}
    assert last == pytest.approx(erw.cknna(load(out), data=cache, count=24, k=5))
    assert main([*asked, "--checkpoint", "8", "--out", str(stem)]) == 0
    record = json.loads(stem.with_suffix(".json").read_text())
    assert {p["step"] for p in record["points"]} == {8}
    assert not record["history"]


def test_a_u_comes_back() -> None:
    def change(*values: float) -> list[dict[str, Any]]:
        point = {"run": "a", "time": 0.0, "depth": 1}
        return history([point | {"step": i, "value": v} for i, v in enumerate(values, start=1)])

    assert change(0.5, 0.4) == []
    (falls,), (bends,), (hardly,) = (change(0.9, *v) for v in ((0.5, 0.4), (0.4, 0.6), (0.4, 0.42)))
    assert not falls["u_shaped"] and not hardly["u_shaped"]
    assert bends["u_shaped"] and bends["step"] == 2 and bends["lowest"] == 0.4


def test_runs_of_one_step_each_are_one_history() -> None:
    point = {"time": 0.0, "depth": 1, "value": 1.0}
    points = [{"run": f"r{s}", "step": s, **point} for s in (3, 1, 2)]
    (line,) = lines_over(points, "step").values()
    assert line == [(1, 1.0), (2, 1.0), (3, 1.0)] and axes_of(points) == ["step"]
    assert len(lines_over([*points, {"run": "r9", "step": 3, **point}], "step")) == 4


def test_a_released_checkpoint_needs_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae, images = vae_folder(tmp_path / "vae"), photos(tmp_path / "photos")
    stored = make(images, tmp_path / "cache", vae, encoder=True)
    torch.manual_seed(0)
    net = SiT(input_size=8, channels=4, patch=2, depth=3, width=32, heads=2, num_classes=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.save(net.state_dict() | {"pos_embed": net.pos_embed}, tmp_path / "net.pt")
    file = ["analyze", str(tmp_path / "net.pt"), "--layout", "repa", "--num-heads", "2"]
    assert main([*file, "--cache", str(stored.path), "--times", "0.3", "--metric", "cka"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(file) == 2 and "give --cache" in capsys.readouterr().err


def test_a_dit_is_shown_the_step_of_its_chain() -> None:
    class Dit(SiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **options: Any) -> Any:
            self.seen = x, t
            return super().forward(x, t, y, **options)

    dit, images = Dit(input_size=8, channels=3, patch=2, depth=1, width=32, heads=2), shown(4)
    run = Run(flow=Flow(objective="ddpm"), sample=Sample(solver="ddim"))
    model = Trained(dit, run, "none")
    hidden_states(model, images, time=0.0)
    assert torch.equal(dit.seen[0], images.latents) and dit.seen[1].tolist() == [0] * 4
    hidden_states(model, images, time=0.5)
    x_t, told = dit.seen
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[499]
    noise = seed_noise(images.rows, (3, 8, 8), "start")
    expected = abar.sqrt() * images.latents + (1 - abar).sqrt() * noise
    torch.testing.assert_close(x_t.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert told.tolist() == [499] * 4


def test_bad_questions_say_so(cache: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, images = network(), shown()
    for options, message in (
        ({"time": 1.5}, "time 1.5"),
        ({"depths": (0,)}, "blocks 1 to 3"),
        ({"depths": (4,)}, "blocks 1 to 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            hidden_states(net, images, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean cknna"):
        next(curve(net, images, metric="cknn"))
    with pytest.raises(DataError, match="the model's are"):
        hidden_states(load(run), images)
    for words in (["nowhere"], [str(run), "--metric", "fid"], [str(run), "--cache", "nowhere"], []):
        assert main(["analyze", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
