"""`erw bench --peer`: a clone's step beside ours. The clones here have the names and signatures of
the released ones, around our own network, so both sides do the same work."""

import json
import sys
from pathlib import Path

import pytest
import torch

from erw.cli import main
from erw.config import Model, Run
from erw.data.cache import Batch
from erw.errors import ConfigError
from erw.plan import SIT
from erw.training.peers import build_peer, importing, weights_of

NETWORK = """
import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from erw.models import SiT as Ours

class {name}(Ours):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 num_classes, class_dropout_prob, z_dims=(), encoder_depth=0, **rest):
        super().__init__(input_size=input_size, channels=in_channels, patch=patch_size,
                         depth=depth, width=hidden_size, heads=num_heads, num_classes=num_classes)
        patches = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        assert patches.num_patches == self.tokens
        assert Attention(8, 2, True)(torch.ones(1, 3, 8)).shape == (1, 3, 8)
        self.projectors = torch.nn.ModuleList([torch.nn.Linear(hidden_size, dim) for dim in z_dims])
        self.block = encoder_depth

    def forward(self, x, t, y):
        if not self.projectors:
            return super().forward(x, t, y)
        out = super().forward(x, t, y, tap=(self.block,))
        return out.velocity, [head(out.hidden[self.block]) for head in self.projectors]
"""
EMA = """
import accelerate_that_is_not_there
def update_ema(ema, model, decay=0.9999):
    for p, q in zip(ema.parameters(), model.parameters()):
        p.data.lerp_(q.data, 1 - decay)
def sample_posterior(moments, latents_scale, latents_bias):
    mean, std = moments.chunk(2, 1)
    return (mean + std * torch.randn_like(mean)) * latents_scale + latents_bias
"""
LOSS = """
import torch
class SILoss:
    def __init__(self, **options): pass
    def __call__(self, model, x, kwargs, zs):
        t = torch.rand(len(x))
        noise, at = torch.randn_like(x), t[:, None, None, None]
        out, projected = model((1 - at) * x + at * noise, t, **kwargs)
        aligned = -torch.cosine_similarity(projected[0], zs[0], dim=-1).mean(1)
        return ((out - noise + x) ** 2).mean((1, 2, 3)), aligned
"""
TRANSPORT = """
import torch
class Flow:
    def training_losses(self, model, x, kwargs):
        return {"loss": (model(x, torch.rand(len(x)), **kwargs) - 1).square().mean((1, 2, 3))}
def create_transport(use_lognorm): return Flow()
"""


@pytest.fixture
def clones(tmp_path: Path) -> dict[str, Path]:
    files = {
        "repa/models/sit.py": NETWORK.format(name="SiT"), "repa/loss.py": LOSS,
        "repa/train.py": EMA, "lightningdit/models/lightningdit.py": NETWORK.format(
            name="LightningDiT"
        ), "lightningdit/transport/__init__.py": TRANSPORT, "lightningdit/train.py": EMA,
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {name: tmp_path / name for name in ("repa", "lightningdit")}


@pytest.mark.parametrize(("name", "kind"), [("repa", "repa"), ("lightningdit", "base")])
def test_a_peer_takes_turns_with_ours(
    clones: dict[str, Path],
    tmp_path: Path,
    name: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, out = {*sys.modules}, tmp_path / "speed.json"
    words = [f"sit_b2_in256_{kind}", "--tiny", "--repeat", "2", "--out", str(out)]
    assert main(["bench", *words, "--peer", f"{name}={clones[name]}"]) == 0
    peer = json.loads(out.read_text())["peers"][name]
    assert min(peer["seconds"] + peer["ours"] + peer["times"]) > 0
    median, least, most = peer["times"]
    assert least <= median <= most and "times as fast" in capsys.readouterr().out
    left = {one.partition(".")[0] for one in {*sys.modules} - before}
    assert not left & {"models", "loss", "transport", "timm", "fairscale"}


def test_a_step_of_a_peer_moves_its_weights_alone(clones: dict[str, Path]) -> None:
    model = Model(depth=2, width=32, heads=2, input_size=8, channels=4, num_classes=3)
    run, rows = Run(model=model, plan=SIT), torch.ones(2, 4, 8, 8)
    batch = Batch(rows.clone(), rows, torch.tensor([0, 2]), ())
    with importing(clones["lightningdit"]):
        peer = build_peer("lightningdit", clones["lightningdit"], run, batch, torch.float32)
        old = {k: v.clone() for k, v in weights_of(peer.model).items()}
        peer.step()
    new = weights_of(peer.model)
    assert any(not torch.equal(old[k], new[k]) for k in old)
    assert torch.equal(batch.mean, rows)


def test_what_is_no_peer_is_said(clones: dict[str, Path], tmp_path: Path) -> None:
    run, batch = Run(plan=SIT), Batch(*[torch.ones(1, 4, 8, 8)] * 2, torch.zeros(1).long(), ())
    for name, clone, said in (
        ("repo", clones["repa"], "no peer 'repo'; did you mean repa"),
        ("repa", tmp_path / "nowhere", "no folder"),
        ("repa", clones["repa"], "aligns one block"),
        ("lightningdit", clones["repa"], "No module named"),
    ):
        with pytest.raises(ConfigError, match=said), importing(clone):
            build_peer(name, clone, run, batch, torch.float32)
