"""Features of a run's own model: as its network gives them, in a cache, and as a teacher."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erw.align import attention_logits
from erw.cli import main
from erw.data import Cache
from erw.data.on_the_fly import write
from erw.data.prepare import add_encoders, prepare
from erw.encoders import Encoder, load_encoder, load_vae
from erw.encoders.base import counted_flops
from erw.errors import CheckpointError, ConfigError, DataError
from erw.interop import from_pretrained
from erw.interop.export import export
from erw.interop.metadata import public
from erw.io import load_tensors, save_tensors, weight_hash
from erw.training import load
from helpers.parts import photos, vae_folder
from helpers.tiny import as_dit, tiny_run
from helpers.training import go


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 photos of 3 classes, a VAE of factor 4 with a scaling, a cache and a run on it."""
    root = tmp_path_factory.mktemp("self")
    photos(root / "set", each=4)
    prepare(
        root / "set", root / "cache", vae=str(vae_folder(root / "vae")), image_size=32,
        encoders=["efficientnet-lite0"], images=True, rows_per_shard=5, progress=False,
    )  # fmt: skip
    run = tiny_run(root / "cache")
    go(run.replace(model=dataclasses.replace(run.model, patch=2)), root / "run")
    weights, header = load_tensors(root / "run" / "ema.safetensors")
    torch.manual_seed(0)  # twelve steps teach it little about classes
    weights = {k: v + 0.1 * torch.randn(v.shape) for k, v in weights.items()}
    save_tensors(root / "run" / "ema.safetensors", weights, header)
    return root


def by_hand(root: Path, images: Tensor, labels: Tensor, block: int, scale: float) -> Tensor:
    """Hidden tokens of the loaded model, image by image."""
    model, rows = load(root / "run"), []
    seen: list[Tensor] = []
    model.net.blocks[block - 1].register_forward_hook(lambda *a: seen.append(a[2]))
    for image, label in zip(images, labels, strict=True):
        mean = load_vae(root / "vae").encode(image[None])[:, :4]
        x = (mean - 0.1) * 0.5
        both = torch.cat([x, x])
        model.net(both, torch.zeros(2), torch.tensor([model.num_classes, label]))
        null, given = seen.pop()
        rows.append(null if not scale else (1 - scale) * null + scale * given)
    return torch.stack(rows)


@pytest.mark.parametrize(("form", "scale"), [("#2", 0.0), ("#3:1", 1.0), ("#1:30", 30.0)])
@torch.no_grad()
def test_features_are_the_hidden_tokens_of_the_model(root: Path, form: str, scale: float) -> None:
    encoder = load_encoder(f"run:{root / 'run'}{form}")
    images = Cache.open(root / "cache").columns(["image"], range(5))["image"]
    labels = torch.tensor([0, 2, 1, 1, 0])
    wanted = by_hand(root, images, labels, int(form[1]), scale)
    assert encoder.grid(32) == (4, 4) and encoder.dim == wanted.shape[2] == 32
    got = encoder(images, labels) if scale else encoder(images)
    torch.testing.assert_close(got, wanted, atol=1e-4 * max(1, scale), rtol=1e-4)
    if scale:
        assert (got - encoder(images)).abs().max() > 0.01 * scale  # without a label: unguided
        assert torch.equal(encoder(images), encoder(images, torch.full((5,), 3)))


@pytest.mark.parametrize("block", [1, 3])
@torch.no_grad()
def test_its_attention_is_that_of_its_blocks(root: Path, block: int) -> None:
    """Images of the run's set at t = 0 and without a class, as its tokens."""
    model = load(root / "run")
    encoder = load_encoder(f"run:{root / 'run'}#attention{block}")
    images = Cache.open(root / "cache").columns(["image"], range(3))["image"]
    seen: list[Tensor] = []
    attn = model.net.blocks[block - 1].attn
    attn.register_forward_pre_hook(lambda _, inputs: seen.append(attn.qkv(inputs[0])))
    x = (load_vae(root / "vae").encode(images)[:, :4] - 0.1) * 0.5
    model.net(x, torch.zeros(3), torch.full((3,), model.num_classes))
    q, k, _ = seen[0].unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    wanted = q @ k.mT / 4  # two heads of 16 channels
    assert encoder.grid(32) == (4, 4) and encoder.dim == 64 and wanted.std() > 0.1
    torch.testing.assert_close(attention_logits(encoder(images), 2), wanted, atol=1e-4, rtol=1e-4)


def test_flops_are_those_of_the_vae_and_each_pass_up_to_the_block(root: Path) -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    vae, net = load_vae(root / "vae"), load(root / "run").net
    latent, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    encoding = counted_flops(lambda: vae.encode(image))
    for block, form, passes in ((3, "#3", 1), (3, "#3:30", 2), (1, "#1", 1)):
        once = counted_flops(lambda block=block: net(latent, t, tap=(block,), stop_at=block))
        assert load_encoder(f"run:{root / 'run'}{form}").flops(32) == encoding + passes * once
        # Modulation, queries, keys and values are computed once more, before the block.
        more = load_encoder(f"run:{root / 'run'}#attention{block}").flops(32) - encoding - once
        assert more == 2 * 32 * 6 * 32 + 2 * 16 * 32 * 96
    assert once < counted_flops(lambda: net(latent, t)) / 2


def test_the_weights_of_both_networks_are_its_identity(root: Path, tmp_path: Path) -> None:
    name = f"run:{root / 'run'}#2"
    copy = Path(shutil.copytree(root / "run", tmp_path / "copy"))
    same = weight_hash(load_encoder(name))
    assert weight_hash(load_encoder(f"run:{copy}#2")) == same
    weights = load_file(copy / "ema.safetensors")
    weights["blocks.0.mlp.fc1.bias"][0] += 1
    save_file(weights, copy / "ema.safetensors")
    assert weight_hash(load_encoder(f"run:{copy}#2")) != same
    vae = Path(shutil.copytree(root / "vae", tmp_path / "vae"))
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"][0] += 1
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    copy = Path(shutil.copytree(root / "run", tmp_path / "other"))
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["cache"]["vae"] = str(vae)
    (copy / "recipe.json").write_text(json.dumps(recipe))
    assert weight_hash(load_encoder(f"run:{copy}#2")) != same


def test_added_to_a_cache_on_the_command_line_it_teaches(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In flipped rows and batches of any cut each image has the guidance of its own label."""
    name, cache = f"run:{root / 'run'}#2:30", tmp_path / "cache"
    before = shutil.copytree(root / "cache", cache)
    source = str(root / "set")
    add = ["prepare", source, "--out", str(cache), "--add-encoder", name, "--batch-size", "7"]
    assert main(add) == 0 and name in capsys.readouterr().out
    grown = Cache.open(before)
    assert list(grown.features) == ["efficientnet-lite0", name]
    spec, encoder = grown.features[name], load_encoder(name)
    assert (spec.dim, spec.grid, spec.weight_hash) == (32, (4, 4), weight_hash(encoder))
    batch = grown.read(range(12), features=[name])
    assert batch.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    images = grown.columns(["image"], range(12))["image"]
    wanted = by_hand(root, images, batch.labels, 2, 30.0)
    torch.testing.assert_close(batch.features[0], wanted, atol=0.02, rtol=2e-3)  # float16
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    assert main(add) == 0
    assert files == {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    train = ["train", "debug", "--data.cache", str(cache), "--model.patch", "2", "--steps", "8"]
    train += ["--plan.align.0.target", f"encoder:{name}", "--optim.precision", "fp32"]
    assert main([*train, "--out", str(tmp_path / "student")]) == 0
    recipe = json.loads((tmp_path / "student" / "recipe.json").read_text())
    assert recipe["cost"]["teacher"] == spec.flops == encoder.flops(32)
    assert recipe["resolved"]["data"]["features"] == [name]


def test_read_on_the_fly(root: Path, tmp_path: Path) -> None:
    name = f"run:{root / 'run'}#2:3"
    online = write(
        root / "set", tmp_path / "online", vae=str(root / "vae"), encoders=[name],
        image_size=32, precision="float32",
    )  # fmt: skip
    images = Cache.open(root / "cache").columns(["image"], range(12))["image"]
    rows = [11, 0, 5]
    batch = online.read(rows, features=[name])
    wanted = by_hand(root, images[rows], batch.labels, 2, 3.0)
    assert batch.labels.tolist() == [2, 0, 1]
    torch.testing.assert_close(batch.features[0], wanted, atol=1e-3, rtol=1e-3)


def test_a_dit_teaches_too(root: Path, tmp_path: Path) -> None:
    run = tiny_run(root / "cache", steps=5)
    run = as_dit(run.replace(model=dataclasses.replace(run.model, patch=2)))
    go(run, tmp_path / "dit")
    encoder = load_encoder(f"run:{tmp_path / 'dit'}#2:2")
    assert (
        encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1])).shape[1] == 16
    )


def test_what_is_no_teacher(root: Path, straight: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], form: str, words: str) -> None:
        with pytest.raises(kind, match=words) as error:
            load_encoder(form)
        assert "\n" not in str(error.value)

    run = f"run:{root / 'run'}"
    for form in (
        run,
        f"{run}#",
        f"{run}#two",
        f"{run}#2:",
        f"{run}#2:-1",
        f"{run}#attention",
        f"{run}#attention2:3",
        "run:#2",
        "run:",
    ):
        refused(ConfigError, form, "expected run:FOLDER#BLOCK, #BLOCK:SCALE or #att")
    refused(ConfigError, f"{run}#0", "expected block 1 to 4")
    refused(ConfigError, f"{run}#5:2", "expected block 1 to 4")
    refused(ConfigError, f"{run}#attention5", "expected block 1 to 4")
    refused(CheckpointError, f"run:{tmp_path / 'nothing'}#2", "is no run whose features can be")
    copy = Path(shutil.copytree(root / "run", tmp_path / "copy"))
    recipe = json.loads((copy / "recipe.json").read_text())
    for resolved in (None, {"model": {"depth": 2}}, recipe["resolved"] | {"model": 3}):
        (copy / "recipe.json").write_text(json.dumps(recipe | {"resolved": resolved}))
        refused(CheckpointError, f"run:{copy}#2", "is no run whose features can be read")
    recipe["resolved"]["model"]["depth"] = 2
    (copy / "recipe.json").write_text(json.dumps(recipe))
    refused(CheckpointError, f"run:{copy}#2", "is no run whose features can be read")
    (copy / "ema.safetensors").write_bytes(b"cut")
    refused(CheckpointError, f"run:{copy}#2", "is no run whose features can be read")
    small = tiny_run(root / "cache", steps=5)
    model = dataclasses.replace(small.model, patch=2, num_classes=0)
    go(small.replace(model=model), tmp_path / "unconditional")
    refused(ConfigError, f"run:{tmp_path / 'unconditional'}#2:3", "classes for a scale")
    encoder: Encoder = load_encoder(f"run:{tmp_path / 'unconditional'}#2")
    with pytest.raises(DataError, match="is for images of 32 px, not of 64"):
        encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="is of other classes: leave out its :SCALE"):
        add_encoders(root / "set", root / "cache", encoders=[f"run:{straight}#2:3"])


@pytest.mark.parametrize("name", ["quickstart_haste", "quickstart_self"])
def test_a_teacher_that_is_not_there_is_said_before_any_image_is_prepared(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is no run whose features can be read" in error
    assert not list(tmp_path.iterdir())


def test_an_export_names_its_teacher_without_the_path(root: Path, tmp_path: Path) -> None:
    run = tiny_run(root / "cache")
    assert public(f"encoder:run:{root}/run#2:30") == "encoder:run:run#2:30"
    assert public(f"encoder:vae:{root}/vae/") == "encoder:vae:vae" and public("a/b/") == "b"
    term = dataclasses.replace(run.plan.align[0], target=f"encoder:run:{root}/run#2:30")
    model = load(root / "run")
    plan = dataclasses.replace(run.plan, align=(term,))
    model = dataclasses.replace(model, run=model.run.replace(plan=plan))
    out = export(model, tmp_path / "out", format="safetensors")
    assert str(root) not in (out / "erw.json").read_text()
    assert from_pretrained(out).run.plan.align[0].encoder == "run:run#2:30"
