"""Released networks as ours: one forward, one direction of time, whatever file they came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erw.align import Projector
from erw.config import Run
from erw.errors import CheckpointError, ConfigError
from erw.flow import PATHS, velocity_from
from erw.interop.files import Found, Which, read_weights
from erw.interop.known import known_run, unusual, vae_of
from erw.interop.layouts import LAYOUTS, TIMES, ours, tell, without_sigma
from erw.interop.measure import check_buffers, depth_of, fitting, measure
from erw.models import SiT
from erw.models.positions import sincos_2d
from erw.models.sit import Tapped, rope_tables


@dataclass(frozen=True)
class Origin:
    """Where a network came from, and what its file had that the network does not use.

    Attributes:
        layout: of `LAYOUTS`. seen: what was read, in words. file: its path.
        loaded: names of the parameters that the file had; the rest are a fresh model's.
        sigma: rows of the last layer that predict sigma, by parameter.
        buffers: positions as stored, where they are for this resolution.
        dtypes: of parameters that were not float32 in the file.
    """

    layout: str
    seen: str
    file: str
    loaded: frozenset[str]
    sigma: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


class Pretrained(nn.Module):
    """A network in our convention: t = 0 is data, t = 1 is noise, and flow models give the velocity
    noise - data, whatever their file's network predicts. `erw.generate` draws all of them.

    Attributes:
        net: the transformer, in its file's own convention of time.
        projectors: one per encoder that it was aligned with; may be empty.
        origin: where it came from; `origin.seen` says what was read.
        run: its settings as a run's.
        vae: name of the VAE whose latents it makes.
    """

    def __init__(
        self, net: SiT, origin: Origin, *, projectors: nn.ModuleList, run: Run, vae: str
    ) -> None:
        super().__init__()
        self.net, self.projectors = net, projectors
        self.origin, self.run, self.vae = origin, run, vae

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        tap: tuple[int, ...] = (),
        stop_at: int | None = None,
    ) -> Tensor | Tapped:
        """The velocity at x (B, C, H, W) and times t (B,), for labels y (B,); y None: no class.

        REG's x and velocity are rows of latents and class token (`net.join`, `net.split`). A DiT
        takes steps 0..999 for t and gives noise and variance (B, 2C, H, W). `tap` and `stop_at` as
        in `erw.SiT`.
        """
        told = 1 - t if self._flipped else t
        if not tap and stop_at is None:
            return self._ours(self.net(x, told, y), x, t)
        tapped = self.net(x, told, y, tap=tap, stop_at=stop_at)
        if tapped.velocity is None:
            return tapped
        return Tapped(self._ours(tapped.velocity, x, t), tapped.hidden)

    step, scaling, ema, rdm, average = 0, None, "", None, ""

    @property
    def _flipped(self) -> bool:
        return TIMES[self.origin.layout] == "flipped"

    def _ours(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity, or a DiT's own, from what the file's network gives."""
        of = self.run.flow
        if of.prediction == "velocity":
            return -output if self._flipped else output
        return velocity_from(of.prediction, output, x, t, path=PATHS[of.path])

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity, for `erw.generate`. Raises ConfigError for a DiT, which has none."""
        if self.run.flow.objective == "ddpm":
            raise ConfigError("a DiT predicts noise and has no velocity; draw it with ddpm or ddim")
        out = self(x, t, y)
        assert isinstance(out, Tensor)
        return out

    @property
    def source(self) -> str:
        """The file's path."""
        return self.origin.file

    @property
    def class_names(self) -> tuple[str, ...]:
        """Released files do not name their classes."""
        return ()

    @property
    def num_classes(self) -> int:
        return self.net.null_class

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return self.net.latent_shape

    @property
    def depth(self) -> int:
        return self.net.depth


def load_pretrained(
    path: str | Path,
    layout: str = "auto",
    *,
    num_heads: int | None = None,
    which: Which = "ema",
    input_size: int | None = None,
    depth: int | None = None,
    projectors: bool = True,
    prediction: str | None = None,
    path_type: str | None = None,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """A released checkpoint of DiT, SiT, REPA, ERW, REG or LightningDiT as our model.

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file, or a diffusers DiT folder. Nothing in
            it is run.
        layout: "dit", "sit", "repa", "erw", "reg", "lightningdit", "diffusers-dit"; "auto" tells it
            from keys and shapes, and asks where two layouts look the same.
        num_heads: attention heads, where neither the width nor the shapes say it.
        which: averaged ("ema") or plain weights ("model") of a training checkpoint.
        input_size: side of the latent, where it should be another than the file's; positions are
            computed anew.
        depth: blocks of the full model, for a warm-up's file without its last blocks: those are
            loaded, the others start fresh.
        projectors: False drops the alignment heads.
        prediction: what a flow model's network gives, "velocity", "noise", "score" or "x", where
            the file does not say it; the velocity if you neither.
        path_type: the path it was trained on, "linear", "cosine" (SiT's GVP) or "vp", likewise.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: damaged, hostile, ambiguous, or not this layout's; missing, unexpected and
            mis-shaped keys are listed.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ConfigError(f"layout is {layout!r}; expected auto, {', '.join(LAYOUTS)}")
    found = read_weights(path, which=which)
    why = "as told"
    if layout == "auto":
        layout, why = tell(found, path)
    told: dict[str, int | None] = {
        "num_heads": num_heads,
        "depth": depth,
        "input_size": input_size,
    }
    if layout == "diffusers-dit":  # its folder says them
        told["num_heads"] = num_heads or found.settings.get("num_attention_heads")
        told["input_size"] = input_size or found.settings.get("sample_size")
    means = {"prediction": prediction, "path_type": path_type}
    model = _model(found, layout, path, told, means, why=why, projectors=projectors)
    return model.to(device).eval().requires_grad_(False)


def _model(
    found: Found,
    layout: str,
    path: str | Path,
    told: dict[str, int | None],
    means: dict[str, str | None],
    *,
    why: str,
    projectors: bool,
) -> Pretrained:
    """The model of a file whose layout is known."""
    parts = ours(found, layout, path)
    sizes = measure(parts, path, **told)
    with torch.device("meta"):
        net = SiT(**sizes)
    warm = not any(key.startswith("final_layer.") for key in parts.net)
    fitting(net, parts, path, warm=warm)
    steps = TIMES[layout] == "steps"
    sigma: dict[str, Tensor] = {}
    if net.out_channels == 2 * net.channels and not steps:
        parts, sigma = without_sigma(parts, sizes)
    elif net.out_channels != (2 * net.channels if steps else net.channels):
        raise CheckpointError(
            f"{path} gives {net.out_channels} channels for latents of {net.channels}, which is not "
            f"what a {layout} file does"
        )
    net = _filled(sizes, parts.net, warm=warm)
    same = check_buffers(net, parts.buffers, path)
    heads = _projectors(parts.projectors if projectors else {}, net.width, path)
    run = known_run(path, sizes, found.settings, layout, **means)
    seen = _seen(layout, why, sizes, found.wrapper, warm, depth_of(parts.net), sigma, heads)
    origin = Origin(
        layout=layout,
        seen=", ".join([seen, *unusual(run.flow)]),
        file=str(path),
        loaded=frozenset(parts.net),
        sigma={k: v.clone() for k, v in sigma.items()},
        buffers={k: v.clone() for k, v in parts.buffers.items()} if same else {},
        dtypes={k: v.dtype for k, v in parts.net.items() if v.dtype != torch.float32},
    )
    return Pretrained(net, origin, projectors=heads, run=run, vae=vae_of(net.channels))


def _filled(sizes: dict[str, Any], tensors: Mapping[str, Tensor], *, warm: bool) -> SiT:
    """The network with the tensors as float32 copies; a warm start's other parameters are new."""
    with torch.device("cpu" if warm else "meta"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SiT(**sizes)
    own = {k: v.to(torch.float32, copy=True).contiguous() for k, v in tensors.items()}
    net.load_state_dict(own, strict=False, assign=True)
    net.pos_embed = sincos_2d(net.width, net.grid)[None]
    if net.rope is not None:
        head_dim, token = sizes["width"] // sizes["heads"], net.class_token > 0
        net.rope = rope_tables(head_dim, net.grid, class_token=token)
    assert not any(p.is_meta for p in net.parameters())
    return net


def _projectors(tensors: Mapping[str, Tensor], width: int, path: object) -> nn.ModuleList:
    """REPA's three-layer heads."""
    heads = nn.ModuleList()
    left = dict(tensors)
    while any(key.startswith(f"projectors.{len(heads)}.") for key in left):
        stem = f"projectors.{len(heads)}."
        own = {k.removeprefix(stem): left.pop(k) for k in list(left) if k.startswith(stem)}
        shapes = {k: tuple(v.shape) for k, v in own.items()}
        hidden, dim = (shapes.get(f"{layer}.bias", (0,))[0] for layer in (0, 4))
        with torch.device("meta"):
            head = Projector(width, hidden, dim)
        if shapes != {k: tuple(v.shape) for k, v in head.state_dict().items()}:
            raise CheckpointError(
                f"{path}: {stem}* is no three-layer projector ({', '.join(list(own)[:4])}); give "
                "projectors=False to leave it out"
            )
        head.load_state_dict({k: v.float().clone() for k, v in own.items()}, assign=True)
        heads.append(head)
    if left:
        raise CheckpointError(f"{path}: projectors are not numbered from 0: {', '.join(left)}")
    return heads


def _seen(
    layout: str,
    why: str,
    sizes: dict[str, Any],
    wrapper: str,
    warm: bool,
    blocks: int,
    sigma: Mapping[str, Tensor],
    heads: nn.ModuleList,
) -> str:
    """What was read, in one line."""
    side = sizes["input_size"]
    said = [
        f"{layout} ({why}): {sizes['depth']} x {sizes['width']}, {sizes['heads']} heads",
        f"patch {sizes['patch']}, latents {sizes['channels']} x {side} x {side}",
        f"{sizes['num_classes']} classes",
    ]
    said += [f"class token of {sizes['class_token']}"] * bool(sizes["class_token"])
    said += [name for name in ("rope", "qk_norm") if sizes[name]]
    said += [sizes[name] for name in ("norm", "mlp") if sizes[name] in ("rms", "swiglu")]
    said += [f"weights {wrapper}"] * bool(wrapper)
    said += ["sigma channels dropped"] * bool(sigma)
    said += [f"{len(heads)} projector(s)"] * bool(heads)
    said += [f"warm start: blocks 1 to {blocks} from the file, the rest is new"] * warm
    return ", ".join(said)
