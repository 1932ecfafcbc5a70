"""REPA's released training step, run from a clone of sihyun-yu/REPA that the user names.

Model, loss, posterior sampling and EMA are the clone's own code, imported or read from its files;
the order of a step is that of its `train.py` at default settings: per-sample projection loss,
backward, clip 1.0, AdamW as constructed there, per-parameter EMA, three numbers fetched to log.
Two things are replaced, and the report says so:

- accelerate: alone in one process it casts the forward and hands its outputs back in float32, which
  is three lines here. Its fp16 default has no CPU counterpart, so both sides run bf16 or float32.
- timm, which needs torchvision: three small layers of `timm.models.vision_transformer` are written
  anew below, with fused attention as REPA asks for by default.
"""

import ast
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 0.18215


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to patch tokens (B, T, D)."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True
    ):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size,) * 2, (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Fused multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool = False) -> None:
        super().__init__()
        if qk_norm:
            raise ValueError("the stand-in for timm has no QK-norm; REPA's default is without")
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        heads = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module],
        drop: float,
    ) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def stand_in_for_timm() -> None:
    """Make `timm.models.vision_transformer` importable in this process."""
    names = ["timm", "timm.models", "timm.models.vision_transformer"]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for layer in (PatchEmbed, Attention, Mlp):
        setattr(sys.modules[names[-1]], layer.__name__, layer)


def functions(path: Path, *names: str) -> list[Any]:
    """Functions of a file that cannot be imported for what its top asks for, compiled alone."""
    tree = ast.parse(path.read_text("utf-8"))
    wanted = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    space: dict[str, Any] = {"torch": torch, "OrderedDict": OrderedDict}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), space)
    return [space[name] for name in names]


def repa(spec: dict[str, Any], data: Any, device: torch.device) -> Callable[[str, str], Tensor]:
    """REPA's step at released settings, on the model that `spec` names."""
    clone = Path(spec["path"])
    if not (clone / "models" / "sit.py").is_file():
        raise FileNotFoundError(f"no models/sit.py in {clone}; give a clone of sihyun-yu/REPA")
    stand_in_for_timm()
    sys.path.insert(0, str(clone))
    from loss import SILoss
    from models.sit import SiT_models

    update_ema, sample_posterior = functions(clone / "train.py", "update_ema", "sample_posterior")
    torch.manual_seed(0)
    # The clone's S models forget this setting and cannot run without it.
    mended = {"decoder_hidden_size": 384} if spec["model"].startswith("S/") else {}
    model = SiT_models[f"SiT-{spec['model']}"](
        input_size=32,
        num_classes=1000,
        use_cfg=True,
        z_dims=[768],
        encoder_depth=spec["align_depth"],
        fused_attn=True,
        qk_norm=False,
        **mended,
    ).to(device)
    ema = deepcopy(model).requires_grad_(False)
    update_ema(ema, model, decay=0)
    model.train()
    ema.eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8
    )
    loss_fn = SILoss(prediction="v", path_type="linear", weighting="uniform")
    scale = torch.full((1, 4, 1, 1), SCALE, device=device)
    moments = torch.cat([data.mean, data.std], dim=1)

    def turn(precision: str, phase: str) -> Tensor:
        if phase != "full":
            raise ValueError(f"REPA has no {phase} phase")

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
            on = precision == "bf16"
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on):
                out, projected = model(*args, **kwargs)
            return out.float(), [z.float() for z in projected]

        x = sample_posterior(moments, latents_scale=scale, latents_bias=0.0 * scale)
        denoising, projection = loss_fn(forward, x, {"y": data.labels}, zs=[data.features])
        loss_mean, projection_mean = denoising.mean(), projection.mean()
        loss = loss_mean + 0.5 * projection_mean
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model)
        for number in (loss_mean, projection_mean, norm):
            number.detach().item()
        return loss.detach()

    return turn
