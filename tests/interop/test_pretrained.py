"""Released checkpoints: golden values through files in the peers' layouts, and back out of them."""

import argparse
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch

from erw import flow
from erw.cli import main
from erw.errors import CheckpointError, ConfigError
from erw.interop import load_pretrained
from erw.interop.convert import convert
from erw.models import SiT
from erw.sampling import generate
from helpers.reference import Golden, array, relative, tensors
from helpers.released import LIGHTNING, SIZE, peer, same, save

# layout, options of the network, golden file, its output, the file's time from ours
FLOWS = {
    "repa": ("repa", {"projector": True}, "sit_forward", "v", False),
    "sit": ("sit", {"out_channels": 8}, "sit_official_forward", "out", True),
    "lightningdit": ("lightningdit", LIGHTNING, "lightningdit_forward", "out", True),
    "lightningdit, QK-norm": (
        "lightningdit",
        LIGHTNING | {"qk_norm": True},
        "lightningdit_qknorm_forward",
        "out",
        True,
    ),
    "lightningdit, RoPE only": ("lightningdit", {"rope": True}, "rope_only_forward", "out", True),
}
AMBIGUOUS = {"sit", "lightningdit, RoPE only"}


@pytest.mark.parametrize("name", FLOWS)
def test_flow_models_in_our_convention(golden: Golden, tmp_path: Path, name: str) -> None:
    """Time and sign are ours whatever the file's: v(x, t) = -out(x, 1 - t) where they are not."""
    layout, options, file, key, flipped = FLOWS[name]
    data, _ = tensors(golden(file))
    path = save(peer(**options), tmp_path / "last.pt")
    if name in AMBIGUOUS:
        with pytest.raises(
            CheckpointError, match=r"can be .* which differ in their times alone; say layout="
        ):
            load_pretrained(path, num_heads=4)
    model = load_pretrained(
        path, layout if name in AMBIGUOUS else "auto", num_heads=None if "rope" in options else 4
    )
    assert model.origin.startswith(f"{layout} (")
    t, sign = (1 - data["t"], -1) if flipped else (data["t"], 1)
    v = model.velocity(data["x"], t, data["y"])
    assert relative(v, sign * data[key]) < 2e-6  # float32 rounding; measured: 7e-7 or less
    tapped = model.net(data["x"], t, data["y"], tap=(2,))
    assert torch.equal(tapped.velocity, v)
    if layout == "repa":
        assert relative(model.projectors[0](tapped.hidden[2]), data["z_tilde"]) < 1e-5
    convert(path, tmp_path / "back.pt", to=layout, layout=layout, num_heads=4)
    same(torch.load(tmp_path / "back.pt"), torch.load(path))


def test_dit_through_its_file_and_diffusers(golden: Golden, tmp_path: Path) -> None:
    data, _ = tensors(golden("dit_forward"))
    state = peer(out_channels=8)
    path = save(state, tmp_path / "DiT.pt")
    model = load_pretrained(path, "dit", num_heads=4)
    assert relative(model.net(data["x"], data["t"], data["y"]), data["out"]) < 1e-5
    with pytest.raises(ConfigError, match="a DiT predicts noise and has no velocity"):
        model.velocity(data["x"], data["t"])

    theirs, back = tmp_path / "dit.safetensors", tmp_path / "back.pt"
    convert(path, theirs, to="diffusers-dit", layout="dit", num_heads=4)
    again = load_pretrained(theirs, num_heads=4, input_size=8)
    assert again.origin.startswith("diffusers-dit (transformer_blocks.*): 4 x 64, 4 heads")
    assert torch.equal(
        again.net(data["x"], data["t"], data["y"]), model.net(data["x"], data["t"], data["y"])
    )
    convert(theirs, back, to="dit", num_heads=4, input_size=8)
    same(torch.load(back), state)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_dit_generates_from_its_file(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    """The golden samples, seed by seed: the noise that belongs to seed k is the k-th of the file's,
    so any batch size draws them."""
    model = load_pretrained(save(peer(out_channels=8), tmp_path / "a.pt"), "dit", num_heads=4)
    data, _ = tensors(golden("dit_sample"))
    latents, y = data["latents"], data["y"].tolist()
    drawn = {("start",): latents}
    for i in range(10):
        drawn["step", i] = torch.from_numpy(array(f"ddpm{i}", *latents.shape))
    monkeypatch.setattr(
        "erw.sampling.generation.seed_noise",
        lambda seeds, shape, *tags, token: drawn[tags][list(seeds)],
    )
    how = {"steps": 10, "solver": solver, "decode": False}
    for batch_size in (64, 1):
        got = generate(model, range(len(y)), y, batch_size=batch_size, **how).collect().latents
        assert relative(got, data[solver]) < 1e-4
    settings = generate(model, range(2), **how, guidance=4.0, guided_channels=3).settings
    kept = {k: settings[k] for k in ("solver", "steps", "evaluations", "guided_channels")}
    assert list(kept.values()) == [solver, 10, 10, 3]
    with pytest.raises(ConfigError, match=r"solver heun cannot draw .* choose .'ddpm', 'ddim'"):
        generate(model, range(2), solver="heun", decode=False)
    assert generate(model, range(2), decode=False).sample.solver == "ddim"


def test_diffusers_itself_reads_what_we_write(tmp_path: Path) -> None:
    """Its model with our weights is our model, once its time frequencies are DiT's (over 128)."""
    from diffusers import DiTTransformer2DModel

    config = dict(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_eps=1e-6,
    )
    ours = save(peer(out_channels=8), tmp_path / "a.pt")
    theirs = DiTTransformer2DModel(**config).eval()
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    convert(ours, file, to="diffusers-dit", layout="dit", num_heads=4)
    theirs = DiTTransformer2DModel.from_pretrained(folder).eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([5, 1000])
    with torch.no_grad():
        want = theirs(x, timestep=t, class_labels=y).sample
    assert relative(load_pretrained(folder).net(x, t, y), want) < 1e-5


# -- what lies around the weights -----------------------------------------------------------------


def test_wrappers_prefixes_and_arguments(tmp_path: Path) -> None:
    """A training checkpoint: the average of the weights, its arguments read and not run."""
    state = peer(projector=True)
    other = {f"module.{k}": v + 1 for k, v in state.items()}
    args = argparse.Namespace(path_type="cosine", enc_type="dinov2", out=pathlib.Path("x"), lr=1e-4)
    wrapped = {"model": other, "ema": state, "opt": {"state": {}}, "args": args, "steps": 7}
    path = save(wrapped, tmp_path / "0400000.pt")
    model = load_pretrained(path, num_heads=4)
    assert "weights ema" in model.origin and "1 projector" in model.origin
    assert model.run.flow.path == "cosine"
    convert(path, tmp_path / "back.pt", to="repa", num_heads=4)
    same(torch.load(tmp_path / "back.pt")["ema"], state)
    again = load_pretrained(tmp_path / "back.pt", num_heads=4)
    assert again.run.flow.path == "cosine" and again.origin.startswith("repa")
    path = save({"model": other, "ema": state, "args": args}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="pos_embed is not the frozen table"):
        load_pretrained(path, num_heads=4, which="model")  # + 1 on positions too
    bare = load_pretrained(save(other | {}, tmp_path / "c.pt"), num_heads=4, input_size=16)
    assert bare.latent_shape == (4, 16, 16)


def test_arguments_tell_sit_from_dit(tmp_path: Path) -> None:
    state = peer(out_channels=8)
    for layout, args in {
        "sit": argparse.Namespace(path_type="Linear", prediction="velocity", model="SiT-XL/2"),
        "dit": argparse.Namespace(model="DiT-XL/2", image_size=256),
    }.items():
        path = save({"ema": state, "args": args}, tmp_path / f"{layout}.pt")
        model = load_pretrained(path, num_heads=4)
        assert model.origin.startswith(f"{layout} (")
        assert model.net.out_channels == (8 if layout == "dit" else 4)
    args = argparse.Namespace(path_type="Quadratic")
    with pytest.raises(CheckpointError, match="path_type is Quadratic; expected one of linear"):
        load_pretrained(save({"ema": state, "args": args}, tmp_path / "x.pt"), num_heads=4)


@pytest.mark.parametrize(("prediction", "path"), [("noise", "GVP"), ("score", "VP"), ("x", "VP")])
def test_sit_files_of_other_predictions(
    golden: Golden, tmp_path: Path, prediction: str, path: str
) -> None:
    """Stated by the user or by the file's arguments; kept when written, whatever the format."""
    state = peer(out_channels=8)
    file = save(state, tmp_path / "a.pt")
    model = load_pretrained(file, "sit", num_heads=4, prediction=prediction, path_type=path)
    ours = flow.PATHS["cosine" if path == "GVP" else "vp"]
    assert f"predicts the {prediction}, {ours.name} path" in model.origin
    data, _ = tensors(golden("sit_official_forward"))
    x, t, y = data["x"], 1 - data["t"], data["y"]  # the file's time runs the other way
    v = model.velocity(x, t, y)
    assert relative(v, flow.velocity_from(prediction, data["out"], x, t, path=ours)) < 1e-4
    args = argparse.Namespace(path_type=path, prediction=prediction)
    files = [save({"ema": state, "args": args}, tmp_path / "trained.pt")]
    for name in ("b.pt", "b.safetensors"):
        files.append(tmp_path / name)
        told = ["--prediction", prediction, "--path-type", path, "--num-heads", "4"]
        named = [str(file), str(files[-1]), "--to", "sit", "--layout", "sit"]
        assert main(["convert", *named, *told]) == 0
    for other in files:
        again = load_pretrained(other, num_heads=4)
        assert torch.equal(again.velocity(x, t, y), v)
    with pytest.raises(CheckpointError, match=f"is {prediction} in the file, as argument velocity"):
        load_pretrained(other, num_heads=4, prediction="velocity")
    with pytest.raises(ConfigError, match="is a DiT, which predicts noise on its chain"):
        load_pretrained(file, "dit", num_heads=4, prediction="noise")


def test_projectors_are_kept_or_dropped(tmp_path: Path) -> None:
    path = save(peer(projector=True), tmp_path / "a.pt")
    assert len(load_pretrained(path, num_heads=4).projectors) == 1
    assert len(load_pretrained(path, num_heads=4, projectors=False).projectors) == 0
    state = peer(projector=True)
    state["projectors.0.projection_layer.0.weight"] = state.pop("projectors.0.0.weight")
    path = save(state, tmp_path / "irepa.pt")
    with pytest.raises(CheckpointError, match=r"no three-layer projector .* projectors=False"):
        load_pretrained(path, num_heads=4)
    load_pretrained(path, num_heads=4, projectors=False)


def test_another_resolution(golden: Golden, tmp_path: Path) -> None:
    path = save(peer(**LIGHTNING), tmp_path / "a.safetensors")
    model = load_pretrained(path, input_size=16)
    assert model.velocity(torch.randn(1, 4, 16, 16), torch.rand(1)).shape == (1, 4, 16, 16)
    assert model.net.rope.shape == (2, 64, 16) and model.net.pos_embed.shape == (1, 64, 64)
    convert(path, tmp_path / "big.safetensors", to="lightningdit", input_size=16)
    back = load_pretrained(tmp_path / "big.safetensors")
    assert back.latent_shape == (4, 16, 16)


def test_a_warm_up_file_starts_a_full_model(tmp_path: Path) -> None:
    state = peer(projector=True)
    early = {k: v for k, v in state.items() if not k.startswith(("final_layer", "blocks.3"))}
    path = save({"ema": early, "model": early}, tmp_path / "0100000.pt")
    with pytest.raises(CheckpointError, match=r"of width 64 does not say it: give depth="):
        load_pretrained(path, "erw", num_heads=4)
    model = load_pretrained(path, num_heads=4, depth=6)
    assert "warm start: blocks 1 to 3 from the file, the rest is new" in model.origin
    full = load_pretrained(save(state, tmp_path / "full.pt"), num_heads=4)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    taps = [m.net(x, t, tap=(3,)).hidden[3] for m in (model, full)]
    assert torch.equal(*taps)
    assert model.missing == {k for k in dict(model.net.named_parameters()) if k not in early}
    assert model.velocity(x, t).abs().max() == 0  # the new final layer predicts nothing yet
    convert(path, tmp_path / "back.pt", to="erw", num_heads=4, depth=6)
    same(torch.load(tmp_path / "back.pt"), early)


def test_legacy_names_of_the_late_blocks(tmp_path: Path) -> None:
    state = peer(projector=True)
    old = {
        f"decoder_blocks.{int(k[7]) - 2}{k[8:]}" if k[:8] in ("blocks.2", "blocks.3") else k: v
        for k, v in state.items()
    }
    convert(save(old, tmp_path / "a.pt"), tmp_path / "b.pt", to="repa", num_heads=4)
    same(torch.load(tmp_path / "b.pt"), state)


def test_half_precision_files_keep_their_bits(tmp_path: Path) -> None:
    state = {k: v.half() if "blocks" in k else v for k, v in peer(projector=True).items()}
    path = save(state, tmp_path / "a.pt")
    model = load_pretrained(path, num_heads=4)
    assert all(p.dtype == torch.float32 for p in model.net.parameters())
    convert(path, tmp_path / "b.pt", to="repa", num_heads=4)
    same(torch.load(tmp_path / "b.pt"), state)


def test_a_loaded_model_generates(tmp_path: Path) -> None:
    model = load_pretrained(save(peer(out_channels=8), tmp_path / "a.pt"), "sit", num_heads=4)
    got = generate(model, [1, 2], [3, 4], steps=2, solver="euler", guidance=2.0, decode=False)
    assert got.collect().latents.isfinite().all()
    assert got.settings["recipe"] == "a"


def test_numpy_positions_are_ours() -> None:
    """The released tables were computed by NumPy: ours match them to the last bits."""
    grid, width = 16, 64
    omega = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    across, down = np.meshgrid(np.arange(grid, dtype=np.float32), np.arange(grid))
    halves = [np.outer(axis.reshape(-1), omega) for axis in (across, down)]
    table = np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], axis=1)
    net = SiT(**SIZE | {"input_size": 32})
    np.testing.assert_allclose(net.pos_embed[0].numpy(), table, atol=1e-6)


def test_a_label_table_without_a_row_for_no_class(tmp_path: Path) -> None:
    """All classes are there, none is taken for "no class", guidance is refused; the bits stay."""
    state, args = peer(num_classes=9), argparse.Namespace(num_classes=10, enc_type="dinov2-vit-b")
    path = save({"ema": state, "args": args}, tmp_path / "a.pt")
    model = load_pretrained(path, num_heads=4)
    assert model.num_classes == 10
    y = torch.tensor([9])
    table = model.net.y_embedder.embedding_table.weight
    assert torch.equal(table[y], state["y_embedder.embedding_table.weight"][y])
    assert generate(model, [0], 9, steps=2, decode=False).collect().latents.isfinite().all()
    with pytest.raises(ConfigError, match="without label dropout"):
        generate(model, [0], 9, guidance=2.0, decode=False)
    convert(path, tmp_path / "b.pt", to="repa", num_heads=4)
    same(torch.load(tmp_path / "b.pt", weights_only=True), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in peer(projector=True, rope=True).items()}
    model = load_pretrained(save(state, tmp_path / "a.pt"))
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, state[name].float()), name


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "_orig_mod.{}",
        "_orig_mod.module.{}",
        "module._orig_mod._fsdp_wrapped_module.{}",
    ],
)
def test_prefixes_of_wrappers_and_the_other_name_of_the_average(
    tmp_path: Path, wrapped: str
) -> None:
    state = peer(projector=True)
    deep = {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in state.items()}
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    both = {"model": other, "model_ema": {wrapped.format(k): v for k, v in deep.items()}}
    model = load_pretrained(save(both, tmp_path / "a.pt"), num_heads=4)
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, state[name]), name
