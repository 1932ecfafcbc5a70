"""Checkpoints that are refused, and `erw convert` from one layout to another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erw.cli import main
from erw.config import Flow, Model, Run, Sample, to_dict
from erw.errors import CheckpointError, ConfigError
from erw.interop import load_pretrained
from erw.interop.convert import convert
from erw.io import save_tensors
from erw.models import SiT
from erw.plan import PRESETS
from helpers.released import LIGHTNING, SIZE, peer, same, save


def test_wrong_keys_are_listed(tmp_path: Path) -> None:
    state = peer(projector=True)
    del state["blocks.1.attn.proj.bias"], state["t_embedder.mlp.2.weight"]
    state["blocks.0.extra"] = torch.zeros(2)
    state["blocks.2.mlp.fc1.weight"] = torch.zeros(3, 64)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(save(state, tmp_path / "a.pt"), num_heads=4)
    said = str(caught.value)
    assert "2 missing: blocks.1.attn.proj.bias, t_embedder.mlp.2.weight" in said
    assert "1 unexpected: blocks.0.extra" in said
    assert "1 of another shape: blocks.2.mlp.fc1.weight (3, 64) not (256, 64)" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({"cls_projectors2.weight": torch.zeros(64, 2)}), "missing: cls_"),
        (lambda s: s.pop("x_embedder.proj.weight"), "of no known layout"),
        (lambda s: s.pop("y_embedder.embedding_table.weight"), "y_embedder.embedding_table.weight"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 15, 64)), "not the frozen table"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 16, 64)), "not the frozen table"),
        (lambda s: s.pop("pos_embed"), "give input_size="),
    ],
)
def test_what_cannot_be_ours_is_refused(
    tmp_path: Path, change: Callable[..., Any], words: str
) -> None:
    state = peer(projector=True)
    change(state)
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(save(state, tmp_path / "a.pt"), num_heads=4)


def test_heads_are_known_shown_or_asked_for(tmp_path: Path) -> None:
    path = save(peer(projector=True), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="of width 64 does not say it: give num_heads="):
        load_pretrained(path)
    with pytest.raises(CheckpointError, match="width 64 is not a multiple of model"):
        load_pretrained(path, num_heads=5)
    with pytest.raises(CheckpointError, match="has 4 heads, not 8"):
        load_pretrained(save(peer(**LIGHTNING), tmp_path / "b.pt"), num_heads=8)
    with pytest.raises(ConfigError, match="layout is 'pixart'; expected auto, dit"):
        load_pretrained(path, "pixart")


def test_layouts_that_mean_another_thing_are_no_target(tmp_path: Path) -> None:
    path = save(peer(projector=True), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"counts time from data .* choose repa, erw"):
        convert(path, tmp_path / "b.pt", to="sit", num_heads=4)
    with pytest.raises(CheckpointError, match="end the name in"):
        convert(path, tmp_path / "b.zip", to="repa", num_heads=4)
    lightning = save(peer(**LIGHTNING), tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="sit has no rope = True"):
        convert(lightning, tmp_path / "b.pt", to="sit")
    assert not (tmp_path / "b.pt").exists()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "b.pt", to="dit")


def test_erw_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = peer(out_channels=8)
    source = str(save(state, tmp_path / "DiT.pt"))
    middle, back = str(tmp_path / "d.safetensors"), tmp_path / "back.pt"
    heads = ["--num-heads", "4"]
    assert main(["convert", source, middle, "--to", "diffusers-dit"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {source} can be dit or sit")
    assert main(["convert", source, middle, "--to", "diffusers-dit", "--layout", "dit"]) == 2
    assert "give num_heads=" in capsys.readouterr().err
    args = ["convert", source, middle, "--to", "diffusers-dit", "--layout", "dit", *heads]
    assert main(args) == 0
    assert "dit (as given): 4 x 64, 4 heads, patch 2, latents 4 x 8 x 8" in capsys.readouterr().out
    args = ["convert", middle, str(back), "--to", "dit", "--input-size", "8", *heads]
    assert main(args) == 0
    same(torch.load(back), state)
    assert main(["convert", source, middle, "--to", "pixart"]) == 2


@pytest.mark.parametrize("to", ["repa", "dit"])
def test_a_run_of_ours_becomes_theirs(tmp_path: Path, to: str) -> None:
    """Its file, read as REPA's or DiT's, gives what the run's network gives."""
    sizes = SIZE | {"num_classes": 3, "channels": 4}
    net = SiT(**sizes, out_channels=8 if to == "dit" else 4).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    run = Run(model=Model(**sizes), plan=PRESETS["sit"])
    if to == "dit":
        run = run.replace(flow=Flow(objective="ddpm"), sample=Sample(solver="ddpm"))
    recipe = {"run": to_dict(run), "resolved": to_dict(run)}
    recipe["cache"] = {"vae": "none", "class_names": ["a", "b", "c"]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    weights = dict(net.named_parameters())
    save_tensors(tmp_path / "ema.safetensors", weights, {"step": "5"})
    out = tmp_path / "theirs.safetensors"
    assert main(["convert", str(tmp_path), str(out), "--to", to]) == 0
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(load_pretrained(out, to, num_heads=4).net(x, t, y), net(x, t, y))
    with pytest.raises(CheckpointError, match="counts time"):
        convert(tmp_path, out, to="sit")

    if to == "repa":
        run = run.replace(flow=Flow(prediction="x"))
        (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"resolved": to_dict(run)}))
        with pytest.raises(CheckpointError, match="predicts the x; the released layouts"):
            convert(tmp_path, out, to="repa")
