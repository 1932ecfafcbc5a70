"""Training goes wrong loudly and loses nothing; every recipe trains."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from erw import plan as plans
from erw.config import Log, Run
from erw.data.cache import Cache
from erw.data.prepare import prepare
from erw.errors import CheckpointError, ConfigError, NumericsError
from erw.interop import from_pretrained
from erw.interop.export import export
from erw.log import read_metrics
from erw.models.sit import Block
from erw.recipes import names, recipe, tiny
from erw.sampling import generate
from erw.sampling.preview import spread
from erw.training import load, loop, train
from erw.training.checkpoint import paths
from erw.training.network import resolve
from erw.training.objective import Objective, build_objective
from helpers.tiny import tiny_run, with_loss, with_methods
from helpers.training import InterruptAfter, assert_same_run, go, last, trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_before_the_weights_move(
    cache: Path, straight: Path, tmp_path: Path, value: float
) -> None:
    objective = poisoned(tiny_run(cache), 9, value)
    with pytest.raises(NumericsError, match=r"step 10; .*step-00000008.safetensors is good"):
        go(tiny_run(cache), tmp_path / "run", objective=objective)
    go(tiny_run(cache), tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("loss", ["cosine", "muon"])
def test_weights_stay_where_they_were_in_the_bad_step(
    cache: Path, tmp_path: Path, loss: str
) -> None:
    s = trainer(with_loss(tiny_run(cache), loss), tmp_path)
    s.enter(s.run.phase(0))
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    good = s.objective
    s.objective = lambda *args, **kw: {k: v * float("nan") for k, v in good(*args, **kw).items()}
    assert s.step(0, s.run.phase(0), s.read(0))["bad"] == 1
    s.optimizer.step()  # what a GPU would still do until the next look
    assert all(torch.equal(p, before[k]) for k, p in s.net.named_parameters())


def poisoned(run: Run, step: int, value: float) -> Objective:
    """The run's objective, its losses times `value` in one step."""
    learn = build_objective(resolve(run, Cache.open(run.data.cache)))

    def losses(net: Any, batch: Any, phase: Any, rng: Any, **options: Any) -> dict[str, Tensor]:
        found = learn(net, batch, phase, rng, **options)
        return {k: v * value for k, v in found.items()} if rng.step == step else found

    return losses


@pytest.mark.parametrize("bad,value,spike", [(2, float("nan"), 0.0), (9, 1e4, 3.0)])
def test_a_bad_step_is_skipped_and_nothing_else(
    cache: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int,
    value: float, spike: float,
) -> None:  # fmt: skip
    """Weights after it are those before it; a run that is stopped around it ends in the same bits;
    the means of the log leave it out."""
    monkeypatch.setattr(loop, "SPIKE_AFTER", 2)
    optim = dataclasses.replace(tiny_run(cache).optim, on_nan="skip", spike=spike)
    run = tiny_run(cache, optim=optim, log=Log(every=4, checkpoint=1, keep=20))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(run, whole, objective=poisoned(run, bad, value))
    before, after, later = (load_file(paths(whole / "checkpoints")[bad + i]) for i in (-1, 0, 1))
    nets = [k for k in before if k.startswith(("net.", "optim."))]
    assert all(torch.equal(before[k], after[k]) for k in nets)
    assert any(not torch.equal(after[k], later[k]) for k in nets)
    for stop in (bad, bad + 1):
        with pytest.raises(KeyboardInterrupt):
            objective = poisoned(run, bad, value)
            go(
                run,
                parts,
                objective=objective,
                progress=InterruptAfter(1 if parts.exists() else stop),
            )
    go(run, parts, objective=poisoned(run, bad, value))
    assert_same_run(whole, parts)
    losses = [line["loss"] for line in read_metrics(whole / "metrics.jsonl")]
    assert len(losses) == 3 and all(loss < 100 for loss in losses)


@pytest.mark.parametrize("bad", [6, 10], ids=["over the boundary", "in full training"])
def test_rewinding_goes_on_from_the_newest_checkpoint(
    cache: Path, tmp_path: Path, bad: int
) -> None:
    optim = dataclasses.replace(tiny_run(cache).optim, on_nan="rewind")
    log = Log(every=4, checkpoint=3 if bad == 6 else 8)
    run = tiny_run(cache, optim=optim, log=log)
    go(run, tmp_path / "run", objective=poisoned(run, bad, float("inf")))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [x for x in lines if x["kind"] == "rewind"] == [
        x for x in lines if (x["step"], x.get("bad")) == (bad + 1, bad + 1)
    ]
    with pytest.raises(KeyboardInterrupt):
        go(run, tmp_path / "parts", objective=poisoned(run, bad, float("inf")),
           progress=InterruptAfter(bad + 1))  # fmt: skip
    go(run, tmp_path / "parts", objective=poisoned(run, bad, float("inf")))
    assert_same_run(tmp_path / "run", tmp_path / "parts")


def test_rewinding_needs_a_checkpoint_and_helps_in_the_end(cache: Path, tmp_path: Path) -> None:
    optim = dataclasses.replace(tiny_run(cache).optim, on_nan="rewind")
    run = tiny_run(cache, optim=optim)
    with pytest.raises(NumericsError, match="there is no checkpoint before it"):
        go(run, tmp_path / "run", objective=poisoned(run, 2, float("nan")))


def test_another_run_in_the_folder_is_refused(cache: Path, straight: Path) -> None:
    other = tiny_run(cache, seed=1)
    with pytest.raises(
        CheckpointError, match=r"holds another run, which differs in seed \(0, now 1\)"
    ):
        go(other, straight)


def test_other_files_in_the_folder_are_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="holds other files and no run"):
        go(tiny_run(cache), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def copy(straight: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for path in [
        straight / "recipe.json",
        straight / "metrics.jsonl",
        straight / "ema.safetensors",
    ]:
        (out / path.name).write_bytes(path.read_bytes())
    for path in paths(straight / "checkpoints"):
        (out / "checkpoints" / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])  # all of it: with a bit flipped
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    cache: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    out = copy(straight, tmp_path)
    older, newest = paths(out / "checkpoints")[-2:]
    data = bytearray(newest.read_bytes())
    if share == 1.0:
        data[-5] ^= 1
    newest.write_bytes(data[: int(len(data) * share)])
    train(tiny_run(cache), out)
    said, what = capsys.readouterr().err, "not those that were" if share == 1.0 else "truncated"
    assert "warning: " in said and what in said and f"going on from {older}" in said
    assert_same_run(straight, out)
    for path in paths(out / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000012.safetensors is truncated"):
        go(tiny_run(cache), out)


def damage_missing(tensors: dict[str, Tensor]) -> None:
    del tensors["net.model.blocks.0.attn.qkv.weight"]


def damage_extra(tensors: dict[str, Tensor]) -> None:
    tensors["net.model.blocks.9.attn.qkv.weight"] = torch.zeros(1)


def damage_shape(tensors: dict[str, Tensor]) -> None:
    tensors["ema.model.t_embedder.mlp.0.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    "damage,words",
    [
        (damage_missing, "1 missing: net.model.blocks.0.attn.qkv.weight"),
        (damage_extra, "1 unexpected: net.model.blocks.9.attn.qkv.weight"),
        (damage_shape, "1 of another shape: ema.model.t_embedder.mlp.0.weight .1,. not"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    cache: Path, straight: Path, tmp_path: Path, damage: Callable[..., Any], words: str
) -> None:
    out = copy(straight, tmp_path)
    newest = paths(out / "checkpoints")[-1]
    tensors = load_file(newest)
    damage(tensors)
    progress = json.dumps({"step": 12, "seconds": 0, "sums": {}})
    save_file(tensors, newest, metadata={"progress": progress, "tensors": str(len(tensors))})
    with pytest.raises(CheckpointError, match=words):
        go(tiny_run(cache), out)


def test_a_full_disk_keeps_the_earlier_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = safetensors.torch.save_file

    def full(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        if "step-00000012" in str(path):
            real({k: v for k, v in list(tensors.items())[:3]}, path)
            raise OSError(28, "No space left on device")
        real(tensors, path, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*; earlier files are untouched"):
        go(tiny_run(cache), tmp_path / "run")
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000008.safetensors"]


@pytest.mark.parametrize("change", [lambda run: run, with_methods], ids=["plain", "methods"])
def test_blocks_computed_again_give_the_same_bits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Run], Run]
) -> None:
    run, calls, forward = change(tiny_run(cache)), list[str](), Block.forward

    def counted(block: Block, h: Tensor, *rest: Tensor) -> Tensor:
        calls.append(h.device.type)  # also meta, where FLOPs are counted
        return forward(block, h, *rest)

    monkeypatch.setattr(Block, "forward", counted)
    go(run, tmp_path / "once")
    once = calls.count("cpu")
    go(run.replace(optim=dataclasses.replace(run.optim, recompute=True)), tmp_path / "again")
    assert 1.5 * once < calls.count("cpu") - once <= 2 * once, "averages are not trained"
    assert_same_run(tmp_path / "once", tmp_path / "again")


def test_training_goes_on_while_a_checkpoint_is_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes the one of step 4 only after step 6, whose weights are others by then."""
    real, later = safetensors.torch.save_file, threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        assert later.wait(60)
        real(tensors, path, **kwargs)

    run = tiny_run(cache)
    run = run.replace(log=dataclasses.replace(run.log, checkpoint=4, keep=3))
    go(run, tmp_path / "straight")
    monkeypatch.setattr(safetensors.torch, "save_file", slow)
    go(run, tmp_path / "slow", at={6}, evaluate=lambda *state: later.set())
    saved = [paths(tmp_path / name / "checkpoints") for name in ("straight", "slow")]
    assert [path.name for path in saved[1]] == [f"step-{n:08d}.safetensors" for n in (4, 8, 12)]
    for one, other in zip(*saved, strict=True):
        a, b = load_file(one), load_file(other)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_do_not_write_one_folder(cache: Path, tmp_path: Path) -> None:
    def again(step: int, model: object, world: object) -> None:
        go(tiny_run(cache), tmp_path / "run")

    with pytest.raises(CheckpointError, match="another process is training in"):
        go(tiny_run(cache), tmp_path / "run", at={4}, evaluate=again)


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(patch=4), "2 x 2 = 4 tokens an image, the model has 16"),
        (dict(patch=5), "patches of 5 do not tile"),
        (dict(num_classes=3), "model.num_classes is 3, but the cache"),
    ],
)
def test_a_model_that_does_not_fit_the_cache_is_refused(
    cache: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    run = tiny_run(cache)
    run = run.replace(model=dataclasses.replace(run.model, **change))
    with pytest.raises(ValueError, match=words):
        go(run, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_run_can_be_made_longer_but_not_shorter(
    cache: Path, straight: Path, tmp_path: Path
) -> None:
    out = copy(straight, tmp_path)
    with pytest.raises(CheckpointError, match="at step 12 already, past the 8 requested"):
        go(tiny_run(cache, steps=8), out)
    go(tiny_run(cache, steps=14), out)
    go(tiny_run(cache, steps=14), tmp_path / "at once")
    a, b = last(out), last(tmp_path / "at once")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_trained_model_is_loaded_with_its_average(straight: Path) -> None:
    model = load(straight)
    ema = {k.removeprefix("ema.model."): v for k, v in last(straight).items() if "ema.model." in k}
    assert model.step == 12
    assert model.num_classes == 9
    for name, p in model.net.named_parameters():
        assert torch.equal(p, ema[name])
    v = model.velocity(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 2]))
    assert v.shape == (2, 3, 16, 16)


def test_loading_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder"):
        load(tmp_path)


@pytest.fixture(scope="module")
def twins() -> dict[Run, Path]:
    """What was trained already: recipes of several sizes have one twin."""
    return {}


@pytest.mark.parametrize("name", names())
def test_every_recipe_has_a_tiny_twin_that_trains(
    cache: Path, attended: Path, twins: dict[Run, Path], tmp_path: Path, name: str
) -> None:
    """Every phase and option of it, on the small cache (whose tokens want patches of 8), with its
    encoders in place of others that a plan names."""
    run = tiny(recipe(name)).replace(name="twin")
    attention = next(name for name in Cache.open(attended).features if "#attention" in name)
    terms = tuple(
        dataclasses.replace(term, target=f"encoder:{attention}", heads=2)
        if term.attends
        else dataclasses.replace(term, target="encoder")
        if term.encoder
        else term
        for term in run.plan.align
    )
    cache = attended if any(term.attends for term in terms) else cache
    run = run.replace(plan=dataclasses.replace(run.plan, align=terms))
    run = run.replace(
        model=dataclasses.replace(run.model, patch=8),
        data=dataclasses.replace(run.data, cache=str(cache)),
    )
    out = twins.setdefault(run, tmp_path / "run")
    go(run, out)
    lines = read_metrics(out / "metrics.jsonl")
    assert {line["phase"] for line in lines} == (
        {"warmup", "full"} if run.plan.warmup else {"full"}
    )
    assert load(out).step == run.steps


def test_settings_that_cannot_meet() -> None:
    with pytest.raises(ConfigError, match=r"plan.depth 9 is deeper than the model's 4 blocks"):
        tiny_run("x", plan=plans.Plan(warmup=2, depth=9, align=plans.repa(2).align))


def test_classes_without_images_are_drawn_only_when_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    table = {"labels": [[f"{i}.png", (1, 7)[i % 2]] for i in range(8)]}
    (tmp_path / "images" / "dataset.json").write_text(json.dumps(table))
    cache = prepare(
        tmp_path / "images", tmp_path / "cache", vae="none", encoders=["efficientnet-lite0"],
        image_size=16,
    )  # fmt: skip
    assert cache.num_classes == 8 and cache.class_counts() == (0, 4, 0, 0, 0, 0, 0, 4)
    model = load(go(tiny_run(cache.path, steps=5), tmp_path / "run").out)
    assert generate(model, range(4), decode=False, steps=1).labels == (1, 7, 1, 7)
    assert set(generate(model, range(20), "random", decode=False, steps=1).labels or ()) == {1, 7}
    assert generate(model, [0], 3, decode=False, steps=1).labels == (3,)
    assert spread(model.usual_classes, 3) == [1, 7, 1]  # previews
    folder = export(model, tmp_path / "export", vae="none")
    assert "pipe('1'," in (folder / "README.md").read_text()
    again = from_pretrained(folder)
    assert generate(again, range(3), decode=False, steps=1).labels == (1, 7, 1)
    (tmp_path / "run" / "recipe.json").write_text(
        (tmp_path / "run" / "recipe.json").read_text().replace('"empty_classes": [', '"x": [')
    )
    assert generate(load(tmp_path / "run"), [2], decode=False, steps=1).labels == (2,)  # an old run


@pytest.mark.parametrize(
    ("plan", "warned"),
    [
        (plans.repa(2), True),
        (plans.Plan(align=(plans.Align(block=2, weight=plans.stop_at(0.5, over=2)),)), False),
        (plans.SIT, False),
        (plans.Plan(warmup=5, depth=1, align=plans.repa(2).align), False),
    ],
)
def test_alignment_to_the_end_in_pixel_space_is_warned_of(
    cache: Path, tmp_path: Path, plan: plans.Plan, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tiny_run(cache, plan=plan, steps=5), tmp_path / "run", progress=None)
    lines = [x for x in capsys.readouterr().err.splitlines() if "arXiv 2603.14366" in x]
    assert len(lines) == warned
    assert all(
        "take a VAE" in line and "--plan.align.0.weight.kind stop_at" in line for line in lines
    )
