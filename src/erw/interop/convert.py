"""Back to the released layouts."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from erw.errors import CheckpointError, ConfigError
from erw.interop.files import Which, write_weights
from erw.interop.known import unusual
from erw.interop.layouts import LAYOUTS, TIMES, Parts, peers, unshifted, with_sigma
from erw.interop.measure import positions
from erw.interop.pretrained import Origin, Pretrained, load_pretrained
from erw.models import SiT
from erw.training.trained import Trained, is_run, load

PLAIN: dict[str, Any] = {
    **{"rope": False, "qk_norm": False, "norm": "layer", "mlp": "gelu"},
    **{"adaln_shift": True, "class_token": False},
}
CAN = {  # what a layout's own code can build
    "dit": PLAIN,
    "diffusers-dit": PLAIN,
    "sit": PLAIN,
    "repa": PLAIN | {"qk_norm": None},
    "erw": PLAIN | {"qk_norm": None, "rope": None},
    "reg": PLAIN | {"qk_norm": None, "class_token": True},
    "lightningdit": dict.fromkeys(PLAIN) | {"class_token": False},
}


def save_pretrained(model: Pretrained, path: str | Path, *, layout: str | None = None) -> Path:
    """Write a model in a released layout, its own by default, as a bare state dict; what a network
    predicts and its path lie beside, where they are not the velocity and linear.

    A file read and written in its own layout has the same bits: sigma channels, stored positions
    and projectors come back, a warm-up's file has the blocks it had.

    Raises:
        ConfigError: unknown layout.
        CheckpointError: the layout runs time another way or cannot hold the network's layers; the
            file cannot be written.
    """
    origin, layout, path = model.origin, layout or model.origin.layout, Path(path)
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; expected {', '.join(LAYOUTS)}")
    if TIMES[layout] != TIMES[origin.layout]:
        words = {
            "steps": "predicts noise at steps 0..999",
            "flipped": "counts time from noise (0) to data (1)",
            "ours": "counts time from data (0) to noise (1)",
        }
        raise CheckpointError(
            f"{origin.file} {words[TIMES[origin.layout]]}, {layout} {words[TIMES[layout]]}; "
            f"weights cannot say that: choose {', '.join(_same_time(origin.layout))}"
        )
    if lacking := unlike(model.net, layout):
        raise CheckpointError(f"{layout} has no {lacking[0]}; choose another layout")
    parameters = model.net.named_parameters()
    net: dict[str, Tensor] = {k: p.detach() for k, p in parameters if k in origin.loaded}
    if layout == "sit":
        channels = model.net.channels
        for name, sigma in origin.sigma.items():
            net[name] = with_sigma(net[name], sigma.to(net[name].device), channels=channels)
    net = {k: v.to(origin.dtypes.get(k, v.dtype)) for k, v in net.items()}
    buffers = {
        name: origin.buffers.get(name, table)
        for name, table in positions(model.net).items()
        if name in origin.buffers or not origin.buffers
    }
    heads = {f"projectors.{k}": v for k, v in model.projectors.state_dict().items()}
    flow = model.run.flow
    settings = {"layout": layout, "prediction": flow.prediction, "path_type": flow.path}
    write_weights(
        peers(Parts(net, heads, buffers), layout),
        path,
        settings=settings if unusual(flow) else None,
    )
    return path


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    layout: str = "auto",
    which: Which = "ema",
    **told: Any,
) -> Pretrained:
    """Read a checkpoint, or a run folder of ours, and write it in the layout `to`.

    `told` is passed to `load_pretrained` (num_heads, input_size, depth, prediction, path_type).
    Returns what was read.
    Raises as `load_pretrained` and `save_pretrained` do.
    """
    source = Path(source).expanduser()
    if is_run(source):
        model = from_run(load(source), source)
    else:
        model = load_pretrained(source, layout, which=which, **told)
    save_pretrained(model, out, layout=to)
    return model


def from_run(trained: Trained, folder: str | Path) -> Pretrained:
    """A run of ours as a model to be written: a flow model counts time as REPA and ERW do.

    Raises:
        CheckpointError: it has another prediction or path than those two know.
    """
    run, net = trained.run, trained.net
    if run.flow.prediction != "velocity" or run.flow.path == "vp":
        raise CheckpointError(
            f"{folder} {' on the '.join(unusual(run.flow))}; the released layouts that count time "
            "as it does are for the velocity on the linear or cosine path"
        )
    layout = "reg" if net.class_token else "erw" if net.rope is not None else "repa"
    if run.flow.objective == "ddpm":
        layout = "dit"
    names = frozenset(name for name, _ in net.named_parameters())
    if net.representation:
        raise CheckpointError(
            f"{folder} is conditioned on representations; no released layout has them"
        )
    origin = Origin(layout, f"run {run.name}", str(folder), names)
    return Pretrained(net, origin, projectors=nn.ModuleList(), run=run, vae=trained.vae)


def _same_time(layout: str) -> list[str]:
    return [other for other, time in TIMES.items() if time == TIMES[layout]]


def unlike(net: SiT, layout: str) -> list[str]:
    """The options of a network that a layout's own code cannot build, as 'rope = True'."""
    has = _options(net).items()
    return [f"{name} = {value}" for name, value in has if CAN[layout][name] not in (None, value)]


def _options(net: SiT) -> dict[str, Any]:
    """The network's options, from its parameters."""
    names: dict[str, Tensor] = dict(net.named_parameters())
    return {
        "rope": net.rope is not None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "norm": "rms" if "blocks.0.norm1.weight" in names else "layer",
        "mlp": "swiglu" if "blocks.0.mlp.w12.weight" in names else "gelu",
        "adaln_shift": not unshifted(names),
        "class_token": net.class_token > 0,
    }
