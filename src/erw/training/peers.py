"""Training steps of others' released code, run from clones that the user names, beside ours.

Model, loss and EMA are the clone's own, imported or read from its files; a step does what its
`train.py` does, in that order, at its default settings. Replaced are

- accelerate: alone in one process it casts the forward and hands its outputs back in float32, which
  is three lines here; its fp16 has no counterpart on a CPU, so a peer's precision is ours;
- timm, which needs torchvision: three small layers are written anew below, with fused attention;
- fairscale, whose layers LightningDiT's norm imports and does not use.
"""

import ast
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw.config import Run
from erw.data.cache import Batch
from erw.errors import ConfigError, nearest


class Peer(NamedTuple):
    """A model of a clone and one optimiser step of it."""

    model: nn.Module
    step: Callable[[], object]


def build_peer(name: str, clone: Path, run: Run, batch: Batch, dtype: torch.dtype) -> Peer:
    """The peer `name` with the sizes of a resolved run, on a batch that is on the run's device;
    called, and its steps made, while `importing` the clone.

    Raises ConfigError: no such peer, no clone of it, or a run that it cannot be.
    """
    if name not in PEERS:
        raise ConfigError(f"no peer {name!r}{nearest(name, PEERS)}")
    model, routed = run.model, run.plan.routing.kind != "none"
    if run.flow.objective != "flow" or model.needs_token or model.net != "sit" or routed:
        raise ConfigError(f"{name} has no step like {run.name}'s: take a recipe of SiT or REPA")
    if not clone.is_dir():
        raise ConfigError(f"no folder {clone}: --peer {name}= takes a clone of its repository")
    return PEERS[name](clone, run, batch, dtype)


def repa(clone: Path, run: Run, batch: Batch, dtype: torch.dtype) -> Peer:
    """REPA's step (github.com/sihyun-yu/REPA)."""
    terms = run.plan(run.plan.warmup).terms
    if not batch.features or len(terms) != 1 or run.model.qk_norm or run.model.rope:
        raise ConfigError(f"repa aligns one block of a plain SiT with one encoder; {run.name} not")
    loss_module, sit = module("loss", clone), module("models.sit", clone)
    update_ema, sample_posterior = functions(clone / "train.py", "update_ema", "sample_posterior")
    features = batch.features[0]
    model = sit.SiT(
        **sizes(run), decoder_hidden_size=run.model.width, encoder_depth=terms[0].block,
        z_dims=[features.shape[-1]], projector_dim=run.model.projector, use_cfg=True,
        fused_attn=True, qk_norm=False,
    ).to(batch.mean.device)  # fmt: skip
    ema, optimizer = averaged(model, update_ema), adamw(model)
    criterion = loss_module.SILoss(prediction="v", path_type="linear", weighting="uniform")
    unit = torch.ones(1, batch.mean.shape[1], 1, 1, device=batch.mean.device)
    moments = torch.cat([batch.mean, batch.std], dim=1)

    def cast(*args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(batch.mean.device.type, dtype, dtype != torch.float32):
            out, projected = model(*args, **kwargs)
        return out.float(), [z.float() for z in projected]

    def step() -> None:
        x = sample_posterior(moments, latents_scale=unit, latents_bias=0.0 * unit)
        denoising, projection = criterion(cast, x, {"y": batch.labels}, zs=[features])
        denoising, projection = denoising.mean(), projection.mean()
        (denoising + 0.5 * projection).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model)
        for number in (denoising, projection, norm):
            number.detach().item()

    return Peer(model, step)


def lightningdit(clone: Path, run: Run, batch: Batch, dtype: torch.dtype) -> Peer:
    """LightningDiT's step (github.com/hustvl/LightningDiT), without its cosine term."""
    if run.plan(run.plan.warmup).terms:
        raise ConfigError(f"lightningdit aligns nothing: take a recipe without, not {run.name}")
    net, transport = module("models.lightningdit", clone), module("transport", clone)
    (update_ema,) = functions(clone / "train.py", "update_ema")
    ours = run.model
    model = net.LightningDiT(
        **sizes(run), use_qknorm=ours.qk_norm, use_swiglu=ours.mlp == "swiglu",
        use_rope=ours.rope, use_rmsnorm=ours.norm == "rms", wo_shift=not ours.adaln_shift,
    ).to(batch.mean.device)  # fmt: skip
    ema, optimizer = averaged(model, update_ema), adamw(model)
    flow = transport.create_transport(use_lognorm=run.flow.times == "logit_normal")

    def cast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(batch.mean.device.type, dtype, dtype != torch.float32):
            return model(*args, **kwargs).float()

    def step() -> None:
        loss = flow.training_losses(cast, batch.mean, {"y": batch.labels})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model)
        loss.item()

    return Peer(model, step)


PEERS: dict[str, Callable[[Path, Run, Batch, torch.dtype], Peer]] = {
    "repa": repa,
    "lightningdit": lightningdit,
}
"""Name -> what builds its model and step from a clone; add another here."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The peer's backbone by our names (`erw.interop.layouts`: the same, but for buffers)."""
    own = ("pos_embed", "feat_rope.", "projectors.")
    return {k: v for k, v in model.state_dict().items() if not k.startswith(own)}


def sizes(run: Run) -> dict[str, Any]:
    """What both peers call alike."""
    model = run.model
    return {
        "input_size": model.input_size, "patch_size": model.patch, "in_channels": model.channels,
        "hidden_size": model.width, "depth": model.depth, "num_heads": model.heads,
        "num_classes": model.num_classes, "class_dropout_prob": run.data.class_dropout,
    }  # fmt: skip


def averaged(model: nn.Module, update_ema: Callable[..., None]) -> nn.Module:
    """The peer's EMA model, as both begin it."""
    ema = deepcopy(model).requires_grad_(False)
    update_ema(ema, model, decay=0)
    model.train()
    return ema.eval()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As both construct it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to patch tokens (B, T, D), as timm's."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch_size,) * 2, (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Fused multi-head self-attention, as timm's without QK-norm."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        heads = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Linear, activation, linear, as timm's."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module],
        drop: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


FAIRSCALE = ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear")
STAND_INS: Mapping[str, Mapping[str, Any]] = {
    "timm": {}, "timm.models": {},
    "timm.models.vision_transformer": {
        "PatchEmbed": PatchEmbed, "Attention": Attention, "Mlp": Mlp,
    },
    "fairscale": {}, "fairscale.nn": {}, "fairscale.nn.model_parallel": {},
    "fairscale.nn.model_parallel.initialize": {},
    "fairscale.nn.model_parallel.layers": dict.fromkeys(FAIRSCALE),
}  # fmt: skip


@contextmanager
def importing(clone: Path) -> Iterator[None]:
    """Within it modules come from the clone and from `STAND_INS`; behind it both are gone again, so
    that two clones may have modules of the same name."""
    before, path = dict(sys.modules), list(sys.path)
    for name, content in STAND_INS.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    root = str(clone.resolve())
    sys.path.insert(0, root)
    try:
        yield
    finally:
        for name in STAND_INS:
            sys.modules.pop(name, None)
        for name, one in list(sys.modules.items()):
            content = getattr(one, "__dict__", {})  # not by attribute, which some answer to any
            places = content.get("__path__", [content.get("__file__")])
            if any(str(place).startswith(root) for place in places):
                del sys.modules[name]
        sys.path[:] = path  # last: folders of packages without __init__ follow it
        sys.modules.update({name: before[name] for name in before if name not in sys.modules})


def module(name: str, clone: Path) -> Any:
    """A module of the clone. Raises ConfigError where it is not there, or asks for a package that
    is not installed."""
    try:
        return __import__(name, fromlist=["*"])
    except ImportError as error:
        raise ConfigError(f"{clone} as a clone: {error}") from error


def functions(path: Path, *names: str) -> list[Any]:
    """Functions of a file that cannot be imported for what its top asks for, compiled alone."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    space: dict[str, Any] = {"torch": torch, "OrderedDict": OrderedDict}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), space)
    return [space[name] for name in names]
