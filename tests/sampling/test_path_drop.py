"""Path-drop guidance of SPRINT: its formula, what it costs, and whom it is for."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from erw.config import Model, Run, Sample
from erw.errors import ConfigError
from erw.models import SiT
from erw.plan import Plan, Routing
from erw.routing import Route
from erw.sampling import generate
from erw.training import Trained
from helpers.pixels import trained

OPTIONS: dict[str, Any] = {"solver": "euler", "steps": 2, "decode": False}


def sprint(classes: int = 3, dropout: float = 0.1, **changes: Any) -> Trained:
    """A fused network of four blocks with all weights away from zero."""
    routing = Routing("sprint", (2, 3), 0.25, "grid", **{"path_drop": 0.1} | changes)
    sizes: dict[str, Any] = dict(input_size=8, patch=2, width=32, depth=4, heads=2)
    model = Model(**sizes, channels=4, num_classes=classes, fusion=(2, 3))
    run = Run(model=model, plan=Plan(align=(), routing=routing))
    run = run.replace(data=dataclasses.replace(run.data, class_dropout=dropout))
    torch.manual_seed(0)
    net = SiT(**sizes, num_classes=classes, fusion=(2, 3))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return Trained(net=net.eval().requires_grad_(False), run=run, vae="none")


@pytest.mark.parametrize("classes", [3, 0])
def test_it_leads_away_from_no_class_without_the_path(classes: int) -> None:
    """One Euler step by hand: x - v, v = v' + w (v(y) - v'), v' of the null class, dropped."""
    model = sprint(classes)
    one = OPTIONS | {"steps": 1}
    y = torch.tensor([1, 2]) if classes else None
    given = [1, 2] if classes else None
    start = generate(model, [4, 5], given, **one).collect()
    x = start.latents.double() + _velocity(model, [4, 5], y)  # the noise that it began with
    w = 2.5
    v = model.net(x.float(), torch.ones(2), y)
    null = torch.full((2,), classes)
    other = model.net(x.float(), torch.ones(2), null, route=Route(dropped=True))
    drawn = generate(model, [4, 5], given, guidance=w, guide="path", **one).collect()
    torch.testing.assert_close(drawn.latents, (x - (other + w * (v - other))).float())
    whole = model.net(x.float(), torch.ones(2), null)
    assert not torch.allclose(other, whole, atol=0.1)


def _velocity(model: Trained, seeds: list[int], y: torch.Tensor | None) -> torch.Tensor:
    from erw.sampling.generation import seed_noise

    x = seed_noise(seeds, (4, 8, 8), "start")
    return model.net(x, torch.ones(2), y).double()


def test_its_second_branch_costs_the_dense_blocks_alone() -> None:
    model = sprint()
    counts = []
    for options in ({}, {"guidance": 2.0}, {"guidance": 2.0, "guide": "path"}):
        with FlopCounterMode(display=False) as counter:
            generate(model, range(2), **OPTIONS | options).collect()
        counts.append(counter.get_total_flops())
    one, both, path = counts
    blocks = FlopCounterMode(display=False)
    with blocks, torch.no_grad():
        h, c = torch.zeros(2, 16, 32), torch.zeros(2, 1, 32)
        for block in model.net.blocks[1:3]:
            block(h, c, None)
    evaluations = 2
    assert both == 2 * one and both - path == evaluations * blocks.get_total_flops()


def test_outside_its_interval_and_at_scale_1_there_is_none() -> None:
    model = sprint()
    plain = generate(model, [1], **OPTIONS).collect().latents
    for options in ({"guidance": 3.0, "interval": (0.0, 0.2)}, {"guidance": 1.0}):
        drawn = generate(model, [1], guide="path", **options, **OPTIONS).collect().latents
        assert torch.equal(drawn, plain)


def test_the_settings_say_so_and_only_then() -> None:
    model = sprint()
    assert "guide" not in generate(model, [1], guidance=2.0).settings
    assert generate(model, [1], guidance=2.0, guide="path").settings["guide"] == "path"


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (trained(), {"guidance": 2.0}),
        (sprint(path_drop=0.0), {"guidance": 2.0}),
        (sprint(), {"guidance": 2.0, "autoguidance": sprint()}),
        (sprint(dropout=0.0), {"guidance": 2.0}),
    ],
    ids=["not fused", "never dropped", "autoguidance", "no class dropout"],
)
def test_others_are_refused_in_one_line(model: Trained, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"guide path needs|label dropout") as error:
        generate(model, [1], guide="path", **options)
    assert "\n" not in str(error.value)


def test_a_run_whose_samples_would_be_refused_does_not_begin() -> None:
    run = sprint().run
    assert run.replace(sample=Sample(guide="path", guidance=2.0)).sample.guide == "path"
    with pytest.raises(ConfigError, match=r"sample.guide path needs plan.routing.path_drop"):
        sprint(path_drop=0.0).run.replace(sample=Sample(guide="path", guidance=2.0))
