"""A backbone of somebody's own is one class and one line: trained, counted, resumed and sampled."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erw import generate, load
from erw.models import BACKBONES, Tapped
from erw.training import Ledger
from erw.training.network import resolve
from helpers.tiny import tiny_run
from helpers.training import InterruptAfter, assert_same_run, go, last


class Mixer(nn.Module):
    """Token-mixing and channel-mixing MLPs over patches; time and class are added to the tokens."""

    class_token = representation = 0

    def __init__(self, side: int, channels: int, patch: int, depth: int, width: int, classes: int):
        super().__init__()
        self.latent_shape, self.null_class = (channels, side, side), classes
        self.depth, self.width, self.tokens = depth, width, (side // patch) ** 2
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.label, self.time = nn.Embedding(classes + 1, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(self.tokens, self.tokens), nn.Linear(width, width)])
            for _ in range(depth)
        )
        self.out = nn.ConvTranspose2d(width, channels, patch, patch)

    def warmup_modules(self, depth: int) -> list[nn.Module]:
        return [self.embed, self.label, self.time, *self.blocks[:depth]]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, tap: tuple[int, ...] = (),
        stop_at: int | None = None,
    ) -> Tensor | Tapped:  # fmt: skip
        y = torch.full((len(x),), self.null_class, device=x.device) if y is None else y
        patches = self.embed(x)
        h = patches.flatten(2).transpose(1, 2)
        h = h + (self.label(y) + self.time(t[:, None].to(h.dtype)))[:, None]
        hidden = {}
        for depth, (tokens, channels) in enumerate(self.blocks[:stop_at], start=1):
            h = h + tokens(h.transpose(1, 2)).transpose(1, 2)
            h = h + channels(h).relu()
            hidden[depth] = h
        if stop_at is not None:
            return Tapped(None, {k: hidden[k] for k in tap})
        v = self.out(h.transpose(1, 2).unflatten(2, patches.shape[2:]))
        return Tapped(v, {k: hidden[k] for k in tap}) if tap else v


@pytest.fixture
def mixer() -> Iterator[None]:
    def build(model: Any, outputs: int) -> Mixer:
        sizes = (model.input_size, model.channels, model.patch)
        return Mixer(*sizes, model.depth, model.width, model.num_classes)

    BACKBONES["mixer"] = build
    yield
    del BACKBONES["mixer"]


def test_it_trains_in_both_phases_resumes_and_draws(
    mixer: None, cache: Path, tmp_path: Path
) -> None:
    run = tiny_run(cache)
    run = run.replace(model=dataclasses.replace(run.model, net="mixer"))
    go(run, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(run, tmp_path / "stopped", progress=InterruptAfter(6))
    go(run, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    late = f"net.model.blocks.{run.plan.depth}.0.weight"
    assert last(tmp_path / "straight")[f"optim.{late.removeprefix('net.')}.step"] == 8  # 12 - 4
    drawn = generate(load(tmp_path / "straight"), range(3), steps=2, decode=False).collect()
    assert drawn.latents.shape == (3, 3, 16, 16)


def test_its_flops_are_counted(mixer: None, cache: Path) -> None:
    """By hand: a linear layer's forward and backward are 6 products of its sizes."""
    from erw.data.cache import Cache

    run = tiny_run(cache)
    run = run.replace(model=dataclasses.replace(run.model, net="mixer"))
    opened = Cache.open(run.data.cache)
    warm, full = Ledger.of(resolve(run, opened), opened).rates
    tokens, width, pixels = 4, run.model.width, 3 * 8 * 8
    block = 6 * (width * tokens * tokens + tokens * width * width)
    out = 6 * tokens * width * pixels
    more = run.model.depth - run.plan.depth
    assert full.trained - warm.trained == more * block + out
