"""Settings in files of strangers: whatever stands in them, there is a model or one clear line."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import erw
from erw.cli import main
from erw.errors import CheckpointError, ErwError
from erw.interop.convert import convert
from erw.io import save_tensors
from erw.training.trained import Trained
from helpers.exported import RGB_SCALING, model, recipe_of
from helpers.hostile import variants
from helpers.released import peer, save


@pytest.fixture(scope="module")
def small() -> Trained:
    return model("none", channels=3)


def drawn(path: Path) -> None:
    """All of `erw sample` up to the drawing."""
    loaded = erw.from_pretrained(path) if (path / "erw.json").is_file() else erw.load(path)
    generation = erw.generate(loaded, range(4))
    assert set(generation.labels or ()).isdisjoint(loaded.empty_classes)


def tried(records: Iterable[tuple[str, Any]], write: Callable[[Any], Path]) -> dict[str, str]:
    """What each record is refused with, in one line that names the file; the others are drawn."""
    said = {}
    for what, record in records:
        path = write(record)
        try:
            drawn(path)
        except (ErwError, OSError) as error:
            said[what] = str(error)
            assert "\n" not in said[what] and len(said[what]) < 600, what
            if "vae" not in what and "empty" not in what:  # what else may be wrong with a VAE
                assert isinstance(error, CheckpointError) and str(path) in said[what], said[what]
    return said


def test_the_recipe_of_a_run(small: Trained, tmp_path: Path) -> None:
    def write(recipe: Any) -> Path:
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        return tmp_path

    weights = dict(small.net.named_parameters())
    save_tensors(tmp_path / "ema.safetensors", weights, {"step": "7"})
    recipe = recipe_of(small)
    drawn(write(recipe))
    said = tried(variants(recipe), write)
    assert len(said) > 120
    for what, words in {
        "resolved.model.input_size = None": "does not fit a network of 2 x 32, patch 4 (unknown",
        "resolved.model.depth = 1000000000": "with 31 tensors",
        "resolved.model.net = 'x'": "model.net is 'x'; known: rdm, sit",
        "resolved.model.channels = -1": "model.channels is -1; expected a number in [1, inf)",
        "resolved = None": "resolved is None; expected Run",
        "cache.class_names = 'delete'": "cache.class_names is None; expected tuple",
        "cache.class_names = 'x'": "names 1 classes, of 3",
        "cache.scaling.scale = []": "scaling of {'shift': 3, 'scale': 0}, expected",
    }.items():
        assert words in said[what], said[what]


def test_the_header_of_a_file_of_weights(
    small: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of `erw ema`, which carries its recipe."""
    weights, path = dict(small.net.named_parameters()), tmp_path / "ema.safetensors"
    recipe = recipe_of(small)

    def write(header: dict[str, str]) -> Path:
        save_tensors(path, weights, header)
        return path

    good = {"step": "7", "run": json.dumps(recipe)}
    drawn(write(good))
    wrong = [(f"{key} = {x}", good | {key: x}) for key in good for x in ("", "x", "[1]", "null")]
    wrong += [("cache", good | {"run": json.dumps(recipe | {"cache": {}})})]
    assert len(tried(wrong, write)) == len(wrong)
    for argv in (
        ["sample", str(path), "--out", "x"],
        ["convert", str(path), "x.pt", "--to", "repa"],
    ):
        assert main(argv) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: the recipe of {path} is damaged") and line.count("\n") == 1


def test_the_record_of_an_export(small: Trained, tmp_path: Path) -> None:
    folder = erw.export(small, tmp_path / "a", format="safetensors")
    record = json.loads((folder / "erw.json").read_text())

    def write(changed: Any) -> Path:
        (folder / "erw.json").write_text(json.dumps(changed))
        return folder

    run = {"model": record["run"]["model"], "plan": {"align": []}}
    short = record | {"run": run, "scaling": RGB_SCALING}
    drawn(write(short))
    assert len(tried(variants(short), write)) > 120
    cost = {"images": 8, "flops_total": 1, "flops_warmup": 0, "flops_teacher": 0, "seconds": 1.0}
    write(record | {"spent": cost})
    erw.export(folder, tmp_path / "good", format="safetensors")
    refused = 0
    for _, changed in variants(cost):
        write(record | {"spent": changed})
        try:
            shutil.rmtree(erw.export(folder, tmp_path / "again", format="safetensors"))
        except CheckpointError as error:
            assert f"what is told of {folder} is damaged" in str(error)
            assert not (tmp_path / "again").exists()
            refused += 1
    assert refused > 15


def refused(path: Path, **options: Any) -> str:
    """The one line, naming the file, with which a released checkpoint is refused."""
    with pytest.raises(CheckpointError) as error:
        erw.load_pretrained(path, num_heads=4, **options)
    line = str(error.value)
    assert str(path) in line and "\n" not in line and len(line.replace(str(path), "")) < 600
    return line


@pytest.mark.parametrize("layout", ["repa", "diffusers-dit"])
def test_the_tensors_of_a_released_file(layout: str, tmp_path: Path) -> None:
    """Each of them as a scalar; some of every kind and shape that a network has not."""
    size: dict[str, Any] = {"num_classes": 10, "depth": 1}
    size |= {"projector": True} if layout == "repa" else {"out_channels": 8}
    options: dict[str, Any] = {"layout": layout}
    state, path = peer(**size), tmp_path / "a.pt"
    if layout == "diffusers-dit":
        options |= {"input_size": 8}
        convert(save(state, path), tmp_path / "b.pt", to=layout, layout="dit", num_heads=4)
        state = torch.load(tmp_path / "b.pt")
    erw.load_pretrained(save(state, path), num_heads=4, **options)
    for name in state:
        refused(save(state | {name: torch.tensor(1.0)}, path), **options)
    names = [
        n for n in state if n.endswith(("to_q.weight", "0.0.bias", "qkv.weight", "linear.bias"))
    ]
    assert len(names) > 1
    for name in names:
        value = state[name]
        for other in (torch.zeros(0), torch.zeros(3), torch.zeros(1, 1, 1, 1, 1), value[:0]):
            refused(save(state | {name: other}, path), **options)
        for other in (value.bool(), value.to(torch.complex64), value.to_sparse(), value.int()):
            said = refused(save(state | {name: other}, path), **options)
            assert f"{name} is " in said and "expected dense floating point" in said


def test_the_settings_of_a_diffusers_dit(tmp_path: Path) -> None:
    """Heads and side of the latents are the two that count; the rest is in the shapes."""
    state = peer(out_channels=8, num_classes=10, depth=1)
    (tmp_path / "dit").mkdir()
    file = tmp_path / "dit" / "diffusion_pytorch_model.safetensors"
    convert(save(state, tmp_path / "a.pt"), file, to="diffusers-dit", layout="dit", num_heads=4)
    good = {"num_attention_heads": 4, "sample_size": 8, "num_layers": 1}
    for what, config in variants(good):
        (tmp_path / "dit" / "config.json").write_text(json.dumps(config))
        try:
            shape = erw.load_pretrained(tmp_path / "dit").run.model
        except CheckpointError as error:
            assert str(tmp_path / "dit") in str(error) and "\n" not in str(error), what
        else:
            assert what.startswith("num_layers") and (shape.heads, shape.input_size) == (4, 8), what
    for text in ("", "[]", "null", "{", "[" * 100_000):
        (tmp_path / "dit" / "config.json").write_text(text)
        assert "is no JSON object" in refused(tmp_path / "dit")
