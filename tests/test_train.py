"""Training: resume is no stop, two processes are one, the boundary carries weights, errors lose
nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erw import diffusion
from erw import plan as plans
from erw.config import Flow
from erw.data.cache import Cache
from erw.errors import CheckpointError, ConfigError, NumericsError
from erw.recipes import names, recipe, tiny
from erw.runtime.dist import World
from erw.runtime.log import Silent, read_metrics
from erw.sample import generate
from erw.train import build, load, train
from erw.train.checkpoint import paths
from erw.train.state import State
from erw.train.step import Losses
from tiny import as_dit, tiny_cache, tiny_run, with_loss

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("train") / "cache").path


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory):
    """A run without a stop."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(tiny_run(cache), out, reporter=Silent())
    return out


@pytest.fixture(scope="module")
def straight_dit(cache, tmp_path_factory):
    """The same with DiT's objective."""
    out = tmp_path_factory.mktemp("straight") / "dit"
    train(as_dit(tiny_run(cache)), out, reporter=Silent())
    return out


def go(run, out, **kwargs):
    return train(run, out, reporter=Silent(), **kwargs)


def program(cache, out, *args, ranks: int = 0) -> subprocess.CompletedProcess:
    script = [str(Path(__file__).parent / "tiny.py"), str(cache), str(out), *map(str, args)]
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *script], env=env, capture_output=True, text=True, timeout=300)


def last(out) -> dict[str, torch.Tensor]:
    return load_file(paths(out / "checkpoints")[-1])


def told(out) -> list[dict]:
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(one, other) -> None:
    a, b = last(one), last(other)
    assert a.keys() == b.keys()
    assert any(key.startswith("optim.") for key in a)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert load_file(one / "ema.safetensors").keys() == load_file(other / "ema.safetensors").keys()
    assert told(one) == told(other)


# -- resume
# -----------------------------------------------------------------------------------------


def test_killed_in_either_phase_and_in_a_checkpoint_it_ends_with_the_same_bits(
    cache, straight, tmp_path
):
    """Real SIGKILLs: in warm-up, in full training, and between writing a checkpoint and its
    renaming."""
    out = tmp_path / "run"
    for how in (["--die-after", 3], ["--die-in-checkpoint", 1], ["--die-after", 10]):
        assert program(cache, out, *how).returncode == -signal.SIGKILL
    done = program(cache, out)
    assert done.returncode == 0, done.stderr
    assert_same_run(straight, out)


def test_with_a_class_token_a_stop_changes_nothing(cache, tmp_path):
    run = with_loss(tiny_run(cache), "reg")
    go(run, tmp_path / "straight")

    class Impatient(Silent):
        def step(self, step, steps):
            if step == 7:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "stopped", reporter=Impatient())
    go(run, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("dit", [False, True], ids=["flow", "ddpm"])
@pytest.mark.parametrize("stop", [2, 4, 5, 9])  # within warm-up, at the boundary, after it
def test_ctrl_c_saves_and_the_same_command_goes_on(
    cache, straight, straight_dit, tmp_path, stop, dit
):
    run = as_dit(tiny_run(cache)) if dit else tiny_run(cache)

    class Impatient(Silent):
        def step(self, step, steps):
            if step == stop:
                signal.raise_signal(signal.SIGINT)

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop}"):
        train(run, out, reporter=Impatient())
    assert paths(out / "checkpoints")[-1].name == f"step-{stop:08d}.safetensors"
    go(run, out)
    assert_same_run(straight_dit if dit else straight, out)


def test_a_failed_evaluation_is_made_up_for(cache, straight, tmp_path):
    seen = []

    def fails(step, model):
        raise RuntimeError("the evaluator broke")

    with pytest.raises(RuntimeError, match="broke"):
        go(tiny_run(cache), tmp_path / "run", at={6}, evaluate=fails)
    go(tiny_run(cache), tmp_path / "run", at={6, 9}, evaluate=lambda s, m: seen.append((s, m.step)))
    assert seen == [(6, 6), (9, 9)]
    assert_same_run(straight, tmp_path / "run")


def test_metrics_have_every_line_once_in_order(straight):
    assert [line["step"] for line in told(straight)] == [4, 8, 12]
    assert [line["phase"] for line in told(straight)] == ["warmup", "full", "full"]


def test_no_metrics_line_spans_the_boundary(cache, tmp_path):
    run = tiny_run(cache, steps=8)
    go(run.replace(plan=dataclasses.replace(run.plan, warmup=3)), tmp_path / "run")
    lines = told(tmp_path / "run")
    assert [(line["step"], line["phase"]) for line in lines] == [
        (3, "warmup"),
        (4, "full"),
        (8, "full"),
    ]
    assert lines[0]["flow"] == 0.0 < lines[1]["flow"]


# -- many processes, micro-batches
# --------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cosine", "nt_xent"])
def test_micro_batches_are_the_batch(cache, tmp_path, loss):
    run = tiny_run(cache)
    run = run.replace(plan=dataclasses.replace(run.plan, loss=loss))
    split = run.replace(optim=dataclasses.replace(run.optim, accumulate=4))
    go(run, tmp_path / "one")
    go(split, tmp_path / "four")
    assert_close(last(tmp_path / "one"), last(tmp_path / "four"))


@pytest.mark.parametrize(
    ("dit", "loss"),
    [(True, "cosine"), (False, "nt_xent"), (False, "reg")],
    ids=["ddpm, cosine", "flow, nt_xent", "flow, class token"],
)
def test_two_processes_are_one_with_the_same_batch(cache, tmp_path, dit, loss):
    """Gloo ranks with half the batch each; NT-Xent's negatives are those of both."""
    one, two = tmp_path / "one", tmp_path / "two"
    run = as_dit(tiny_run(cache)) if dit else tiny_run(cache)
    go(with_loss(run, loss), one)
    done = program(cache, two, "--loss", loss, *["--dit"] * dit, ranks=2)
    assert done.returncode == 0, done.stderr
    assert_close(last(one), last(two))
    for a, b in zip(told(one), told(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def assert_close(a, b) -> None:
    """Adam divides by the square root of tiny numbers, so rounding shows; weights must still
    agree."""
    assert a.keys() == b.keys()
    for key in a:
        if key.startswith(("net.", "ema.")):
            assert torch.allclose(a[key], b[key], atol=2e-4), key


# -- phases
# -------------------------------------------------------------------------------------------


def state(run, tmp_path) -> State:
    cache = Cache.open(run.data.cache)
    resolved = build.resolve(run, cache)
    return State(resolved, cache, HERE, tmp_path, build.build_step(resolved))


def test_warm_up_trains_early_blocks_embedders_and_projector_alone(cache, tmp_path):
    run = tiny_run(cache)
    s = state(run, tmp_path)
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    for step in range(run.plan.warmup):
        s.enter(s.run.plan(step))
        s.step(step, s.run.plan(step), s.read(step))
    moved = {k for k, p in s.net.named_parameters() if not torch.equal(p, before[k])}
    still = {f"model.blocks.{i}." for i in range(run.plan.depth, run.model.depth)}
    assert not any(k.startswith((*still, "model.final_layer.")) for k in moved)
    assert any(k.startswith("model.blocks.0.attn") for k in moved)
    assert any(k.startswith("model.x_embedder") for k in moved)
    assert any(k.startswith("projectors.0") for k in moved)
    later = [p for k, p in s.net.named_parameters() if k.startswith(tuple(still))]
    assert all(p not in s.optimizer.state for p in later)


@pytest.mark.parametrize("projector", ["keep", "fresh"])
@pytest.mark.parametrize("optimizer", ["keep", "fresh"])
def test_the_boundary_carries_the_weights_exactly(cache, tmp_path, projector, optimizer):
    run = tiny_run(cache)
    plan = dataclasses.replace(run.plan, projector=projector, optimizer=optimizer)
    s = state(run.replace(plan=plan), tmp_path)
    for step in range(plan.warmup):
        s.enter(plan(step))
        s.step(step, plan(step), s.read(step))
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    moments = {k: s.optimizer.state[p]["exp_avg"].clone() for k, p in trained(s)}
    s.cross_the_boundary()
    for k, p in s.net.named_parameters():
        carried = projector == "keep" or not k.startswith("projectors.")
        random = k.endswith("weight") or not k.startswith("projectors.")  # biases start at 0 again
        assert torch.equal(p, before[k]) == carried or not random, k
        assert torch.equal(s.ema.tensors[k], p), k
    kept = {k for k, _ in trained(s)}
    wanted = set() if optimizer == "fresh" else set(moments)
    if projector == "fresh":
        wanted = {k for k in wanted if not k.startswith("projectors.")}
    assert kept == wanted
    for k, p in trained(s):
        assert torch.equal(s.optimizer.state[p]["exp_avg"], moments[k])


def trained(s: State):
    return [(k, p) for k, p in s.net.named_parameters() if p in s.optimizer.state]


@pytest.mark.parametrize("dit", [False, True], ids=["flow", "ddpm"])
@pytest.mark.parametrize("clean", ["clean", "noisy"])
def test_the_warm_up_gradient_reaches_every_sample(cache, tmp_path, clean, dit):
    run = as_dit(tiny_run(cache)) if dit else tiny_run(cache)
    run = run.replace(plan=dataclasses.replace(run.plan, warmup_input=clean))
    s = state(run, tmp_path)
    phase = run.plan(0)
    for step in range(2):  # adaLN-Zero: the gates must open first
        s.enter(phase)
        s.step(step, phase, s.read(step))
    batch, draws = s.read(2), s.draws(2)
    mean = batch.mean.requires_grad_()
    s.losses(batch._replace(mean=mean), phase, draws).total.backward()
    assert (mean.grad.flatten(1).norm(dim=1) > 0).all()


def test_no_teacher_is_read_once_its_weight_is_zero(cache, tmp_path):
    run = tiny_run(cache)
    plan = dataclasses.replace(run.plan, align=plans.stop_at(2.0, over=3))
    s = state(run.replace(plan=plan), tmp_path)
    aligned, alone = plan(plan.warmup + 2), plan(plan.warmup + 3)
    assert aligned.align_weight > 0
    assert len(s.read(6).features) == 1
    assert s.read(7).features == ()
    s.enter(alone)
    losses, _ = s.step(7, alone, s.read(7))
    assert losses.align == 0 and losses.flow > 0


@pytest.mark.parametrize("clean", ["clean", "noisy"])
def test_a_dit_is_told_its_step_and_shown_the_latent_there(cache, tmp_path, clean):
    """The step's loss is DiT's (golden in test_diffusion) at what the network was shown."""
    run = as_dit(tiny_run(cache))
    run = run.replace(plan=dataclasses.replace(run.plan, warmup_input=clean))
    s = state(run, tmp_path)
    batch, draws, chain, shown = s.read(4), s.draws(4), diffusion.chain(), []
    hook = s.model.register_forward_pre_hook(lambda _, args: shown.append(args))
    warm, full = (s.step_fn(s.net, batch, run.plan(step), draws) for step in (0, 4))
    hook.remove()
    (early, first, _), (x_s, step, y) = shown
    x = batch.mean + batch.std * draws.normal("latent", *batch.mean.shape[1:])
    eps = draws.normal("noise", *x.shape[1:])
    assert torch.equal(x_s, diffusion.noised(chain, x, eps, step)) and len(set(step.tolist())) > 4
    assert torch.equal(early, x if clean == "clean" else x_s)
    assert torch.equal(first, torch.zeros_like(step) if clean == "clean" else step)
    terms = diffusion.hybrid_terms(chain, s.model(x_s, step, y), x, eps, step)
    assert torch.equal(full.flow, terms.loss.mean()) and full.total > full.flow
    assert warm.flow == 0 and warm.align != 0


OBJECTIVES = {
    "score on vp": Flow(prediction="score", path="vp"),
    "velocity on vp": Flow(path="vp", times="logit_normal"),
    "noise on linear": Flow(prediction="noise"),
}


@pytest.mark.parametrize("name", ["DiT", *OBJECTIVES])
def test_every_objective_trains_and_draws(cache, tmp_path, name):
    run = tiny_run(cache)
    run = as_dit(run) if name == "DiT" else run.replace(flow=OBJECTIVES[name])
    go(run, tmp_path / "run")
    model, how = load(tmp_path / "run"), {"steps": 4, "decode": False, "guidance": 2.0}
    assert model.run.flow == run.flow
    for solver in ["ddpm", "ddim"] if name == "DiT" else ["heun", "euler_maruyama", "dopri5"]:
        drawn = generate(model, range(3), solver=solver, **how).collect()
        assert drawn.latents.isfinite().all() and len(drawn.evaluations) == 3


def test_sit_has_no_projector(cache, tmp_path):
    s = state(tiny_run(cache, plan=plans.SIT), tmp_path)
    assert len(s.net.projectors) == 0
    assert s.run.data.features == ()


def test_a_warm_up_batch_of_another_size_keeps_the_stream_without_gaps(cache):
    plan = plans.Plan(warmup=3, warmup_batch=16)
    assert [plan.images(i, 8) for i in range(6)] == [0, 16, 32, 48, 56, 64]


# -- what must not go wrong silently
# --------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_before_the_weights_move(cache, straight, tmp_path, value):
    def poisoned(net, batch, phase, draws):
        losses = build.build_step(build.resolve(tiny_run(cache), Cache.open(cache)))(
            net, batch, phase, draws
        )
        return Losses(losses.total * value, *losses[1:]) if draws.step == 9 else losses

    with pytest.raises(NumericsError, match=r"step 10; .*step-00000008.safetensors is good"):
        go(tiny_run(cache), tmp_path / "run", step_fn=poisoned)
    go(tiny_run(cache), tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_weights_stay_where_they_were_in_the_bad_step(cache, tmp_path):
    s = state(tiny_run(cache), tmp_path)
    s.enter(s.run.plan(0))
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    good = s.step_fn
    s.step_fn = lambda *args: Losses(*(x * float("nan") for x in good(*args)))
    with pytest.raises(NumericsError):
        s.step(0, s.run.plan(0), s.read(0))
    s.optimizer.step()  # what a GPU would still do until the next look
    assert all(torch.equal(p, before[k]) for k, p in s.net.named_parameters())


def test_another_run_in_the_folder_is_refused(cache, straight):
    other = tiny_run(cache, seed=1)
    with pytest.raises(
        CheckpointError, match=r"holds another run, which differs in seed 0 \(there\)"
    ):
        go(other, straight)


def test_other_files_in_the_folder_are_refused(cache, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="holds other files and no run"):
        go(tiny_run(cache), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def copy(straight, tmp_path) -> Path:
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


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(cache, straight, tmp_path, share):
    out = copy(straight, tmp_path)
    newest = paths(out / "checkpoints")[-1]
    data = newest.read_bytes()
    newest.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"truncated.*delete it to go on from step-00000008"):
        go(tiny_run(cache), out)


def damage_missing(tensors):
    del tensors["net.model.blocks.0.attn.qkv.weight"]


def damage_extra(tensors):
    tensors["net.model.blocks.9.attn.qkv.weight"] = torch.zeros(1)


def damage_shape(tensors):
    tensors["ema.model.t_embedder.mlp.0.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    "damage,words",
    [
        (damage_missing, "1 missing .net.model.blocks.0.attn.qkv.weight"),
        (damage_extra, "1 unexpected .net.model.blocks.9.attn.qkv.weight"),
        (damage_shape, "1 of another shape .ema.model.t_embedder.mlp.0.weight is .1,. not"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(cache, straight, tmp_path, damage, words):
    out = copy(straight, tmp_path)
    newest = paths(out / "checkpoints")[-1]
    tensors = load_file(newest)
    damage(tensors)
    save_file(
        tensors, newest, metadata={"progress": json.dumps({"step": 12, "seconds": 0, "sums": []})}
    )
    with pytest.raises(CheckpointError, match=words):
        go(tiny_run(cache), out)


def test_a_full_disk_keeps_the_earlier_checkpoint(cache, tmp_path, monkeypatch):
    from erw.train import checkpoint

    real = checkpoint.save_file

    def full(tensors, path, **kwargs):
        if "step-00000012" in str(path):
            real({k: v for k, v in list(tensors.items())[:3]}, path)
            raise OSError(28, "No space left on device")
        real(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"the disk is full; earlier checkpoints in .* untouched"
    ):
        go(tiny_run(cache), tmp_path / "run")
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000008.safetensors"]


def test_two_processes_do_not_write_one_folder(cache, tmp_path):
    def again(step, model):
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
def test_a_model_that_does_not_fit_the_cache_is_refused(cache, tmp_path, change, words):
    run = tiny_run(cache)
    run = run.replace(model=dataclasses.replace(run.model, **change))
    with pytest.raises(ValueError, match=words):
        go(run, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_run_can_be_made_longer_but_not_shorter(cache, straight, tmp_path):
    out = copy(straight, tmp_path)
    with pytest.raises(CheckpointError, match="12 steps behind it, more than the 8 asked for"):
        go(tiny_run(cache, steps=8), out)
    go(tiny_run(cache, steps=14), out)
    go(tiny_run(cache, steps=14), tmp_path / "at once")
    a, b = last(out), last(tmp_path / "at once")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_trained_model_is_loaded_with_its_average(straight):
    model = load(straight)
    ema = {k.removeprefix("ema.model."): v for k, v in last(straight).items() if "ema.model." in k}
    assert model.step == 12
    assert model.num_classes == 9
    for name, p in model.net.named_parameters():
        assert torch.equal(p, ema[name])
    v = model.velocity(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 2]))
    assert v.shape == (2, 3, 16, 16)


def test_loading_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        load(tmp_path)


@pytest.mark.parametrize("name", names())
def test_every_recipe_has_a_tiny_twin_that_trains(cache, tmp_path, name):
    """Every phase and option of it, on the small cache (whose tokens want patches of 8)."""
    run = tiny(recipe(name))
    run = run.replace(
        model=dataclasses.replace(run.model, patch=8),
        data=dataclasses.replace(run.data, cache=str(cache)),
    )
    go(run, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {line["phase"] for line in lines} == (
        {"warmup", "full"} if run.plan.warmup else {"full"}
    )
    assert load(tmp_path / "run").step == run.steps


def test_settings_that_cannot_meet():
    with pytest.raises(ConfigError, match=r"plan.depth 9 is deeper than the model's 4 blocks"):
        tiny_run("x", plan=plans.Plan(warmup=2, depth=9, align_depth=2))
