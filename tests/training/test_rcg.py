"""RCG: a small model of representations, images given them; and models without classes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from erw.cli import main
from erw.config import Model, Run
from erw.data.cache import Batch, Cache
from erw.errors import CheckpointError, ConfigError
from erw.interop import load_pretrained, starting_point
from erw.interop.convert import convert
from erw.models import SiT, build_model
from erw.models.rdm import Rdm
from erw.plan import SIT, Phase
from erw.recipes import recipe, tiny
from erw.rng import Draws, generator
from erw.sampling import generate
from erw.sampling.generation import representations
from erw.training import FlowMatching, load, network
from erw.training.flops import step_flops
from erw.training.network import Network
from erw.training.objective import total
from erw.training.trained import RDM, Trained, begin_with, fitting_rdm
from helpers.tiny import tiny_run
from helpers.training import InterruptAfter, go

FULL = Phase()


def rdm_run(cache: Path, **model: Any) -> Run:
    run = tiny(recipe("quickstart_rdm"))
    return run.replace(
        model=dataclasses.replace(run.model, **model),
        data=dataclasses.replace(run.data, cache=str(cache)),
        optim=dataclasses.replace(run.optim, precision="fp32"),
    )


def image_run(cache: Path, **model: Any) -> Run:
    run = tiny_run(cache, plan=SIT)
    return run.replace(model=dataclasses.replace(run.model, **model))


@pytest.fixture(scope="module")
def rcg(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run given representations, and the run that makes them beside it, made first."""
    out = tmp_path_factory.mktemp("rcg") / "run"
    go(rdm_run(cache), out / RDM)
    go(image_run(cache, class_token="given"), out)
    return out


# -- the representation diffusion model -----------------------------------------------------------


def test_it_learns_the_mean_and_covariance_of_gaussian_features() -> None:
    """Features N(m, S): samples of the trained model have that mean and covariance."""
    torch.manual_seed(0)
    dim, count = 4, 2048
    mix = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.5, 0, 0], [0, 0.3, 1.2, 0], [-0.5, 0, 0, 0.4]])
    mean = torch.tensor([0.5, -1.0, 0.0, 2.0])
    net = Rdm(dim=dim, depth=2, width=96)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
    step = GaussianFeatures(null_class=0, token="generated")
    average = [p.detach().clone() for p in net.parameters()]
    for i in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - i / 600))
        z = torch.randn(256, dim, generator=generator(1, i)) @ mix.T + mean
        empty = torch.zeros(256, 1)
        batch = Batch(empty, empty, torch.zeros(256, dtype=torch.long), (), z)
        losses = step(Network(net), batch, FULL, Draws(0, i, 0, 256))
        total(losses, FULL).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 0.02)
    for p, a in zip(net.parameters(), average, strict=True):
        p.data.copy_(a)
    model = Trained(net, Run(), "none")
    got = generate(model, range(count), steps=20, decode=False, batch_size=count).collect()
    assert (got.latents.mean(0) - mean).abs().max() < 0.1
    assert (got.latents.T.cov() - mix @ mix.T).abs().max() < 0.15


class GaussianFeatures(FlowMatching):
    """The step on features as they are: of four channels nothing would be left if standardised."""

    def clean(self, batch: Batch, draws: Draws) -> Tensor:
        assert batch.token is not None
        return batch.token


def test_its_cost_is_what_torch_counts() -> None:
    net = Rdm(dim=24, depth=3, width=48, num_classes=5)
    x, t, y = torch.randn(2, 24), torch.rand(2), torch.tensor([0, 5])
    with FlopCounterMode(display=False) as counter:
        net(x, t, y).sum().backward()
    model = Model(net="rdm", depth=3, width=48, num_classes=5, class_dim=24)
    run = Run(model=model, plan=SIT)
    assert step_flops(run, {}, FULL) == counter.get_total_flops() / 2
    assert not net(x, t).any()  # it starts at zero
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    assert torch.equal(net(x, t), net(x, t, torch.tensor([5, 5])))


def test_a_stop_changes_nothing_about_it(cache: Path, tmp_path: Path) -> None:
    run = rdm_run(cache)
    go(run, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(run, tmp_path / "stopped", progress=InterruptAfter(5))
    go(run, tmp_path / "stopped")
    one, two = (load(tmp_path / name) for name in ("straight", "stopped"))
    for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.num_classes == 9 and load(tmp_path / "straight").latent_shape == (1280,)


def test_what_it_cannot_do_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an rdm has no tokens to align"):
        rdm_run(cache).replace(plan=tiny_run(cache).plan)
    with pytest.raises(ConfigError, match="is for images; an rdm makes the token itself"):
        rdm_run(cache, class_token="given")
    go(rdm_run(cache).replace(steps=1), tmp_path / "rdm")
    with pytest.raises(ConfigError, match="an rdm makes representations and no images"):
        generate(load(tmp_path / "rdm"), [0])


# -- images given representations -----------------------------------------------------------------


def test_the_network_is_given_representations_or_none() -> None:
    net = SiT(input_size=4, channels=2, patch=2, depth=1, width=16, heads=2, representation=6)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    x, t, y = torch.randn(3, 2, 4, 4), torch.rand(3), torch.randn(3, 6)
    y[1] = 0
    out, none = net(x, t, y), net(x, t)
    assert torch.equal(out[1], none[1]) and not torch.allclose(out[0], none[0])
    learned = net.y_embedder.fake_latent.detach().expand(3, -1)
    torch.testing.assert_close(net(x, t, learned), none)  # none is a representation of its own


def test_the_step_standardises_and_drops_representations() -> None:
    token = 3 + 5 * torch.randn(64, 40)
    batch = Batch(torch.zeros(64, 1), torch.zeros(64, 1), torch.zeros(64).long(), (), token)
    step, draws = (
        FlowMatching(null_class=0, token="given", class_dropout=0.5),
        Draws(0, 0, 0, 64),
    )
    y = step.condition(batch, FULL, draws)
    dropped = draws.uniform("label") < 0.5
    assert 10 < dropped.sum() < 54 and not y[dropped].any()
    torch.testing.assert_close(
        y[~dropped].mean(1), torch.zeros(int((~dropped).sum())), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(y[~dropped].std(1, correction=0), torch.ones(int((~dropped).sum())))


def test_images_follow_from_their_seeds_through_representations(rcg: Path) -> None:
    model = load(rcg)
    assert model.rdm is not None and model.num_classes == 9 and len(model.class_names) == 9
    for net in (model.net, model.rdm.net):
        for i, p in enumerate(net.parameters()):
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    y = representations(model, [5, 6], torch.tensor([1, 2]))
    assert y.shape == (2, 1280)
    other = representations(model, [5, 6], torch.tensor([1, 3]))
    torch.testing.assert_close(other[0], y[0], atol=1e-5, rtol=1e-5)
    assert (other[1] - y[1]).abs().max() > 1e-4  # the class moves it
    how = {"steps": 3, "decode": False}
    together = generate(model, range(4), guidance=2.0, **how).collect().latents
    alone = generate(model, [2], guidance=2.0, **how).collect().latents
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=1e-4)
    plain = generate(model, range(4), **how)
    assert not torch.allclose(
        plain.collect().latents, together
    )  # guided away from no representation
    assert plain.settings["representations"]["step"] == 12


def test_without_a_model_of_representations_it_says_what_to_do(
    rcg: Path, cache: Path, tmp_path: Path
) -> None:
    alone = dataclasses.replace(load(rcg), rdm=None)
    assert alone.num_classes == 0
    with pytest.raises(ConfigError, match="train an rdm into the folder rdm of its run"):
        generate(alone, [0])
    with pytest.raises(CheckpointError, match=r"makes no representations, but .* is given"):
        fitting_rdm(alone, alone.run)
    with pytest.raises(CheckpointError, match="no released layout has them"):
        convert(rcg, tmp_path / "a.pt", to="repa")


def test_erw_sample_draws_both(rcg: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    args = ["sample", str(rcg), "--out", str(out), "--seeds", "0:3", "--steps", "2"]
    assert main([*args, "--labels", load(rcg).class_names[2]]) == 0
    assert len(list(out.glob("*.png"))) == 3
    assert "representations" in json.loads((out / "settings.json").read_text())
    assert main(["sample", str(rcg / RDM), "--out", str(tmp_path / "none")]) == 2


def test_a_given_run_starts_another(rcg: Path, cache: Path) -> None:
    start = load(rcg)
    held = Cache.open(cache)
    run = network.resolve(image_run(cache, class_token="given"), held)
    init = starting_point(start, run, held.class_names, 9)
    net = build_model(run.model)
    begin_with(net, init)
    assert torch.equal(net.y_embedder.fake_latent, start.net.y_embedder.fake_latent)


# -- no classes at all ----------------------------------------------------------------------------


def test_unconditional_all_the_way(cache: Path, tmp_path: Path) -> None:
    """Trained on labelled data without labels: samples, converts, comes back, takes classes."""
    run = image_run(cache, num_classes=0)
    go(run, tmp_path / "run")
    model = load(tmp_path / "run")
    assert model.num_classes == 0 and model.class_names == ()
    table = model.net.y_embedder.embedding_table.weight
    assert table.shape == (1, 32)
    drawn = generate(model, range(3), steps=2, decode=False).collect()
    assert drawn.labels is None and drawn.latents.isfinite().all()
    with pytest.raises(ConfigError, match="nothing to guide away from"):
        generate(model, [0], guidance=2.0)

    convert(tmp_path / "run", tmp_path / "a.pt", to="repa")
    again = load_pretrained(tmp_path / "a.pt", "repa", num_heads=2)
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    assert again.num_classes == 0 and torch.equal(again.velocity(x, t), model.velocity(x, t))

    held = Cache.open(cache)
    taught = network.resolve(image_run(cache), held)
    init = starting_point(model, taught, held.class_names, 9)
    assert torch.equal(init.net.y_embedder.embedding_table.weight, table.expand(10, -1))
    back = network.resolve(image_run(cache, num_classes=0), held)
    init = starting_point(model, back, (), 0)
    assert init.net.y_embedder.embedding_table.weight.shape == (1, 32)


def test_an_unconditional_run_is_evaluated_from_the_command_line(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(image_run(cache, num_classes=0), tmp_path / "run")
    args = ["eval", str(tmp_path / "run"), "--reference", "openmoji-test", "--seeds", "0:8"]
    args += ["--reference-count", "16", "--steps", "1", "--out", str(tmp_path / "scores")]
    assert main(args) == 0, capsys.readouterr()
