"""Released checkpoints, exported folders and runs as one kind of model, `Trained`: t = 0 is data,
and a flow model gives the velocity noise - data, whatever its file's network predicts."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erw.align import PROJECTORS
from erw.config import SIZES, Data, Flow, Model, Run, Sample
from erw.errors import CheckpointError, ConfigError, raised_as
from erw.interop import layouts
from erw.interop.layouts import FLIPPED, LAST, LAYOUTS, STEPS, TABLE, TIMES, depth_of, outputs_of
from erw.interop.metadata import METADATA, read_metadata
from erw.interop.safe_load import FOLDER_FILE, Which, read_weights
from erw.io import misfit
from erw.models import build_model, fitting
from erw.plan import PRESETS
from erw.training.trained import Trained, is_run, load

FILES = (".pt", ".pth", ".bin", ".safetensors")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_FILE = "model.safetensors"
EXPORTED = (f"transformer/{FOLDER_FILE}", PLAIN_FILE)
OPTIONS = ("rope", "qk_norm", "norm", "mlp", "adaln_shift", "class_token", "fusion")
VAES = {4: "sd-vae-ft-ema", 32: "va-vae"}  # by latent channels
HEADS = {width: heads for _, width, heads in SIZES.values()}
DEPTHS = {width: depth for depth, width, _ in SIZES.values()}
# The peers' names for ours; the first is SiT's default.
PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine", "vp": "vp"}
PREDICTIONS = {"v": "velocity"} | {name: name for name in ("velocity", "noise", "score", "x")}
# LightningDiT counts time the other way: timestep_shift 0.3, no guidance below 0.11, 250 points.
LIGHTNING = Sample(
    steps=249, solver="euler", shift=1 / 0.3, interval=(0.0, 0.89), guided_channels=3
)
DIT = Sample(steps=250, solver="ddpm", guided_channels=3)


def load_pretrained(
    path: str | Path, layout: str = "auto", *, projectors: bool = True,
    device: torch.device | str = "cpu", **options: Any,
) -> Trained:  # fmt: skip
    """A released checkpoint of DiT, SiT, REPA, ERW, REG or LightningDiT as our model.

    Time and sign of SiT's and LightningDiT's files are turned into ours in their weights, which
    changes outputs by float32 rounding. A DiT keeps its meaning: `net(x, steps, y)` gives noise
    and variance (B, 2C, h, w). REG's class token travels with the latents (`net.join`).

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file, or a diffusers DiT folder. Nothing in
            it is run.
        layout: of `LAYOUTS`; "auto" detects it, and asks where two layouts look the same.
        projectors: False drops the alignment heads.
        options: what the file does not say, see `read_released`.

    Raises FileNotFoundError, CheckpointError: missing, damaged, hostile, ambiguous, or not this
    layout's; missing, unexpected and mis-shaped keys are listed.
    """
    model, layout, tensors = read_released(path, layout, **options)
    run, heads, origin = model.run, nn.ModuleList(), model.origin
    stem = layouts.PROJECTOR
    stored = {k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)}
    if run.flow.outputs == 1:
        tensors = layouts.without_sigma(tensors)
    if TIMES[layout] == FLIPPED:
        tensors = in_our_time(tensors, negate=run.flow.prediction == "velocity")
    net = build_model(run.model, outputs=run.flow.outputs)
    net.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    if projectors and stored:  # REPA's three-layer heads
        count = len({key.partition(".")[0] for key in stored})
        heads = alignment_heads(stored, net.width, ["mlp"] * count, path)
        origin += f", {count} projector(s)"
    for module in (net, heads):
        module.to(device).eval().requires_grad_(False)
    return replace(model, net=net, projectors=heads, origin=origin)


def from_pretrained(
    source: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """A model that `erw.export` or `erw.push_to_hub` wrote: a folder, or "owner/name" on the hub
    (`revision`: branch, tag or commit). Only safetensors and JSON are fetched; no code is run.

    Raises CheckpointError: no such folder or repository, no connection, or an incomplete export.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(str(source), revision)
    meta = read_metadata(folder)
    run, names, files = meta.run, meta.class_names, [folder / name for name in EXPORTED]
    file = files[0] if files[0].is_file() else files[1]
    tensors = {k.removeprefix("net."): v for k, v in read_weights(file)[0].items()}
    fitting(run.model, tensors, outputs=run.flow.outputs, source=file)
    net = build_model(run.model, outputs=run.flow.outputs)
    net.load_state_dict(tensors)
    net.to(device).eval().requires_grad_(False)
    vae, scaling = meta.vae, meta.scaling
    if (folder / "vae" / "config.json").is_file():  # which has the scaling too
        vae, scaling = str(folder / "vae"), None
    return Trained(
        net, run, vae, names, meta.step, scaling, str(source), meta.average,
        origin=meta.origin, empty_classes=meta.empty_classes,
    )  # fmt: skip


def open_model(
    path: str | Path, *, checkpoint: str | int = "last", device: torch.device | str = "cpu",
    **options: Any,
) -> Trained:  # fmt: skip
    """The model at a path: a run (whatever `erw.load` takes), an exported folder, or a released
    checkpoint, which `options` say how to read (see `load_pretrained`). Raises as those.

    Raises ConfigError: options or a checkpoint for what has none.
    """
    path, kind = Path(path).expanduser(), kind_of(path)
    options = {k: v for k, v in options.items() if v not in (None, "auto")}
    if options and kind in ("run", "export"):
        raise ConfigError(f"{path} says itself what it is; leave out {', '.join(options)}")
    if kind == "run" or (path.is_dir() and not kind):  # `load` says what is missing
        return load(path, checkpoint=checkpoint, device=device)
    if checkpoint != "last":
        raise ConfigError(f"{path} is no run, so it has no checkpoint {checkpoint}; leave it out")
    if kind == "export":
        return from_pretrained(path, device=device)
    return load_pretrained(path, **options, device=device)


def kind_of(path: str | Path) -> str:
    """What `open_model` takes a path for: a "run", an "export" or a "released" file; else ""."""
    path = Path(path).expanduser()
    if is_run(path):
        return "run"
    if (path / METADATA).is_file():
        return "export"
    released = path.suffix in FILES if path.is_file() else (path / FOLDER_FILE).is_file()
    return "released" if released else ""


def read_released(
    path: str | Path, layout: str = "auto", *, which: Which = "ema", num_heads: int | None = None,
    input_size: int | None = None, depth: int | None = None, prediction: str | None = None,
    path_type: str | None = None,
) -> tuple[Trained, str, dict[str, Tensor]]:  # fmt: skip
    """What a released file is, on the meta device, its layout, and its tensors by our names.

    They are checked and as stored, neither cast nor turned, with projectors, and positions, which
    are added where the file has none. Errors as for `load_pretrained`.

    Args:
        which: averaged ("ema") or plain weights ("model") of a training checkpoint.
        num_heads: attention heads, where neither the width nor the shapes say it.
        input_size: side of the latent; for another than the file's, positions are computed anew.
        depth: blocks of the full model, for a warm-up's file; the others are `Trained.missing`.
        prediction: of a flow model's network, "velocity" (default), "noise", "score" or "x".
        path_type: it was trained on: "linear" (default), "cosine" (SiT's GVP) or "vp".
    """
    if layout not in ("auto", *LAYOUTS):
        raise ConfigError(f"layout is {layout!r}; expected auto, {', '.join(LAYOUTS)}")
    (tensors, settings), evidence = read_weights(path, which=which), "as given"
    if layout == "auto":
        layout, evidence = layouts.detect_layout(tensors, settings, path)
    if layout == "diffusers-dit":  # its folder's config.json says them
        num_heads = num_heads or settings.get("num_attention_heads")
        input_size = input_size or settings.get("sample_size")
    flow, sample = Flow(objective="ddpm"), DIT
    if TIMES[layout] != STEPS:
        sample = LIGHTNING if layout == "lightningdit" else Sample()
        predicts = _known(path, "prediction", PREDICTIONS, settings, prediction)
        along = _known(path, "path_type", PATHS, settings, path_type)
        flow = Flow(prediction=predicts, path=along)  # type: ignore[arg-type]
    elif prediction or path_type:
        raise ConfigError(f"{path} is a DiT, which predicts noise on its chain; say no other")
    tensors, data = layouts.from_layout(tensors, layout, path), Data()
    if TABLE in tensors and settings.get("num_classes") == tensors[TABLE].shape[:1].numel():
        data = Data(class_dropout=0.0)  # trained so, it has no row for no class: one of zeros
        tensors[TABLE] = torch.cat([tensors[TABLE], torch.zeros_like(tensors[TABLE][:1])])
    model = _model(tensors, path, heads=num_heads, depth=depth, input_size=input_size)
    blocks, outputs, late = depth_of(tensors), flow.outputs, tuple[str, ...]()
    if LAST not in tensors:
        late = ("final_layer.", *(f"blocks.{n}." for n in range(blocks, model.depth)))
    elif outputs_of(tensors) == 2:
        outputs = 2  # a flow model's file may have sigma channels
    frozen = (*layouts.BUFFERS, layouts.PROJECTOR)
    own = {k: v for k, v in tensors.items() if not k.startswith(frozen)}
    net = fitting(model, own, outputs=outputs, source=path, late=late)
    for name, table in layouts.positions(net).items():
        stored = tensors.setdefault(name, table)
        if input_size and stored.shape != table.shape:
            tensors[name] = table
            continue
        table = table.to(stored.dtype).float()  # files may be in half precision
        if stored.shape != table.shape or not torch.allclose(stored.float(), table, atol=1e-4):
            raise CheckpointError(f"{path}: {name} is not the frozen table, which erw's model has")
    words = [
        f"{layout} ({evidence}): {model.depth} x {model.width}, {model.heads} heads, patch "
        f"{model.patch}, latents {model.channels} x {model.input_size} x {model.input_size}, "
        f"{model.num_classes} classes"
    ]
    options = {k: getattr(model, k) for k in (*OPTIONS, "class_dim")}
    words += [f"{k} {v}" for k, v in options.items() if v != getattr(Model, k)]
    words += ["no row for no class: trained without label dropout"] * (not data.class_dropout)
    words += [f"weights {settings.get('weights')}"] * ("weights" in settings)
    words += ["sigma channels dropped"] * (outputs > flow.outputs)
    words += [f"warm start: blocks 1 to {blocks} from the file, the rest is new"] * bool(late)
    run = Run(
        name=Path(path).stem, model=model, flow=flow, data=data, plan=PRESETS["sit"], sample=sample
    )
    vae = VAES.get(net.channels, f"a VAE of {net.channels} channels")
    missing = frozenset(dict(net.named_parameters()).keys() - tensors.keys())
    origin = ", ".join(words + unusual(flow))
    return Trained(net, run, vae, source=str(path), missing=missing, origin=origin), layout, tensors


def unusual(flow: Flow) -> list[str]:
    """What a flow model has other than the velocity on the linear path, in words."""
    words = [f"predicts the {flow.prediction}"] * (flow.prediction != "velocity")
    return words + [f"{flow.path} path"] * (flow.path != "linear")


def _model(net: Any, path: Any, *, heads: int | None, depth: int | None, input_size: Any) -> Model:
    """A network's settings from a file's tensors; the options fill in what shapes cannot say."""
    token, rope = "cls_projectors2.weight", "feat_rope.freqs_cos"
    norm = "blocks.0.attn.q_norm.weight"
    with raised_as(CheckpointError, f"{path} does not fit"):
        width, channels, patch, _ = net["x_embedder.proj.weight"].shape
        classes, class_dim = len(net[TABLE]) - 1, net[token].shape[1] if token in net else None
        tokens = net["pos_embed"].shape[1] - (token in net) if "pos_embed" in net else 0
        stored = next((width // net[k].shape[-1] for k in (norm, rope) if k in net), heads)
    sizes: dict[str, Any] = {
        "num_heads": stored or HEADS.get(width),
        "depth": depth or (depth_of(net) if LAST in net else DEPTHS.get(width)),
        "input_size": input_size or math.isqrt(max(tokens, 0)) * patch,
    }
    if unknown := [name for name, value in sizes.items() if not value]:
        raise CheckpointError(f"{path} of width {width} does not say it: give {unknown[0]}=")
    if heads not in (None, stored):
        raise CheckpointError(f"{path} has {stored} heads, not {heads}; leave out num_heads")
    with raised_as(CheckpointError, f"{path} does not fit"):
        return Model(
            input_size=sizes["input_size"],
            channels=channels,
            patch=patch,
            depth=sizes["depth"],
            width=width,
            heads=sizes["num_heads"],
            num_classes=classes,
            rope=rope in net,
            qk_norm=norm in net,
            norm="rms" if "blocks.0.norm1.weight" in net else "layer",
            mlp="swiglu" if "blocks.0.mlp.w12.weight" in net else "gelu",
            adaln_shift=not layouts.unshifted(net),
            class_token="denoised" if class_dim else "none",
            class_dim=class_dim,
        )


def _known(path: object, key: str, names: dict[str, str], settings: Any, given: str | None) -> str:
    """Our name for what the file or the user says; SiT's default where neither does."""
    values = [value for value in (settings.get(key), given) if value is not None]
    meanings = {names.get(str(value).lower()) for value in values or [next(iter(names))]}
    meaning = meanings.pop()
    if meanings or meaning is None:
        both = " in the file, as argument ".join(map(str, values))
        raise CheckpointError(f"{path}: {key} is {both}; expected one of {', '.join(names)}")
    return meaning


def in_our_time(tensors: Mapping[str, Tensor], *, negate: bool) -> dict[str, Tensor]:
    """The weights of net(x, 1 - t), or of its negative, from those of net(x, t), up to rounding.

    The sinusoids of 1 - t are a fixed rotation and reflection of those of t, which the first layer
    of the time embedding absorbs. The last layer changes the sign of a velocity.
    """
    first = "t_embedder.mlp.0.weight"
    cos, sin = tensors[first].double().chunk(2, dim=1)
    half = cos.shape[1]
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    c, s = omega.cos(), omega.sin()
    turned = {first: torch.cat([cos * c + sin * s, cos * s - sin * c], 1).float()}
    turned |= {name: -tensors[name] for name in layouts.SIGMA if negate and name in tensors}
    return {**tensors, **turned}


def alignment_heads(
    tensors: Mapping[str, Tensor], width: int, kinds: Sequence[str], source: object
) -> nn.ModuleList:
    """Projectors of these `kinds` from their tensors, NUMBER.LAYER.weight and others."""
    heads = nn.ModuleList()
    for number, kind in enumerate(kinds):
        names = sorted(key for key in tensors if key.startswith(f"{number}."))
        ends = [tensors[name].shape[:1].numel() for name in names[:1] + names[-1:]]
        problem = f"{source}: no projector of {kind}; leave it out by projectors=False"
        # On the meta device it takes no memory before it fits.
        with raised_as(CheckpointError, problem), torch.device("meta"):
            heads.append(PROJECTORS[kind](width, *(ends or (0, 0))))
    if problems := misfit(tensors, heads.state_dict()):
        problem = f"{source}: no three-layer projector ({problems})"
        raise CheckpointError(f"{problem}; leave it out by projectors=False")
    heads.load_state_dict({k: v.float().clone() for k, v in tensors.items()}, assign=True)
    return heads


def _download(repo: str, revision: str | None) -> Path:
    """The readable files of a repository in the hub's local cache."""
    if not REPO.fullmatch(repo):
        raise CheckpointError(f"no folder {repo}, and that is no owner/name on the hub")
    from huggingface_hub import snapshot_download

    files = [METADATA, *EXPORTED, "vae/config.json", f"vae/{FOLDER_FILE}"]
    with raised_as(CheckpointError, f"there is no folder {repo}, and the hub's cannot be fetched"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
