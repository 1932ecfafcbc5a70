"""Estimates agree with what torch counts and keeps, and the verb says by which model."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.checkpoint import checkpoint

from erw.cli import main
from erw.cli.cost import ACTIVATION_BYTES, INPUT_BYTES, TEACHER_FLOPS, VAE_FLOPS
from erw.data import images
from erw.encoders.base import counted_flops
from erw.models.sit import SiT
from helpers.tiny import tiny_cache


def network(depth: int = 2) -> SiT:
    return SiT(input_size=16, channels=4, patch=2, depth=depth, width=64, heads=1, num_classes=5)


def kept_bytes(net: SiT, *, images: int, half: bool, again: bool = False) -> int:
    """Bytes that a forward keeps for its backward, parameters left out; `again`: blocks are
    computed again."""
    for block in net.blocks if again else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    x, t, y = torch.randn(images, 4, 16, 16), torch.rand(images), torch.zeros(images).long()
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        net(x, t, y)
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("half", "precision", "size"), [(False, "fp32", 4), (True, "bf16", 2)])
def test_activations_are_those_that_a_step_keeps(half: bool, precision: str, size: int) -> None:
    images, tokens, width = 16, 64, 64
    two, four = (kept_bytes(network(depth), images=images, half=half) for depth in (2, 4))
    scores = images * tokens * tokens * size  # plain attention of a CPU, one head
    casts = 18 * width * width * 2 if half else 0  # the bf16 copies of a block's weights
    measured = ((four - two) / 2 - scores - casts) / (images * tokens * width)
    assert ACTIVATION_BYTES[precision] == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("half", [False, True])
def test_blocks_that_are_computed_again_keep_their_input(half: bool) -> None:
    two, four = (kept_bytes(network(n), images=16, half=half, again=True) for n in (2, 4))
    assert (four - two) / 2 == INPUT_BYTES * 16 * 64 * 64


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast images are decoded is not measured, which takes a second."""
    monkeypatch.setattr("erw.data.images.decoding_rate", lambda size: 100.0)


@pytest.mark.usefixtures("unmeasured")
def test_cost_without_a_cache_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "sit_xl2_in256_erw", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    for words in ("assumed", "dinov2-b", "674.8 M", "25.8 of 80 GiB a GPU, 32 images each in bf16"):
        assert words in said, words
    memory = []  # of 682.9 M parameters, projectors included, and 28 blocks
    for strategy in ("ddp", "fsdp2"):
        sharding = ["--dist.strategy", strategy]
        assert main(["cost", "sit_xl2_in256_erw", "--gpus", "8", *sharding]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  memory"))
        memory.append(float(line.split()[1]))
    saved = 682.9e6 * (22 - 20 / 8 - 2 * 8 / 28) / 2**30
    assert memory[0] - memory[1] == pytest.approx(saved, abs=0.11)
    assert main(["cost", "sit_b2_in256_base", "--gpu", "rtx4090", "--gpus", "1"]) == 0
    said = capsys.readouterr().out
    assert "does NOT fit" in said and "warm-up step" not in said
    assert main(["cost", "quickstart", "--gpu", "h1000"]) == 2
    assert "did you mean h100" in capsys.readouterr().err
    assert main(["cost", "quickstart", "--gpus", "0"]) == 2


def test_preparing_is_bound_by_the_slower_of_cores_and_accelerators(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,281,167 images at 100 a second a core, 316 GFLOP each on accelerators of 0.4 x peak."""
    monkeypatch.setattr("erw.data.images.decoding_rate", lambda size: {256: 100.0}[size])
    card, speed = ["cost", "sit_b2_in256_repa", "--gpu", "h100"], 0.4 * 9.89e14
    encoding = 1_281_167 * (VAE_FLOPS + TEACHER_FLOPS) / speed / 3600
    for gpus, cores, used, bound in ((8, 16, 16, "decoding"), (1, 64, 16, "the VAE")):
        assert main([*card, "--gpus", str(gpus), "--cores", str(cores)]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        hours = max(decoding := 1_281_167 / 100 / used / 3600, encoding / gpus)
        assert f"preparing   {hours:.2f} h in bfloat16, bound by {bound}: " in line
        assert f"decoding {decoding:.2f} h ({used} cores, 100 images/s each" in line
    assert main([*card, "--cores", "0"]) == 2
    assert "--cores is 0" in capsys.readouterr().err


def test_the_vae_of_stable_diffusion_costs_what_torch_counts() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        image = torch.zeros(1, 3, 256, 256)
    assert counted_flops(lambda: vae.encode(image)) == VAE_FLOPS


def test_decoding_is_measured_on_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[bytes] = []
    whole = images.decode
    monkeypatch.setattr(images, "decode", lambda data: (files.append(data), whole(data))[1])
    assert images.decoding_rate(256, seconds=0.0) > 0 and len(files) == 1
    assert whole(files[0]).shape == (375, 500, 3)
    assert files[0].startswith(b"\xff\xd8") and 100_000 < len(files[0]) < 120_000


@pytest.mark.parametrize(
    ("suffix", "teachers"), [("self", 1), ("vae_repa", 1), ("multi", 2), ("haste", 5), ("reg", 1)]
)
@pytest.mark.usefixtures("unmeasured")
def test_teachers_that_a_plan_names_are_assumed_too(
    suffix: str, teachers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["cost", f"sit_xl2_in256_{suffix}", "--model.depth", "16"]) == 0
    assert f", {teachers} teacher(s) as dinov2-b" in capsys.readouterr().out


def test_cost_with_a_cache_is_the_caches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tiny_cache(tmp_path / "cache", count=16).path
    assert main(["cost", "debug", "--data.cache", str(cache), "--model.patch", "8"]) == 0
    said = capsys.readouterr().out
    assert "preparing" not in said
    assert "by the cache" in said and "16 images, VAE none" in said and "warm-up step" in said


@pytest.mark.usefixtures("unmeasured")
def test_what_it_advises_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cost", "sit_xl2_in256_erw", "--gpus", "2", "--gpu", "rtx4090", "--price", "0.5"]
    assert main(words) == 0
    said = capsys.readouterr().out
    option, parts = re.findall(r"does NOT fit: (--optim.accumulate) (\d+)", said)[0]
    hours, money = re.findall(r"training +([\d.,]+) h.*, ([\d.,]+) at 0.5 a GPU", said)[0]
    assert float(money.replace(",", "")) == pytest.approx(float(hours.replace(",", "")), abs=0.01)
    assert main([*words, option, parts]) == 0 and ": fits, up to" in capsys.readouterr().out
    fewer = max(n for n in range(1, int(parts)) if 128 % n == 0)
    assert main([*words, option, str(fewer)]) == 0 and "NOT fit" in capsys.readouterr().out
