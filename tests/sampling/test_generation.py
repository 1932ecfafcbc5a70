"""Generation: an image follows from its seed alone, and interrupted runs go on."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from erw.config import Flow, Run, Sample
from erw.errors import ConfigError, DataError
from erw.sampling.generation import Generation, generate, ready, start_noise
from erw.sampling.save import read_images, read_settings, write
from erw.sampling.solvers import Step
from erw.training.trained import Trained
from helpers.pixels import MODEL, share, ten, trained
from helpers.reference import relative

DIT = trained(run=Run(flow=Flow(objective="ddpm"), sample=Sample(solver="ddpm")))
SDE = {"solver": "euler_maruyama", "steps": 4}


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (MODEL, {"solver": "heun", "steps": 3}),
        (MODEL, SDE),
        (MODEL, {"solver": "dopri5", "rtol": 1e-5}),
        (DIT, {"solver": "ddpm", "steps": 4}),
        (DIT, {"solver": "ddim", "steps": 4, "guided_channels": 2}),
    ],
    ids=["heun", "sde", "dopri5", "ddpm", "ddim"],
)
def test_a_sample_does_not_depend_on_its_batch(model: Trained, how: dict) -> None:
    together = generate(model, range(7), guidance=2.0, **how).collect()
    apart = generate(model, range(7), guidance=2.0, batch_size=3, **how).collect()
    alone = generate(model, [5], guidance=2.0, **how).collect()
    assert together.evaluations == apart.evaluations
    assert together.evaluations[5:6] == alone.evaluations
    if how["solver"] == "dopri5":  # each sample has its own steps, to the bit
        assert torch.equal(together.latents, apart.latents)
        assert len(set(together.evaluations)) > 1
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


def test_random_labels_follow_from_the_seed_and_are_said() -> None:
    drawn = generate(MODEL, range(300), "random")
    assert drawn.settings["labels"].startswith("random")
    assert drawn.labels is not None and set(drawn.labels) == {0, 1, 2}
    assert generate(MODEL, [250, 7], "random").labels == (drawn.labels[250], drawn.labels[7])
    counts = np.bincount(drawn.labels)
    assert counts.min() > 70  # 100 each, give or take


def test_autoguidance_is_guidance_away_from_the_weaker_model() -> None:
    weak, how = trained(seed=1), {"steps": 3, "solver": "euler", "decode": False}
    found = generate(MODEL, range(4), autoguidance=weak, guidance=2.5, interval=(0.5, 1.0), **how)
    settings = found.settings
    assert settings["autoguidance_weights"] == generate(weak, [0]).settings["weights"]
    assert "autoguidance" not in generate(MODEL, [0], **how).settings
    x, y = start_noise(range(4), (3, 8, 8)).double(), torch.tensor([0, 1, 2, 0])
    for t, t_next in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        v, w = (m.velocity(x.float(), torch.full((4,), t), y).double() for m in (MODEL, weak))
        x = x + (t_next - t) * (w + 2.5 * (v - w) if t >= 0.5 else v)
    assert torch.allclose(found.collect().latents.double(), x, atol=1e-5)


def test_the_shift_of_times_changes_the_image_and_is_said() -> None:
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


def test_bf16_stays_close_and_the_mode_is_given_back() -> None:
    MODEL.net.train()
    try:
        single = generate(MODEL, range(4), steps=5).collect().latents
        half = generate(MODEL, range(4), steps=5, precision="bf16").collect().latents
        assert MODEL.net.training
    finally:
        MODEL.net.eval()
    assert 0 < (single - half).norm() < 0.05 * single.norm()


def test_it_is_lazy_and_reports_steps() -> None:
    steps: list[Step] = []
    generation = generate(MODEL, range(6), steps=3, batch_size=2, callback=steps.append)
    assert len(generation) == 6 and not steps
    next(iter(generation))
    assert [step.number for step in steps] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": []}, "no seeds"),
        ({"labels": 3}, "label 3"),
        ({"labels": [0]}, "1 labels for 2 seeds"),
        ({"solver": "hein"}, "did you mean heun"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "fp8"}, "precision"),
        ({"interval": (0.5, 0.2)}, "interval"),
        ({"model": trained(0), "labels": 1}, "unconditional"),
        ({"model": trained(0), "guidance": 2.0}, "unconditional"),
        ({"labels": "balanced"}, "expected classes, 'random' or none"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"guided_channels": 0, "guidance": 2.0}, "guided_channels is 0"),
        ({"autoguidance": MODEL}, "without effect"),
        ({"autoguidance": trained(4), "guidance": 2.0}, "number of classes 4 differ"),
    ],
)
def test_bad_settings_say_so(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        generate(**{"model": MODEL, "seeds": range(2), **settings})
    assert "\n" not in str(error.value)


class Counting:
    """Counts the seeds that a generation really draws, and can fail after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> None:
        self.drawn: list[int] = []
        original = Generation._batch

        def batch(generation: Generation, rows: slice) -> object:
            if fail_after is not None and len(self.drawn) >= fail_after:
                raise KeyboardInterrupt
            self.drawn += generation.seeds[rows]
            return original(generation, rows)

        monkeypatch.setattr(Generation, "_batch", batch)


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_interrupted_generation_goes_on(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, expected = tmp_path / name, ten().collect().images
    with monkeypatch.context() as patch:
        Counting(patch, fail_after=4)
        with pytest.raises(KeyboardInterrupt):
            write(ten(), out)
    assert not (out.exists() and out.is_file())
    with monkeypatch.context() as patch:
        count, progress = Counting(patch), []
        write(ten(), out, progress=progress.append)
        assert count.drawn == list(range(4, 10))
        assert sum(progress) == 10
        write(ten(), out)  # whole: nothing is drawn
        assert len(count.drawn) == 6
        more = generate(MODEL, range(12), steps=2)
        if out.is_file():
            with pytest.raises(DataError, match="other seeds"):
                write(more, out)
        else:
            write(more, out)  # two more
            assert count.drawn[6:] == [10, 11]
    assert read_settings(out) == json.loads(json.dumps(ten().settings))
    if out.is_file():
        assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
        with np.load(out) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
            assert arrays["seeds"].tolist() == list(range(10))
            assert arrays["evaluations"].tolist() == [3] * 10
        assert labels.tolist() == [seed % 3 for seed in range(10)]
        assert np.array_equal(np.concatenate(list(read_images(out, rows=5))), images)
    else:
        from PIL import Image

        assert len(list(out.glob("*.png"))) == 12
        with Image.open(out / "00000007.png") as image:
            said = {"seed": "7", "label": "1", "evaluations": "3"}
            assert {name: image.info[name] for name in said} == said
        images = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])
    assert np.array_equal(images[:10], expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_images_of_other_settings_are_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    write(ten(), out)
    with pytest.raises(DataError, match="steps was 2, now 3"):
        write(generate(MODEL, range(10), steps=3), out)
    with pytest.raises(DataError, match="weights was"):
        write(generate(trained(seed=1), range(10), steps=2), out)


def test_other_labels_for_the_same_seeds_are_refused(tmp_path: Path) -> None:
    write(generate(MODEL, [0, 1], [2, 2], steps=1), tmp_path / "out")
    with pytest.raises(DataError, match="label 2, now it is 0"):
        write(generate(MODEL, [0, 1], [2, 0], steps=1), tmp_path / "out")


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given twice"):
        write(generate(MODEL, [1, 1]), tmp_path / "out")
    with pytest.raises(DataError, match="latents"):
        write(generate(MODEL, [1], decode=False), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").touch()
    with pytest.raises(DataError, match="choose an empty folder"):
        write(ten(), tmp_path / "mine")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="not written by erw"):
        write(ten(), tmp_path / "other.npz")


def test_two_ranks_share_the_seeds(tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    mp.spawn(share, args=(str(tmp_path / "store"), str(out)), nprocs=2)
    expected = ten().collect().images.permute(0, 2, 3, 1).numpy()
    with np.load(out) as arrays:
        assert arrays["seeds"].tolist() == list(range(10))
        # Another batch rounds otherwise, which can tip a pixel by one.
        assert np.abs(arrays["arr_0"].astype(int) - expected.astype(int)).max() <= 1


def test_damaged_npz_files_say_so(tmp_path: Path) -> None:
    write(ten(), tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    for name, message in (("cut", "damaged"), ("floats", "uint8"), ("none", "arr_0")):
        with pytest.raises(DataError, match=message):
            list(read_images(tmp_path / f"{name}.npz"))
