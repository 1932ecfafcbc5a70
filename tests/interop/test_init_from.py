"""Fine-tuning: released checkpoints and runs of ours as what a run begins with."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from erw.cli import main
from erw.config import Flow, Run
from erw.data.cache import Cache
from erw.dist import World
from erw.errors import CheckpointError, ConfigError
from erw.flow import velocity_from
from erw.interop import adopt, load_pretrained, open_model, starting_point
from erw.interop.export import export
from erw.interop.init_from import TABLE, label_rows
from erw.interop.safe_load import read_weights
from erw.io import load_tensors
from erw.models import SiT
from erw.training import load, network
from erw.training.checkpoint import paths
from erw.training.loop import Trainer
from erw.training.objective import build_objective
from erw.training.trained import begin_with
from helpers import parts
from helpers.reference import relative
from helpers.released import LIGHTNING, peer, save
from helpers.tiny import as_dit, tiny_cache, tiny_run
from helpers.training import go

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("finetune") / "cache", count=16).path


@pytest.fixture(scope="module")
def before(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, wider than the debug recipe."""
    run = tiny_run(cache)
    run = run.replace(
        steps=2,
        model=dataclasses.replace(run.model, width=48, heads=3, qk_norm=True),
        plan=dataclasses.replace(run.plan, warmup=1),
    )
    out = tmp_path_factory.mktemp("before") / "run"
    go(run, out)
    return out


@pytest.mark.parametrize(
    ("layout", "options", "prediction"),
    [
        ("sit", {"out_channels": 8}, "velocity"),
        ("sit", {"out_channels": 8}, "noise"),
        ("lightningdit", LIGHTNING, "velocity"),
    ],
)
def test_files_of_the_other_time_are_turned(
    tmp_path: Path, layout: str, options: dict[str, Any], prediction: str
) -> None:
    """The weights that training begins with, in a plain SiT, are the file's network in our time."""
    args = {"prediction": prediction}
    path = save({"ema": peer(**options), "args": args}, tmp_path / "a.pt")
    start = open_model(path, layout=layout, num_heads=4)
    run = adopt(tiny_run("none"), start)
    assert run.flow.prediction == prediction
    init = starting_point(start, run, (), 1000)
    net = SiT(input_size=8, num_classes=1000, **architecture(run))
    begin_with(net, init)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([3, 7, 1000])
    raw = SiT(
        input_size=8, num_classes=1000, **options, **architecture(run, without=options)
    ).eval()
    raw.load_state_dict(read_weights(path)[0], strict=False)
    raw.requires_grad_(False)
    out = raw(x, 1 - t, y)[:, :4]
    want = velocity_from(prediction, -out if prediction == "velocity" else out, x, t)
    assert relative(velocity_from(prediction, net(x, t, y), x, t), want) < 1e-5


def architecture(run: Run, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    taken = ("depth", "width", "heads", "patch", "rope", "qk_norm", "norm", "mlp")
    return {name: getattr(run.model, name) for name in taken if name not in without}


def test_labels_by_name_by_number_or_from_none() -> None:
    old = ("cat", "dog", "eel")
    assert label_rows(old, 3, ("eel", "fox", "cat"), 3)[0] == [2, 3, 0]
    assert label_rows(old, 3, ("dog",), 1)[0] == [1]  # cut
    rows, said = label_rows(old, 3, ("ant", *old), 4)  # extended
    assert rows == [3, 0, 1, 2] and said == "3 of 4 classes by name, the others from no class"
    assert label_rows((), 3, ("a", "b", "c"), 3)[0] == [0, 1, 2]
    assert label_rows((), 1000, ("a", "b"), 2)[0] == [1000, 1000]
    assert label_rows((), 0, ("a", "b"), 2)[0] == [0, 0]  # unconditional to conditional
    assert label_rows(old, 3, (), 0)[0] == []  # and back


def test_other_classes_and_another_resolution(tmp_path: Path) -> None:
    path = save(peer(projector=True), tmp_path / "a.pt")
    start = open_model(path, num_heads=4)
    run = adopt(tiny_run("none"), start)
    init = starting_point(start, run, ("a", "b"), 2)
    net = SiT(input_size=16, num_classes=2, **architecture(run))
    begin_with(net, init)
    table = start.net.get_parameter(TABLE)
    assert torch.equal(net.get_parameter(TABLE), table[[1000, 1000, 1000]])
    small = load_pretrained(path, num_heads=4, input_size=16)
    x, t = torch.randn(2, 4, 16, 16), torch.rand(2)
    assert torch.equal(net(x, t, torch.tensor([0, 1])), small.net(x, t))


def test_a_warm_up_file_leaves_the_rest_fresh(tmp_path: Path) -> None:
    state = {k: v for k, v in peer().items() if not k.startswith(("final_layer", "blocks.3"))}
    path = save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="give depth="):
        open_model(path, layout="erw", num_heads=4)
    start = open_model(path, layout="erw", num_heads=4, depth=6)
    run = adopt(tiny_run("none"), start)
    assert run.model.depth == 6
    init = starting_point(start, run, (), 1000)
    torch.manual_seed(1)
    net = SiT(input_size=8, num_classes=1000, **architecture(run))
    fresh = net.get_parameter("blocks.3.attn.qkv.weight").clone()
    begin_with(net, init)
    assert torch.equal(net.get_parameter("blocks.3.attn.qkv.weight"), fresh)
    assert torch.equal(
        net.get_parameter("blocks.2.attn.qkv.weight"), state["blocks.2.attn.qkv.weight"]
    )


def test_network_and_average_begin_with_the_run(cache: Path, before: Path, tmp_path: Path) -> None:
    opened, data = open_model(before), Cache.open(cache)
    assert opened.class_names == data.class_names
    run = network.resolve(adopt(tiny_run(cache), opened), data)
    assert run.model.width == 48 and run.model.qk_norm
    init = starting_point(opened, run, data.class_names, data.num_classes)
    assert f"{data.num_classes} of {data.num_classes} classes by name" in init.origin
    state = Trainer(run, data, HERE, tmp_path, {}, build_objective(run))
    state.begin_with(init)
    for name, want in load(before).net.named_parameters():
        assert torch.equal(state.model.get_parameter(name), want), name
        assert torch.equal(state.ema.tensors[f"model.{name}"], want), name


def test_erw_train_init(
    cache: Path, before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    args = ["train", "debug", "--out", str(out), "--data.cache", str(cache), "--model.patch", "8"]
    args += ["--steps", "2", "--plan.warmup", "1", "--optim.precision", "fp32"]
    init = ["--init", str(before)]
    assert main([*args, *init]) == 0
    assert "begins with" in capsys.readouterr().err
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["init"]["source"] == str(before) and recipe["resolved"]["model"]["width"] == 48
    assert main([*args, *init]) == 0  # nothing left to do
    capsys.readouterr()
    wide = ["--model.width", "48", "--model.heads", "3", "--model.qk-norm"]
    assert main([*args, *wide]) == 2
    said = capsys.readouterr().err
    assert f"what it begins with ({before}, now fresh weights)" in said
    assert (
        main([*args[:2], "--out", str(tmp_path / "b"), *args[4:], *init, "--model.depth", "3"]) == 2
    )
    assert "cannot start this run" in capsys.readouterr().err
    assert main([*args, "--init", str(tmp_path / "nowhere")]) == 2
    assert "there is nothing at" in capsys.readouterr().err


def started(cache: Path, init: str | Path, out: Path, *more: str) -> int:
    """The exit code of a short run from `init`."""
    args = ["train", "debug", "--out", str(out), "--data.cache", str(cache), "--init", str(init)]
    args += ["--steps", "2", "--plan.warmup", "1", "--optim.precision", "fp32"]
    return main([*args, *more])


def test_heads_are_taken_over_when_asked_for(
    cache: Path, before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the average, by encoder; a recorded run is not gone on with under the other name."""
    out, flag = tmp_path / "a", "--init-projectors"
    assert started(cache, before, out, flag, "--model.patch", "8", "--optim.lr", "1e-30") == 0
    assert "with its alignment heads for efficientnet-lite0" in capsys.readouterr().err
    heads = [
        {
            k: v
            for k, v in load_tensors(paths(run / "checkpoints")[-1])[0].items()
            if "ema.proj" in k
        }
        for run in (before, out)
    ]
    assert len(heads[0]) == 6
    for name, value in heads[0].items():
        assert torch.equal(heads[1][name], value), name
    assert started(cache, before, out, "--model.patch", "8", "--optim.lr", "1e-30") == 2
    assert "what it begins with" in capsys.readouterr().err

    assert started(cache, before, tmp_path / "b", flag, "--model.projector", "16") == 2
    said = capsys.readouterr().err
    assert "0.2.bias (32,) not (16,)" in said and "leave out --init-projectors" in said
    unaligned = ["--plan.warmup", "0", "--plan.align.0.weight.value", "0"]
    assert started(cache, before, tmp_path / "c", flag, *unaligned) == 2
    assert "the run aligns with nothing" in capsys.readouterr().err
    folder = export(before, tmp_path / "folder", format="safetensors")
    assert started(cache, folder, tmp_path / "d", flag) == 2
    assert "has alignment heads for 0 without names" in capsys.readouterr().err
    assert started(cache, folder, tmp_path / "d") == 0  # an exported folder starts a run too
    assert main(["train", "debug", "--out", str(out), "--data.cache", str(cache), flag]) == 2
    assert "--init-projectors takes heads over from --init" in capsys.readouterr().err


def test_heads_of_a_released_file(tmp_path: Path) -> None:
    state = peer(projector=True)
    model = load_pretrained(save(state, tmp_path / "a.pt"), num_heads=4)
    run = adopt(tiny_run("none"), model)
    run = run.replace(data=dataclasses.replace(run.data, features=("dinov2-b",)))
    heads = starting_point(model, run, (), 1000, projectors=True).projectors.state_dict()
    assert heads.keys() == {f"0.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")}
    assert torch.equal(heads["0.2.weight"], state["projectors.0.2.weight"])
    run = run.replace(data=dataclasses.replace(run.data, features=("dinov2-b", "clip-l")))
    with pytest.raises(CheckpointError, match="has alignment heads for 1 without names"):
        starting_point(model, run, (), 1000, projectors=True)


def test_from_a_label_table_without_a_row_for_no_class(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All nine classes begin as the file's, the last one too, and "no class" as zeros, which
    training with label dropout makes one; without, guidance is refused in what comes of it too."""
    state = peer(num_classes=8, channels=3, input_size=16, patch=8, depth=2, qk_norm=True)
    args = argparse.Namespace(num_classes=9, enc_type="dinov2-vit-b")
    path, table = save({"ema": state, "args": args}, tmp_path / "a.pt"), state[TABLE]
    start = open_model(path)
    begun = starting_point(start, adopt(tiny_run(cache), start), (), 9).net.get_parameter(TABLE)
    assert torch.equal(begun, torch.cat([table, torch.zeros(1, 64)]))
    still = ["--optim.lr", "1e-30", "--data.class-dropout", "0"]
    assert started(cache, path, tmp_path / "run", *still) == 0
    assert "no row for no class: trained without label dropout" in capsys.readouterr().err
    run = load(tmp_path / "run")
    assert run.num_classes == 9 and torch.equal(run.net.get_parameter(TABLE)[:9], table)
    for source in (path, tmp_path / "run"):
        draw = ["sample", str(source), "--out", str(tmp_path / "out"), "--steps", "1"]
        assert main([*draw, "--guidance", "2"]) == 2
        assert "trained without label dropout: it has nothing to guide" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main([*draw, "--seeds", "0:2", "--labels", "8"]) == 0


def test_to_no_classes_to_other_ones_and_to_another_size(
    cache: Path, before: Path, tmp_path: Path
) -> None:
    """From the command line, with warm-up and without: 9 classes to none, to two, to 32 pixels."""
    assert started(cache, before, tmp_path / "none", "--model.num-classes", "0") == 0
    bare = load(tmp_path / "none")
    assert bare.num_classes == 0 and bare.class_names == ()
    two = parts.make(parts.photos(tmp_path / "photos", each=2), tmp_path / "two", "none",
                     encoder=True).path  # fmt: skip
    no_warmup = ["--plan.warmup", "0", "--data.batch-size", "2"]
    assert started(two, tmp_path / "none", tmp_path / "three", *no_warmup) == 0
    found = load(tmp_path / "three")
    assert found.class_names == parts.CLASSES and found.latent_shape == (3, 32, 32)
    assert found.run.model.width == 48


def test_what_cannot_start_a_run(tmp_path: Path) -> None:
    path = save(peer(out_channels=8), tmp_path / "a.pt")
    start = open_model(path, layout="dit", num_heads=4)
    with pytest.raises(
        ConfigError, match=r"flow.objective is flow, .* has ddpm; leave it out, or choose"
    ):
        starting_point(start, adopt(tiny_run("none"), start), (), 1000)
    run = adopt(as_dit(tiny_run("none")), start)
    init = starting_point(start, run, (), 1000)
    net = SiT(input_size=8, num_classes=1000, out_channels=8, **architecture(run))
    begin_with(net, init)
    x, told = torch.randn(2, 4, 8, 8), torch.tensor([0, 700])
    assert torch.equal(net(x, told), start.net(x, told))
    start = open_model(path, layout="sit", num_heads=4)
    run = adopt(tiny_run("none"), start).replace(flow=Flow(prediction="x"))
    with pytest.raises(ConfigError, match=r"flow.prediction is x, .* has velocity"):
        starting_point(start, run, (), 1000)
    init = starting_point(start, adopt(run, start), (), 1000)
    net = SiT(input_size=8, channels=3, width=64, depth=4, heads=4)
    with pytest.raises(CheckpointError, match=r"x_embedder.proj.weight \(64, 4, 2, 2\) not"):
        begin_with(net, init)
