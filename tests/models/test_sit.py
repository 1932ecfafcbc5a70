"""SiT against values computed with the peers' released code, and identities of taps and stops."""

from typing import Any

import pytest
import torch

from erw.errors import ConfigError
from erw.models import SiT
from helpers.reference import Golden, fill, fill_official, relative, tensors

TINY = dict(input_size=8, patch=2, width=64, depth=4, heads=4, num_classes=1000)


def tiny(**options) -> SiT:
    model = SiT(**TINY, **options)
    fill(model)
    return model


def test_forward_of_repa(golden: Golden) -> None:
    data, _ = tensors(golden("sit_forward"))
    assert relative(tiny()(data["x"], data["t"], data["y"]), data["v"]) < 1e-5


def test_forward_of_official_sit(golden: Golden) -> None:
    """Official files predict sigma too (dropped here) and count time from noise (t is theirs
    here)."""
    data, _ = tensors(golden("sit_official_forward"))
    model = tiny()
    fill_official(model)
    assert relative(model(data["x"], data["t"], data["y"]), data["out"]) < 1e-5


def test_rope(golden: Golden) -> None:
    data, _ = tensors(golden("rope_only_forward"))
    assert relative(tiny(rope=True)(data["x"], data["t"], data["y"]), data["out"]) < 1e-5


LIGHTNING = {"rope": True, "norm": "rms", "mlp": "swiglu"}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_forward_of_lightningdit(golden: Golden, qk_norm: bool) -> None:
    name = "lightningdit_qknorm_forward" if qk_norm else "lightningdit_forward"
    data, _ = tensors(golden(name))
    model = tiny(**LIGHTNING, qk_norm=qk_norm)
    assert relative(model(data["x"], data["t"], data["y"]), data["out"]) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"rope": True}, {"qk_norm": True}, LIGHTNING | {"qk_norm": True}]
)
def test_a_stopped_forward_gives_the_hidden_tokens_of_the_full_one(options: dict[str, Any]) -> None:
    model = tiny(**options)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([3, 1000])
    full = model(x, t, y, tap=(1, 2, 4))
    assert torch.equal(full.velocity, model(x, t, y))
    assert full.hidden.keys() == {1, 2, 4}
    stopped = model(x, t, y, tap=(2,), stop_at=2)
    assert stopped.velocity is None
    assert torch.equal(stopped.hidden[2], full.hidden[2])


def test_blocks_after_the_stop_do_not_run() -> None:
    model = tiny()
    ran = []
    for depth, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, depth=depth: ran.append(depth))
    model(torch.randn(2, 4, 8, 8), torch.rand(2), tap=(3,), stop_at=3)
    assert ran == [1, 2, 3]


def test_no_label_is_the_null_class() -> None:
    model = tiny()
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([1000, 1000])))


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("channels,classes", [(3, 0), (16, 7)])
def test_any_patch_channels_and_classes(patch: int, channels: int, classes: int) -> None:
    model = SiT(
        input_size=8,
        channels=channels,
        patch=patch,
        width=32,
        depth=1,
        heads=2,
        num_classes=classes,
    )
    x = torch.randn(2, channels, 8, 8)
    out = model(x, torch.rand(2))
    assert out.shape == x.shape
    assert out.abs().max() == 0  # adaLN-Zero: a new model predicts nothing


def test_more_channels_out_than_in() -> None:
    model = tiny(out_channels=8)
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([0, 999]))
    assert out.shape == (2, 8, 8, 8)


def test_lightningdit_learns_in_low_precision() -> None:
    model = tiny(**LIGHTNING, qk_norm=True)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t)
    assert relative(out.float(), model(x, t).detach()) < 0.1
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_patches_must_tile_the_latent() -> None:
    with pytest.raises(ConfigError, match="patches of 3 do not tile a latent of 8 x 8"):
        SiT(input_size=8, patch=3, width=32, depth=1, heads=2)
