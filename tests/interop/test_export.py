"""Exported folders: diffusers without erw draws our images; erw reads them back; the hub."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import erw
from erw.config import Flow
from erw.encoders import load_vae
from erw.errors import CheckpointError, ConfigError
from erw.interop import load_pretrained
from erw.interop.export import transformer_code
from erw.sampling.generation import seed_noise
from helpers.exported import DDPM, SCALING, SMALL, model, scaled_vae
from helpers.parts import vae_folder
from helpers.released import LIGHTNING, peer, save

TOKEN = dataclasses.replace(SMALL, class_token="denoised", class_dim=8)
KINDS = ("classes", "pixels", "noise", "lightning", "dit", "dit, scaled")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of model, exported, with the noise and the settings to draw it with."""
    root = tmp_path_factory.mktemp("exported")
    other = tmp_path_factory.mktemp("other")
    lightning = save(peer(**LIGHTNING, adaln_shift=False), other / "lightning.pt")
    noise = model(flow=Flow(path="cosine", prediction="noise"), qk_norm=True)
    kinds = {
        "classes": (model(), "class", {"guidance_interval": [0.2, 0.8]}),
        "pixels": (model("none", channels=3, num_classes=0), None, {}),
        "noise": (dataclasses.replace(noise, scaling=SCALING), "class", {}),
        "lightning": (lightning, "class", {"guided_channels": 3}),  # and its shift of the times
        "dit": (model(flow=DDPM, rope=True, qk_norm=True), "class", {"guided_channels": 3}),
        "dit, scaled": (dataclasses.replace(model(flow=DDPM), scaling=SCALING), "class", {}),
    }
    for name, (source, labels, more) in kinds.items():
        case = root / name
        case.mkdir()
        told = {"vae": str(scaled_vae(other / "vae"))} if source is lightning else {}
        erw.export(source, case / "export", **told)
        ask = {"num_inference_steps": 4, **more}
        if labels:
            ask |= {"class_labels": [2, 0], "guidance_scale": 2.5}
        (case / "ask.json").write_text(json.dumps(ask))
        shape = erw.from_pretrained(case / "export").latent_shape
        save_file({"noise": seed_noise((0, 1), shape, "start")}, case / "noise.safetensors")
    (root / "classes" / "more").touch()
    child = [
        sys.executable,
        str(Path(__file__).parents[1] / "helpers" / "without_erw.py"),
        str(root),
    ]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(other / "home")}
    done = subprocess.run(child, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", KINDS)
def test_diffusers_alone_draws_our_images(exported: Path, name: str) -> None:
    case = exported / name
    found = erw.from_pretrained(case / "export")
    ask = json.loads((case / "ask.json").read_text())
    ours = erw.generate(
        found,
        [0, 1],
        ask.get("class_labels"),
        steps=4,
        solver="ddim" if name.startswith("dit") else "euler",
        guidance=ask.get("guidance_scale", 1.0),
        interval=tuple(ask.get("guidance_interval", (0, 1))),
        guided_channels=ask.get("guided_channels"),
        shift=found.run.sample.shift,
    ).collect()
    assert (found.run.sample.shift != 1) == (name == "lightning")
    drawn = load_file(case / "drawn.safetensors")
    assert (drawn["latents"] - ours.latents).abs().max() < 1e-4 * ours.latents.abs().max()
    vae = load_vae(found.vae)
    if name in ("noise", "dit, scaled"):  # scaled as its data had it, not as its VAE's config
        assert {k: getattr(vae, k).flatten().tolist() for k in SCALING} == SCALING
    raw = ours.latents / vae.scale + vae.shift
    pixels = raw if vae.network is None else vae.network.decode(raw).sample
    assert (drawn["images"] - (pixels / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4
    assert (drawn["images"] * 255 - ours.images).abs().max() < 0.51  # and these are those in uint8


def test_the_released_file_and_its_export_are_one_model(exported: Path, tmp_path: Path) -> None:
    """A file of the other time: the export's weights are in ours."""
    path = save(peer(**LIGHTNING, adaln_shift=False), tmp_path / "lightning.pt")
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([3, 7, 1000])
    want = load_pretrained(path).velocity(x, t, y)
    got = erw.from_pretrained(exported / "lightning" / "export").velocity(x, t, y)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_a_released_dit_there_and_back(tmp_path: Path) -> None:
    path = save(peer(out_channels=8), tmp_path / "DiT.pt")
    vae = str(vae_folder(tmp_path / "vae"))
    folder = erw.export(path, tmp_path / "a", vae=vae, layout="dit", num_heads=4)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([5, 1000])
    want = load_pretrained(path, "dit", num_heads=4).net(x, t, y)
    assert torch.equal(erw.from_pretrained(folder).net(x, t, y), want)


def test_what_lies_in_the_folder(exported: Path) -> None:
    folder = exported / "classes" / "export"
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    assert files == {
        "README.md", "erw.json", "model_index.json", "pipeline.py",
        "transformer/config.json", f"transformer/{weights}", "transformer/erw_transformer.py",
        "vae/config.json", f"vae/{weights}",
    }  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    assert index["id2label"] == {"0": "class 0", "1": "class 1", "2": "class 2"}
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] > 0
    for name in ("transformer/erw_transformer.py", "pipeline.py"):
        assert "import erw" not in (folder / name).read_text()
        assert "from erw" not in (folder / name).read_text()


def test_the_code_is_one_module_with_each_name_once() -> None:
    text = transformer_code()
    names = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names)) and {"FlowTransformer", "SiT", "velocity_from"} <= set(
        names
    )


def test_safetensors_there_and_back(tmp_path: Path) -> None:
    """Plain weights and settings; a VAE that has no public name goes with them."""
    first = model(str(scaled_vae(tmp_path / "vae")), rope=True)
    folder = erw.export(first, tmp_path / "a", format="safetensors")
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["README.md", "erw.json", "model.safetensors", "vae"]
    again = erw.from_pretrained(folder)
    assert again.class_names == first.class_names and again.step == 7
    assert again.run.model == first.run.model and again.vae == str(folder / "vae")
    for name, weight in first.net.named_parameters():
        assert torch.equal(again.net.get_parameter(name), weight)
    assert torch.allclose(load_vae(again.vae).scale, load_vae(first.vae).scale)
    assert (
        str(tmp_path) not in (folder / "erw.json").read_text() + (folder / "README.md").read_text()
    )
    third = erw.from_pretrained(erw.export(folder, tmp_path / "b"))
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(third.velocity(x, t, y), first.velocity(x, t, y))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format is 'onnx'; expected diffusers, safetensors"):
        erw.export(model(), tmp_path / "a", format="onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        erw.export(model(), tmp_path / "full")
    token = dataclasses.replace(model(), run=model().run.replace(model=TOKEN))
    with pytest.raises(CheckpointError, match="has class tokens; choose --format safetensors"):
        erw.export(token, tmp_path / "a")
    with pytest.raises(CheckpointError, match="has 4 latent channels, the model 3"):
        erw.export(model(channels=3), tmp_path / "a")
    early = {k: v for k, v in peer().items() if not k.startswith(("final_layer", "blocks.3"))}
    path = save(early, tmp_path / "warm.pt")
    with pytest.raises(CheckpointError, match=r"is a warm-up, .* train on from it"):
        erw.export(path, tmp_path / "a", layout="erw", num_heads=4, depth=4)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        erw.export(tmp_path / "nowhere", tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "warm.pt"]  # nothing half-written


def broken(folder: Path, change: object) -> None:
    record = json.loads((folder / "erw.json").read_text())
    change(record)  # type: ignore[operator]
    (folder / "erw.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(version=2), "has version 2, this erw reads 1"),
        (lambda r: r.pop("run"), "is damaged .*run"),
        (lambda r: r.update(step="7"), "is damaged .*step is"),
        (lambda r: r.update(class_names=["a"]), "names 1 classes, of 3"),
        (lambda r: r.update(class_names=[1, 2, 3]), "is damaged .*class_names is"),
        (
            lambda r: r["run"]["model"].update(depth=10**9),
            "network of 1000000000 x 32, patch 4 .*with 31 tensors",
        ),
        (lambda r: r["run"]["model"].update(input_size=10**9), "on latents of side 1000000000"),
        (lambda r: r["run"]["model"].update(input_size=None), "unknown sizes"),
        (lambda r: r["run"]["model"].update(width=4 * 10**8), "2 x 400000000, .*of side 16"),
        (lambda r: r["run"]["model"].update(width=64), "of another shape"),
        (lambda r: r["run"]["model"].update(net="rdm"), "unknown sizes"),
        (lambda r: r["run"]["model"].update(num_classes=-5), "num_classes is -5; expected"),
        (lambda r: r["run"]["model"].update(num_classes=10**12), "of another shape"),
        (lambda r: r["run"]["model"].update(qk_norm=True), "missing: blocks.0.attn.k_norm"),
        (lambda r: r.update(scaling="0"), "is damaged .*scaling"),
        (
            lambda r: r.update(scaling={"scale": [1.0] * 3}),
            "expected {'scale': 4, 'shift': 4}",
        ),
        (lambda r: r["run"]["model"].update(net="mlp"), "model.net is 'mlp'; known: rdm, sit"),
        (lambda r: r["run"].update(evil=1), "unknown setting run.evil"),
    ],
)
def test_a_folder_that_lies(tmp_path: Path, change: object, words: str) -> None:
    folder = erw.export(model(), tmp_path / "a", format="safetensors")
    broken(folder, change)
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        erw.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no erw.json: it was not exported by erw"):
        erw.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no folder nowhere, and that is no owner/name"):
        erw.from_pretrained("nowhere")
    folder = erw.export(model(), tmp_path / "a", format="safetensors")
    (folder / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        erw.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*model.safetensors"):
        erw.from_pretrained(folder)
    (folder / "erw.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is damaged"):
        erw.from_pretrained(folder)
