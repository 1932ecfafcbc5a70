"""Post-hoc EMA of a real run: tracked, stored, resumed, mixed afterwards, sampled."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erw.cli import main
from erw.config import Run
from erw.ema import PowerEmas, Profile
from erw.errors import CheckpointError, ConfigError
from erw.models import build_model
from erw.training import load
from erw.training.checkpoint import paths
from erw.training.posthoc_ema import reconstruct, snapshots
from erw.training.trained import is_run
from helpers.tiny import tiny_cache, tiny_run
from helpers.training import go

SIGMAS = (0.05, 0.1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("profiles") / "cache", count=16).path


def profiled(cache: Path, **log: int) -> Run:
    """Twelve steps, four of them warm-up, with every checkpoint kept."""
    run = tiny_run(cache)
    log = {"checkpoint": 1, "keep": 20, "snapshot": 2} | log
    return run.replace(
        optim=dataclasses.replace(run.optim, ema_profiles=SIGMAS),
        log=dataclasses.replace(run.log, **log),
    )


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiled") / "run"
    go(profiled(cache), out)
    return out


def test_averages_are_those_of_the_weights_since_the_warm_up(run: Path, cache: Path) -> None:
    """Recomputed from the checkpoints of all steps: the same bits; float16 of them is stored."""
    net = build_model(load(run).run.model)
    emas = PowerEmas(net, SIGMAS)
    for path in paths(run / "checkpoints")[4:]:
        state = load_file(path)
        for name, p in net.named_parameters():
            p.data.copy_(state[f"net.model.{name}"])
        emas.update(net, int(path.stem.removeprefix("step-")) - 4)
    stored = load_file(run / "profiles" / "step-00000012.safetensors")
    for sigma in SIGMAS:
        for name, value in emas.tensors[sigma].items():
            assert torch.equal(state[f"profile.{sigma:g}.{name}"], value), name
            assert torch.equal(stored[f"{sigma:g}.{name}"], value.half()), name
    found = [(one.step, one.t, one.sigma_rels) for one in snapshots(run)]
    assert found == [(step, step - 4, SIGMAS) for step in (6, 8, 10, 12)]


def test_a_resumed_run_stores_the_same_averages(run: Path, cache: Path, tmp_path: Path) -> None:
    def pulls_the_plug(step: int, model: object, world: object) -> None:
        raise RuntimeError

    out, fewer = tmp_path / "run", profiled(cache, checkpoint=5)
    with pytest.raises(RuntimeError):
        go(fewer, out, at={7}, evaluate=pulls_the_plug)
    go(fewer, out)
    for one in snapshots(run):
        again, first = load_file(out / "profiles" / one.path.name), load_file(one.path)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first)


def test_a_tracked_profile_is_what_was_stored_and_any_other_is_mixed(run: Path) -> None:
    stored = load_file(run / "profiles" / "step-00000010.safetensors")
    found = reconstruct(run, 0.1, step=10)
    assert found.mix.error == 0
    assert all(torch.equal(v, stored[f"0.1.{k}"].float()) for k, v in found.tensors.items())
    other = reconstruct(run, 0.2)
    assert other.step == 12 and other.stored[-1] == Profile(0.1, 8) and 0 < other.mix.error < 0.3
    with pytest.raises(ConfigError, match="no snapshot at step 7, but at 6, 8, 10, 12"):
        reconstruct(run, 0.2, step=7)


def test_a_run_that_tracks_nothing_says_so(cache: Path, tmp_path: Path) -> None:
    go(tiny_run(cache, steps=5), tmp_path / "run")
    assert not (tmp_path / "run" / "profiles").exists()
    with pytest.raises(CheckpointError, match=r"train with --optim\.ema_profiles"):
        snapshots(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run"):  # they cannot begin midway
        go(profiled(cache), tmp_path / "run")


def test_one_command_writes_what_every_verb_loads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "wide.safetensors"
    assert main(["ema", str(run), "--sigma-rel", "0.2", "--out", str(out)]) == 0
    assert "after step 12: of 8 stored, profile off by" in capsys.readouterr().out
    model = load(out)
    assert is_run(out) and model.step == 12 and model.class_names == load(run).class_names
    expected = reconstruct(run, 0.2).tensors
    assert all(torch.equal(p, expected[name]) for name, p in model.net.named_parameters())
    draw = ["--seeds", "0:2", "--steps", "1", "--solver", "euler"]
    images = tmp_path / "images"
    weak = ["--autoguidance", str(run / "checkpoints" / "step-00000008.safetensors")]
    assert main(["sample", str(out), "--out", str(images), *draw, *weak, "--guidance", "2"]) == 0
    settings = json.loads((images / "settings.json").read_text())
    assert settings["ema"] == "power function of sigma_rel 0.2"
    assert settings["autoguidance"] == weak[1] and settings["autoguidance_step"] == 8
    for args, words in (
        (["--sigma-rel", "0.5", "--out", str(out)], "(0, 0.2887]"),
        (["--sigma-rel", "0.1", "0.2", "--out", str(out)], "a folder for several"),
        (["--sigma-rel", "wide", "--out", str(out)], "--sigma-rel"),
    ):
        assert main(["ema", str(run), *args]) == 2
        assert words in capsys.readouterr().err
    assert main(["ema", str(tmp_path), "--sigma-rel", "0.1", "--out", str(out)]) == 2
    assert "recipe.json" in capsys.readouterr().err
