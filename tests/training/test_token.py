"""The teacher's class token: stored, denoised beside the latents (REG), loaded from REG's files."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erw import flow
from erw.align import Projector
from erw.config import Run
from erw.data.cache import Batch, Cache
from erw.data.loader import Loader
from erw.data.on_the_fly import write
from erw.data.prepare import add_encoders
from erw.encoders import load_encoder
from erw.errors import CacheError, CheckpointError, ConfigError, DataError
from erw.evaluation.probing import hidden_states, material
from erw.interop import load_pretrained
from erw.interop.convert import convert
from erw.interop.layouts import positions
from erw.models import SiT
from erw.plan import Phase, constant, repa
from erw.rng import Draws
from erw.sampling import generate
from erw.training import FlowMatching, Ledger, load, network
from erw.training.network import Network
from erw.training.objective import total
from helpers.parts import ENCODER, make, photos
from helpers.reference import relative, weight
from helpers.released import same, save
from helpers.tiny import tiny_run, with_term
from helpers.training import go

SIZE = dict(input_size=8, patch=2, width=64, depth=3, heads=4, num_classes=10)


def reg(**options) -> SiT:
    net = SiT(**SIZE | {"class_token": 24} | options)
    for name, p in net.named_parameters():
        p.data.copy_(weight(name, *p.shape))
    return net.eval()


# -- in the cache ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cache]:
    """Photos, and a cache of both variants with class tokens."""
    root = tmp_path_factory.mktemp("token")
    folder = photos(root / "set", each=3)
    cache = make(folder, root / "cache", "none", encoder=True, class_token=True, flip=True,
                 images=True, features="int8")  # fmt: skip
    return folder, cache


def test_the_cache_holds_what_the_encoder_gives(stored: tuple[Path, Cache]) -> None:
    _, cache = stored
    spec = cache.features[ENCODER]
    encoder = load_encoder(ENCODER)
    assert spec.class_dim == encoder.dim_class == 1280
    assert spec.flops == encoder.flops(32, both=True) > encoder.flops(32)
    flipped = np.array([False, True, False])
    batch = cache.read([4, 4, 8], features=[ENCODER], token=ENCODER, flipped=flipped)
    images = cache.images([4, 4, 8])
    images[1] = images[1].flip(-1)
    tokens, token = encoder.both(images)
    torch.testing.assert_close(batch.token, token, atol=5e-3, rtol=2e-3)  # float16 though int8
    torch.testing.assert_close(tokens, encoder(images))
    torch.testing.assert_close(token.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(token.std(1, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    part = batch.rows(slice(1, 2)).to("cpu")
    assert torch.equal(part.token, batch.token[1:2]) and len(part.features[0]) == 1
    assert cache.read([1]).token is None


def test_online_gives_the_same_tokens_in_one_pass(
    stored: tuple[Path, Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = stored
    told = {"vae": "none", "encoders": [ENCODER], "image_size": 32, "flip": True}
    online = write(folder, tmp_path / "online", **told, class_token=True, precision="float32")
    both = [Loader(c, seed=3, token=ENCODER).batch(range(5, 11)) for c in (cache, online)]
    torch.testing.assert_close(both[0].token, both[1].token, atol=5e-3, rtol=5e-3)
    rows = online.read([0, 1], features=[ENCODER], token=ENCODER)
    monkeypatch.setattr(type(load_encoder(ENCODER)), "forward", None)  # `both` alone runs
    assert torch.equal(rows.token, online.read([0, 1], features=[ENCODER], token=ENCODER).token)


def test_added_and_joined_class_tokens(stored: tuple[Path, Cache], tmp_path: Path) -> None:
    folder, _ = stored
    other = "efficientnet-lite2@64"
    grown = make(folder, tmp_path / "cache", "none", encoder=True, class_token=True)
    add_encoders(folder, grown.path, encoders=[other], class_token=True, progress=False)
    more = photos(tmp_path / "more", each=1)
    both = [load_encoder(name) for name in (ENCODER, other)]
    second = make(more, tmp_path / "second", "none", encoders=both, class_token=True)
    made = Cache.open([grown.path, second.path])
    assert {name: spec.class_dim for name, spec in made.features.items()} == {
        ENCODER: 1280,
        other: 1280,
    }
    assert torch.equal(made.read([3], token=ENCODER).token, grown.read([3], token=ENCODER).token)
    assert made.read([3, 10], token=other).token.shape == (2, 1280)
    run = token_run(grown.path)
    with pytest.raises(ConfigError, match=r"has class tokens of .* choose one"):
        network.resolve(run, made)


def test_what_has_no_class_token_is_refused(stored: tuple[Path, Cache], tmp_path: Path) -> None:
    folder, _ = stored
    plain = make(folder, tmp_path / "plain", "none", encoder=True)
    with pytest.raises(CacheError, match=r"no class token of .*--class-token"):
        plain.read([0], token=ENCODER)
    with pytest.raises(CacheError, match="no class token of"):
        network.resolve(token_run(plain.path), plain)
    with pytest.raises(ConfigError, match="no encoder has no class token"):
        make(folder, tmp_path / "none", "none", class_token=True)
    from erw.encoders.base import Encoder

    encoder = Encoder()
    encoder.name = "mine"
    with pytest.raises(DataError, match="encoder mine has no class token"):
        encoder.both(torch.zeros(1))


# -- the network ----------------------------------------------------------------------------------


def defined(
    state: dict[str, Tensor], x: Tensor, token: Tensor, t: Tensor, y: Tensor, *, heads: int = 4
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """REG's forward, from its definition: velocity of latents and token, tokens by block."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (
            h.var(-1, correction=0, keepdim=True) + 1e-6
        ).sqrt()

    def silu(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    patch = state["x_embedder.proj.weight"].shape[-1]
    width = state["x_embedder.proj.weight"].shape[0]
    b, c, side, _ = x.shape
    h = F.unfold(x, patch, stride=patch).transpose(1, 2)  # channel, row, column within a patch
    h = h @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"]
    first = norm(linear("cls_projectors2", token)) * state["wg_norm.weight"] + state["wg_norm.bias"]
    h = torch.cat([first[:, None], h], 1) + state["pos_embed"]
    k = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    frequencies = torch.cat([torch.cos(t[:, None] * k), torch.sin(t[:, None] * k)], 1)
    embedded = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", frequencies)))
    condition = silu(embedded + state["y_embedder.embedding_table.weight"][y])
    seen = []
    for i in range(sum(key.endswith("attn.qkv.bias") for key in state)):
        name = f"blocks.{i}."
        six = linear(name + "adaLN_modulation.1", condition)[:, None].split(width, -1)
        a = norm(h) * (1 + six[1]) + six[0]
        q, k_, v = linear(name + "attn.qkv", a).unflatten(-1, (3, heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k_) / q.shape[-1] ** 0.5
        a = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        h = h + six[2] * linear(name + "attn.proj", a)
        a = norm(h) * (1 + six[4]) + six[3]
        a = F.gelu(linear(name + "mlp.fc1", a), approximate="tanh")
        h = h + six[5] * linear(name + "mlp.fc2", a)
        seen.append(h)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition)[:, None].split(width, -1)
    h = norm(h) * (1 + scale) + shift
    patches = linear("final_layer.linear", h[:, 1:]).unflatten(-1, (patch, patch, c))
    grid = side // patch
    image = torch.einsum("bhwpqc->bchpwq", patches.unflatten(1, (grid, grid)))
    return image.reshape(b, c, side, side), linear("final_layer.linear_cls", h[:, 0]), seen


def inputs(n: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, token = torch.randn(n, 4, 8, 8, generator=rng), torch.randn(n, 24, generator=rng)
    return x, token, torch.tensor([0.0, 0.4, 1.0])[:n], torch.tensor([0, 7, 10])[:n]


def released(*, depth: int = 3) -> dict[str, Tensor]:
    """A state dict in REG's layout with golden weights."""
    net = reg(depth=depth)
    state = positions(net) | {k: p.detach().clone() for k, p in net.named_parameters()}
    for layer, shape in {"0": (48, 64), "2": (48, 48), "4": (24, 48)}.items():
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            state[f"projectors.0.{layer}.{kind}"] = weight(f"projectors.0.{layer}.{kind}", *size)
    return state


def test_regs_files_are_loaded_and_written_back(tmp_path: Path) -> None:
    state = released()
    assert state["pos_embed"].shape == (1, 17, 64) and not state["pos_embed"][0, 0].any()
    path = save({"ema": state, "model": state, "steps": 3}, tmp_path / "4000000.pt")
    model = load_pretrained(path, num_heads=4)
    assert model.origin.startswith("reg (") and "class_dim 24" in model.origin
    x, token, t, y = inputs()
    want, want_token, seen = defined(state, x, token, t, y)
    tapped = model.net(model.net.join(x, token), t, y, tap=(2,))
    velocity, velocity_token = model.net.split(tapped.velocity)
    assert relative(velocity, want) < 1e-5 and relative(velocity_token, want_token) < 1e-5
    assert relative(tapped.hidden[2], seen[1]) < 1e-5 and len(model.projectors) == 1
    convert(path, tmp_path / "back.pt", to="reg", num_heads=4)
    same(torch.load(tmp_path / "back.pt"), state)
    convert(path, tmp_path / "again.safetensors", to="reg", num_heads=4)
    again = load_pretrained(tmp_path / "again.safetensors", num_heads=4)
    assert torch.equal(again.velocity(model.net.join(x, token), t, y), tapped.velocity)
    with pytest.raises(CheckpointError, match="repa has no class_token = denoised"):
        convert(path, tmp_path / "no.pt", to="repa", num_heads=4)
    drawn = generate(model, [1, 2], [3, 4], steps=2, guidance=2.0, decode=False).collect()
    assert drawn.latents.shape == (2, 4, 8, 8) and drawn.latents.isfinite().all()


def test_another_resolution_of_regs_files(tmp_path: Path) -> None:
    path = save(released(), tmp_path / "a.pt")
    model = load_pretrained(path, "reg", num_heads=4, input_size=16)
    assert model.latent_shape == (4, 16, 16)
    assert model.velocity(torch.randn(1, 4 * 256 + 24), torch.rand(1)).shape == (1, 4 * 256 + 24)


def test_xl_has_the_parameters_of_regs_file() -> None:
    """685,017,360, the projector and the frozen positions included."""
    with torch.device("meta"):
        net = SiT(depth=28, width=1152, heads=16, class_token=768)
        head = Projector(1152, 2048, 768)
    parameters = sum(p.numel() for module in (net, head) for p in module.parameters())
    assert parameters + (1 + net.grid**2) * net.width == 685_017_360


@pytest.mark.parametrize("options", [{}, {"rope": True, "norm": "rms", "qk_norm": True}])
def test_stops_and_taps_with_a_class_token(options: dict[str, Any]) -> None:
    net = reg(**options)
    x, token, t, y = inputs()
    state = net.join(x, token)
    full = net(state, t, y, tap=(1, 2))
    assert full.hidden[1].shape == (3, 17, 64)
    assert torch.equal(net(state, t, y, tap=(1,), stop_at=1).hidden[1], full.hidden[1])
    fresh = SiT(**SIZE, class_token=24, **options)
    assert not fresh(state, t, y).any()  # both heads start at zero


# -- the step -------------------------------------------------------------------------------------


def test_the_step_noises_both_alike_and_weighs_their_losses() -> None:
    torch.manual_seed(0)
    plan = repa(2, 0.5)
    net = Network(reg(), terms=plan.align, dims={"align": (24,)}, hidden=32)
    batch = Batch(torch.randn(4, 4, 8, 8), torch.rand(4, 4, 8, 8), torch.tensor([1, 2, 3, 4]),
                  (torch.randn(4, 16, 24),), torch.randn(4, 24))  # fmt: skip
    draws = Draws(0, 5, 0, 4)
    phase = Phase(weights={"flow": 1.0, "token": 0.03, "align": 0.5}, terms=plan.align)
    learn = FlowMatching(null_class=10, features=("encoder",), token="denoised")
    losses = learn(net, batch, phase, draws)

    x = batch.mean + batch.std * draws.normal("latent", 4, 8, 8)
    eps, t = draws.normal("noise", 4 * 64 + 24), draws.uniform("time")
    eps_x, eps_token = eps[:, :256].reshape(4, 4, 8, 8), eps[:, 256:]
    x_t, token_t = (flow.noise(a, e, t).x_t for a, e in ((x, eps_x), (batch.token, eps_token)))
    y = torch.where(draws.uniform("label") < 0.1, 10, batch.labels)
    state = {k: p.detach() for k, p in net.model.named_parameters()} | positions(net.model)
    v, v_token, seen = defined(state, x_t, token_t, t, y)
    of_latents = (v - (eps_x - x)).pow(2).mean()
    of_token = (v_token - (eps_token - batch.token)).pow(2).mean()
    wanted = torch.cat([batch.token[:, None], batch.features[0]], 1)  # REG aligns all T + 1
    align = -F.cosine_similarity(net.projectors[0](seen[1]), wanted, dim=-1).mean()
    torch.testing.assert_close(losses["flow"], of_latents)
    torch.testing.assert_close(losses["token"], of_token)
    torch.testing.assert_close(losses["align"], align)
    weighted = of_latents + 0.03 * of_token + 0.5 * align
    torch.testing.assert_close(total(losses, phase), weighted)


# -- runs -----------------------------------------------------------------------------------------


def token_run(cache: Path, kind: str = "denoised", **changes: Any) -> Run:
    run = tiny_run(cache)
    return run.replace(model=dataclasses.replace(run.model, class_token=kind), **changes)


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the debug recipe, warm-up and alignment included, with a class token."""
    out = tmp_path_factory.mktemp("reg") / "run"
    go(token_run(cache), out)
    return out


def test_the_teacher_is_paid_for_in_every_step(cache: Path) -> None:
    held = Cache.open(cache)
    run = with_term(token_run(cache), weight=constant(0.0))
    resolved = network.resolve(run, held)
    assert resolved.data.class_token == "efficientnet-lite0" and resolved.model.class_dim == 1280
    ledger, spec = Ledger.of(resolved, held), held.features["efficientnet-lite0"]
    assert all(rate.taught for rate in ledger.rates)
    assert ledger.spent(run.steps).teacher == len(held) * spec.flops > 0
    named = run.replace(data=dataclasses.replace(run.data, class_token="dinov2-b"))
    with pytest.raises(CacheError, match="no class token of dinov2-b"):
        network.resolve(named, held)


def test_samples_follow_from_their_seeds(trained: Path) -> None:
    model = load(trained)
    torch.manual_seed(0)
    for p in model.net.parameters():
        p.data.normal_(0, 0.1)
    for solver in ("heun", "euler_maruyama"):
        how = {"steps": 4, "guidance": 2.0, "solver": solver, "decode": False}
        together = generate(model, range(5), **how).collect().latents
        assert together.shape == (5, 3, 16, 16)
        alone = generate(model, [3], **how).collect().latents
        torch.testing.assert_close(together[3:4], alone, atol=1e-4, rtol=1e-4)


def test_a_run_goes_to_regs_layout(trained: Path, tmp_path: Path) -> None:
    convert(trained, tmp_path / "reg.pt", to="reg")
    again = load_pretrained(tmp_path / "reg.pt", num_heads=2)
    x, t = torch.randn(2, 3 * 256 + 1280), torch.rand(2)
    assert torch.equal(again.velocity(x, t), load(trained).velocity(x, t))


def test_hidden_states_are_of_patches(trained: Path, cache: Path) -> None:
    shown = material(cache, count=8)
    states = hidden_states(load(trained), shown, time=0.5)
    assert states[1].shape == (8, 32)
    with pytest.raises(DataError, match="needs class tokens of 1280 channels"):
        hidden_states(load(trained), shown._replace(token=None))
