"""Generation: an image follows from its seed alone."""

import re

import numpy as np
import pytest
import torch

from erw.config import Flow, Model, Run, Sample
from erw.errors import ConfigError
from erw.flow import velocity_from
from erw.sampling.generation import generate, ready, seed_noise
from erw.training.trained import Trained
from helpers.pixels import MODEL, trained
from helpers.reference import relative

DIT = trained(run=Run(flow=Flow(objective="ddpm"), sample=Sample(solver="ddpm")))
SDE = {"solver": "euler_maruyama", "steps": 4}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {"solver": "heun", "steps": 3}),
        (MODEL, SDE),
        (MODEL, {"solver": "dopri5", "rtol": 1e-5}),
        (DIT, {"solver": "ddpm", "steps": 4}),
        (DIT, {"solver": "ddim", "steps": 4, "guided_channels": 2}),
    ],
    ids=["heun", "sde", "dopri5", "ddpm", "ddim"],
)
def test_a_sample_does_not_depend_on_its_batch(model: Trained, options: dict) -> None:
    together = generate(model, range(7), guidance=2.0, **options).collect()
    apart = generate(model, range(7), guidance=2.0, batch_size=3, **options).collect()
    alone = generate(model, [5], guidance=2.0, **options).collect()
    if options["solver"] == "dopri5":  # each sample has its own steps, to the bit
        assert torch.equal(together.latents, apart.latents)
    assert relative(together.latents, apart.latents) < 1e-5
    assert relative(together.latents[5:6], alone.latents) < 1e-5
    assert together.seeds == tuple(range(7))
    assert together.images.dtype == torch.uint8 and together.images.shape == (7, 3, 8, 8)
    assert together.latents.dtype == torch.float32
    assert (together.latents[0] - together.latents[3]).abs().max() > 0.1  # same label, other seed


def test_the_same_call_gives_the_same_bits_and_the_seed_decides() -> None:
    first, second = (generate(MODEL, [11, 4], **SDE).collect() for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    turned = generate(MODEL, [4, 11], labels=[1, 2], **SDE).collect()
    assert torch.allclose(first.latents.flip(0), turned.latents, atol=1e-5)


def test_labels_are_balanced_or_as_given() -> None:
    def labels(given: object, seeds: range = range(5)) -> list[int]:
        return generate(MODEL, seeds, given, steps=1, decode=False).collect().labels.tolist()

    assert labels(None) == [0, 1, 2, 0, 1]
    assert labels(None, range(4, 9)) == [1, 2, 0, 1, 2]
    assert labels(2) == [2] * 5
    assert labels([2, 1, 0, 1, 2]) == labels(torch.tensor([2, 1, 0, 1, 2])) == [2, 1, 0, 1, 2]
    assert "balanced" in generate(MODEL, range(2)).settings["labels"]
    assert generate(MODEL, range(2), 1).settings["labels"] == "all 1"
    unconditional = generate(trained(0), range(2), steps=1, decode=False).collect()
    assert unconditional.labels is None and unconditional.images is None


def test_random_labels_follow_from_the_seed_and_are_stated() -> None:
    drawn = generate(MODEL, range(300), "random")
    assert drawn.settings["labels"].startswith("random")
    assert drawn.labels is not None and set(drawn.labels) == {0, 1, 2}
    assert generate(MODEL, [250, 7], "random").labels == (drawn.labels[250], drawn.labels[7])
    counts = np.bincount(drawn.labels)
    assert counts.min() > 70  # 100 each, give or take


def test_autoguidance_is_guidance_away_from_the_weaker_model() -> None:
    weak, options = trained(seed=1), {"steps": 3, "solver": "euler", "decode": False}
    generation = generate(
        MODEL, range(4), autoguidance=weak, guidance=2.5, interval=(0.5, 1.0), **options
    )
    settings = generation.settings
    assert settings["autoguidance_weights"] == generate(weak, [0]).settings["weights"]
    assert "autoguidance" not in generate(MODEL, [0], **options).settings
    x, y = seed_noise(range(4), (3, 8, 8), "start").double(), torch.tensor([0, 1, 2, 0])
    for t, t_next in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        v, w = (m.velocity(x.float(), torch.full((4,), t), y).double() for m in (MODEL, weak))
        x = x + (t_next - t) * (w + 2.5 * (v - w) if t >= 0.5 else v)
    assert torch.allclose(generation.collect().latents.double(), x, atol=1e-5)


def test_internal_guidance_comes_before_the_classes() -> None:
    """u = v_d + w (v - v_d) with the class and without it, then classifier-free guidance of u."""
    model = trained(run=Run(model=Model(internal=1)))
    options = {"steps": 3, "solver": "euler", "decode": False, "guidance": 1.5}
    within = {"internal": 1.4, "internal_interval": (0.3, 0.7)}
    generation = generate(model, range(4), **within, **options)
    assert generation.settings["internal"] == 1.4
    assert "internal" not in generate(model, [0], **options).settings
    x, y = seed_noise(range(4), (3, 8, 8), "start").double(), torch.tensor([0, 1, 2, 0])
    for t, t_next in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        tapped = [
            model.net(x.float(), torch.full((4,), t), labels, internal=True)
            for labels in (y, torch.full((4,), 3))
        ]
        w = 1.4 if 0.3 <= t <= 0.7 else 1.0
        given, null = (each.internal + w * (each.velocity - each.internal) for each in tapped)
        x = x + (t_next - t) * (null + 1.5 * (given - null)).double()
    assert torch.allclose(generation.collect().latents.double(), x, atol=1e-5)


@pytest.mark.parametrize("prediction", ["x", "noise"])
def test_outputs_mix_as_their_velocities_do(prediction: str) -> None:
    model = trained(run=Run(model=Model(internal=1), flow=Flow(prediction=prediction)))
    x, t, w = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([1.4, 2.0])
    tapped = model.net(x, t, internal=True)
    strong, weak = (
        velocity_from(prediction, out, x, t) for out in (tapped.velocity, tapped.internal)
    )
    expected = weak + w[:, None, None, None] * (strong - weak)
    torch.testing.assert_close(model.velocity(x, t, internal=w), expected)


def test_the_shift_of_times_changes_the_image_and_is_stated() -> None:
    plain, moved = (generate(MODEL, [0], steps=4, shift=s) for s in (1.0, 2.0))
    assert moved.settings["shift"] == 2.0 and "shift" not in plain.settings
    assert not torch.equal(plain.collect().latents, moved.collect().latents)


def test_weights_turned_to_bf16_once_give_the_bits_of_autocast() -> None:
    x, y, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 2]), torch.tensor([0.3, 0.7])
    before = {name: p.clone() for name, p in MODEL.net.named_parameters()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = MODEL.net(x, t, y)
        with ready(MODEL.net, bf16=True):
            assert MODEL.net.blocks[0].attn.qkv.weight.dtype is torch.bfloat16
            assert torch.equal(MODEL.net(x, t, y), expected)
    assert all(torch.equal(p, before[name]) for name, p in MODEL.net.named_parameters())


def test_guidance_changes_the_image_only_inside_its_interval() -> None:
    plain = generate(MODEL, range(2), steps=4).collect().latents
    guided = generate(MODEL, range(2), steps=4, guidance=3.0).collect().latents
    nowhere = generate(MODEL, range(2), steps=4, guidance=3.0, interval=(0.6, 0.7)).collect()
    assert (plain - guided).abs().max() > 1e-3
    assert torch.equal(plain, nowhere.latents)


def test_bf16_stays_close() -> None:
    single = generate(MODEL, range(4), steps=5).collect().latents
    half = generate(MODEL, range(4), steps=5, precision="bf16").collect().latents
    assert 0 < (single - half).norm() < 0.05 * single.norm()


def test_it_is_lazy() -> None:
    generation = generate(MODEL, range(6), steps=3, batch_size=2)
    assert len(generation) == 6 and next(iter(generation)).seeds == (0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": []}, "no seeds"),
        ({"labels": 3}, "label 3"),
        ({"labels": [0]}, "1 labels for 2 seeds"),
        ({"solver": "hein"}, "did you mean heun"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"interval": (0.5, 0.2)}, "interval"),
        ({"model": trained(0), "labels": 1}, "unconditional"),
        ({"model": trained(0), "guidance": 2.0}, "unconditional"),
        ({"labels": "balanced"}, "expected classes, 'random' or none"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": 2.0, "solver": "dopri5"}, "chooses its own times"),
        ({"guided_channels": 0, "guidance": 2.0}, "guided_channels is 0"),
        ({"autoguidance": MODEL}, "without effect"),
        ({"internal": 1.4}, "needs a model trained with --model.internal"),
        ({"autoguidance": trained(4), "guidance": 2.0}, "autoguidance by another kind"),
    ],
)
def test_bad_settings_say_so(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        generate(**{"model": MODEL, "seeds": range(2), **settings})
    assert "\n" not in str(error.value)
