"""What sampling asks of a model and of a VAE, and what it reads off them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from erw import ddpm
from erw.config import Flow
from erw.dist import precision as precision_of
from erw.flow import PATHS, Path


class Model(Protocol):
    """What is asked of a trained model; `erw.training.trained.Trained` is one."""

    @property
    def net(self) -> nn.Module: ...
    @property
    def vae(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor: ...


class Decoder(Protocol):
    """What is asked of a VAE; `erw.encoders.vae.VAE` is one."""

    @property
    def name(self) -> str: ...
    def decode(self, latents: Tensor) -> Tensor: ...


def weights_hash(module: nn.Module) -> str:
    """The first 16 hex digits of the blake3 hash of a module's named parameters and buffers."""
    from blake3 import blake3

    digest = blake3()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def device_of(model: Model) -> torch.device:
    """Where the model's weights are."""
    return next(model.net.parameters()).device


def flow_of(model: Model) -> Flow:
    """The objective that the model was trained for; of a bare one the velocity, linear path."""
    run = getattr(model, "run", None)
    return Flow() if run is None else run.flow


def path_of(model: Model) -> Path:
    """The path that the model was trained on."""
    return PATHS[flow_of(model).path]


def asked_of(model: Model) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What solvers ask at (x, t, y): the velocity or, of a DiT, noise and variance (B, 2C, h, w) at
    the step of t."""
    if flow_of(model).objective == "flow":
        return model.velocity
    return lambda x, t, y: model.net(x, ddpm.step_at(t), y)


def chosen_precision(model: Model, wanted: str) -> str:
    """ "bf16" or "fp32", "auto" resolved by the model's device."""
    dtype, _ = precision_of(wanted, device_of(model))
    return "bf16" if dtype is torch.bfloat16 else "fp32"


def decoder_of(model: Model, vae: Decoder | str | None) -> Decoder:
    """The VAE, loaded where only its name is given (None: the model's own), with the scaling that
    the model's latents have: it may be measured on its data."""
    from erw.encoders.vae import VAE, load_vae

    decoder = model.vae if vae is None else vae
    named = isinstance(decoder, str)
    if isinstance(decoder, str):
        decoder = load_vae(decoder, device=str(device_of(model)))
    scaling = getattr(model, "scaling", None)
    if scaling and isinstance(decoder, VAE) and (named or decoder.scale is None):
        decoder = decoder.scaled(**scaling)
    return decoder


@contextmanager
def ready(net: nn.Module, *, half: bool) -> Iterator[None]:
    """The network in evaluation mode and, with `half`, its products' weights as bf16.

    Autocast would turn the same weights into the same bf16 at every evaluation; the bits of the
    result are equal. Afterwards the network has its mode and its own weights back.
    """
    training, kept = net.training, []
    net.eval()
    try:
        for module in net.modules() if half else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.data.bfloat16()
        yield
    finally:
        for parameter, value in reversed(kept):
            parameter.data = value
        net.train(training)


def latents_in(net: Any, x: Tensor) -> Tensor:
    """The latents in a state that was sampled, without a class token beside them."""
    latents: Tensor = net.split(x)[0] if getattr(net, "class_token", 0) else x
    return latents
