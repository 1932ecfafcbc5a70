"""What the engine asks of a network, and the networks by name.

A new backbone is one file with the class and one line in `BACKBONES`: the loop trains it, its
FLOPs are counted by running it, and `erw.generate` samples it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from erw.errors import CheckpointError, ConfigError, nearest, raised_as
from erw.io import misfit
from erw.models.rdm import Rdm
from erw.models.sit import SiT, Tapped
from erw.rng import seeded
from erw.routing import Route

if TYPE_CHECKING:
    from erw.config import Model


class Backbone(Protocol):
    """A network that is trained and sampled; also an `nn.Module`."""

    latent_shape: tuple[int, ...]  # of what it draws, (C, h, w), or (R,) for representations
    null_class: int  # label that stands for none, the number of classes; 0: unconditional
    depth: int  # blocks
    width: int  # channels of the tokens
    tokens: int  # patch tokens; 0: it has none, and cannot be aligned
    class_token: int  # channels of a class token that is denoised too, before the patches; 0: none
    representation: int  # channels of what it is given in place of labels; 0: labels

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, tap: tuple[int, ...] = (),
        stop_at: int | None = None, route: Route | None = None,
    ) -> Tensor | Tapped:  # fmt: skip
        """The prediction at x (B, *latent_shape), times t (B,) and labels y (B,).

        With `tap`, depths counted from 1, a `Tapped` with the tokens (B, T, D) after those blocks;
        with `stop_at` the later blocks do not run. `route`, for a `sit` alone: see `erw.routing`.
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def warmup_modules(self, depth: int) -> Iterable[nn.Module]:
        """The modules that a warm-up of `depth` blocks trains."""
        ...


def _sit(model: "Model", outputs: int) -> SiT:
    names = ["patch", "depth", "width", "heads", "rope", "qk_norm", "norm", "mlp", "adaln_shift"]
    names += ["internal", "head_depth", "head_width", "head_heads", "fusion"]
    assert model.input_size and model.channels and model.num_classes is not None, "unknown sizes"
    width = model.class_dim or 0  # of the class token
    return SiT(
        input_size=model.input_size,
        channels=model.channels,
        num_classes=model.num_classes,
        out_channels=outputs * model.channels,
        class_token=width if model.class_token == "denoised" else 0,
        representation=width if model.class_token == "given" else 0,
        **{name: getattr(model, name) for name in names},
    )


def _rdm(model: "Model", outputs: int) -> Rdm:
    assert model.class_dim and model.num_classes is not None, "unknown sizes"
    sizes = {name: getattr(model, name) for name in ("depth", "width", "num_classes")}
    return Rdm(dim=model.class_dim, **sizes)


MOST_POSITIONS = 2**28  # numbers in the table of positions: far above any model there is
BACKBONES: dict[str, Callable[["Model", int], Any]] = {"sit": _sit, "rdm": _rdm}
"""Name in `model.net` -> (resolved model settings, outputs for each number of the latent) ->
network."""


def build_model(model: "Model", *, outputs: int = 1, seed: int = 0) -> Any:
    """The network of resolved settings, initialised as a function of `seed`.

    `outputs`: numbers given for each of the latent, as the run's `flow.outputs` says.
    """
    if model.net not in BACKBONES:
        raise ConfigError(f"model.net is {model.net!r}{nearest(model.net, BACKBONES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, "init"))
        return BACKBONES[model.net](model, outputs)


def fitting(
    model: "Model", tensors: Mapping[str, Tensor], *, outputs: int, source: object,
    late: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """The network that a file's tensors fill, on the meta device: settings from a file are checked
    before they take memory. Names that begin as `late` may be missing. Raises CheckpointError."""
    sizes = f"a network of {model.depth} x {model.width}, patch {model.patch}"
    with raised_as(CheckpointError, f"{source} does not fit {sizes}"), torch.device("meta"):
        places = ((model.input_size or 0) // model.patch) ** 2 * model.width
        if places > MOST_POSITIONS or max(model.depth - len(late), model.head_depth) > len(tensors):
            raise ValueError(f"on latents of side {model.input_size}, with {len(tensors)} tensors")
        net = build_model(model, outputs=outputs)
        names = dict(net.named_parameters())
        if problems := misfit(tensors, names, optional={k for k in names if k.startswith(late)}):
            raise ValueError(problems)
    return net
