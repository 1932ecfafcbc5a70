"""Analytic cost of training: FLOPs and parameters, from sizes alone.

One multiply-add is 2 FLOPs, and only matrix products, convolutions and attention count, as in
`torch.utils.flop_counter`. A layer's backward costs two of its forwards where a gradient flows on
to its input, and one where none does: in the patch embedding and the first layer of the time
embedding. Flash attention recomputes its scores, half its forward again, which is not counted: it
buys memory, not learning, and is below 1 % of a step at 256 tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from erw.models.layers import MlpKind, NormKind, modulations, swiglu_hidden
from erw.models.rdm import CONDITION

TIME_FREQUENCIES = 256  # width of the sinusoidal time embedding in DiT and SiT


class Flops(NamedTuple):
    """FLOPs for one image (or one token grid), forward and backward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward together: one training step's share of one image."""
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: int) -> "Flops":
        """The same thing `count` times."""
        return Flops(self.forward * count, self.backward * count)


def linear_flops(rows: int, inputs: int, outputs: int, *, first: bool = False) -> Flops:
    """A linear layer on `rows` vectors; `first` says that no gradient flows on to its input."""
    forward = 2 * rows * inputs * outputs
    return Flops(forward, forward if first else 2 * forward)


def attention_flops(tokens: int, width: int) -> Flops:
    """Scores and weighted sum of self-attention over all heads; the projections are not in it."""
    forward = 2 * (2 * tokens * tokens * width)
    return Flops(forward, 2 * forward)


def block_flops(
    *,
    tokens: int,
    width: int,
    mlp_ratio: float = 4.0,
    mlp: MlpKind = "gelu",
    modulation: int = 6,
) -> Flops:
    """One transformer block: attention, MLP and so many vectors of modulation per image.

    `mlp_ratio` is the hidden width of a GELU MLP; SwiGLU has its own.
    """
    into, out_of = _mlp_sizes(width, mlp_ratio, mlp)
    cost = linear_flops(tokens, width, 3 * width) + linear_flops(tokens, width, width)
    cost += attention_flops(tokens, width)
    cost += linear_flops(tokens, width, into) + linear_flops(tokens, out_of, width)
    return cost + linear_flops(1, width, modulation * width)


def _mlp_sizes(width: int, mlp_ratio: float, mlp: MlpKind) -> tuple[int, int]:
    """Outputs of an MLP's first layer and inputs of its last."""
    if mlp == "swiglu":
        return 2 * swiglu_hidden(width), swiglu_hidden(width)
    return int(width * mlp_ratio), int(width * mlp_ratio)


def sit_flops(
    *,
    depth: int,
    width: int,
    tokens: int,
    patch: int,
    channels: int,
    mlp_ratio: float = 4.0,
    mlp: MlpKind = "gelu",
    adaln_shift: bool = True,
    class_token: int = 0,
    representation: int = 0,
    outputs: int = 1,
    stop_at: int | None = None,
) -> Flops:
    """FLOPs of a SiT on one latent (`channels`, h, w) of `tokens` = h w / patch^2 tokens.

    `outputs` is how often the channels come out: 2 for DiT, which gives a variance too. A class
    token and a representation are counted by their channels, as in `SiT`. With `stop_at` the blocks
    after that depth and the final layer do not run, as in warm-up.
    Raises ValueError if `stop_at` is not within 1..depth.
    """
    if stop_at is not None and not 1 <= stop_at <= depth:
        raise ValueError(f"stop_at is {stop_at}, but the model has blocks 1 to {depth}")
    pixels = patch * patch * channels
    cost = linear_flops(tokens, pixels, width, first=True)
    cost += linear_flops(1, TIME_FREQUENCIES, width, first=True) + linear_flops(1, width, width)
    cost += linear_flops(1, class_token, width, first=True) + linear_flops(1, representation, width)
    block = block_flops(
        tokens=tokens + (class_token > 0),
        width=width,
        mlp_ratio=mlp_ratio,
        mlp=mlp,
        modulation=modulations(adaln_shift),
    )
    cost += block.times(depth if stop_at is None else stop_at)
    if stop_at is not None:
        return cost
    cost += linear_flops(1, width, 2 * width) + linear_flops(1, width, class_token)
    return cost + linear_flops(tokens, width, outputs * pixels)


def sit_parameters(
    *,
    depth: int,
    width: int,
    patch: int,
    channels: int,
    num_classes: int,
    mlp_ratio: float = 4.0,
    mlp: MlpKind = "gelu",
    norm: NormKind = "layer",
    adaln_shift: bool = True,
    class_token: int = 0,
    representation: int = 0,
    outputs: int = 1,
    stop_at: int | None = None,
) -> int:
    """Trainable parameters of a SiT without QK-norm, or of the part that runs with `stop_at`.

    `outputs` as in `sit_flops`.
    """
    into, out_of = _mlp_sizes(width, mlp_ratio, mlp)
    gain = width if norm == "rms" else 0

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    pixels = patch * patch * channels
    embedders = linear(pixels, width) + linear(TIME_FREQUENCIES, width) + linear(width, width)
    if representation:
        embedders += linear(representation, width) + representation  # and the null one
    else:
        embedders += (num_classes + 1) * width  # and the null class
    if class_token:
        embedders += linear(class_token, width) + 2 * width
    block = linear(width, 3 * width) + linear(width, width)
    block += linear(width, modulations(adaln_shift) * width)
    block += linear(width, into) + linear(out_of, width) + 2 * gain
    if stop_at is not None:
        return embedders + stop_at * block
    final = linear(width, 2 * width) + linear(width, outputs * pixels) + gain
    final += linear(width, class_token) if class_token else 0
    return embedders + depth * block + final


def rdm_flops(*, dim: int, width: int, depth: int) -> Flops:
    """FLOPs of an `erw.models.rdm.Rdm` on one representation of `dim` channels."""
    block = linear_flops(1, width, width).times(2) + linear_flops(1, CONDITION, width)
    cost = linear_flops(1, dim, width, first=True) + linear_flops(1, width, dim)
    cost += linear_flops(1, TIME_FREQUENCIES, CONDITION, first=True)
    return cost + linear_flops(1, CONDITION, CONDITION) + block.times(depth)


def projector_flops(*, tokens: int, width: int, dim: int, hidden: int = 2048) -> Flops:
    """The three-layer projector of REPA and ERW on every token: width, hidden, hidden, dim."""
    cost = linear_flops(tokens, width, hidden) + linear_flops(tokens, hidden, hidden)
    return cost + linear_flops(tokens, hidden, dim)


def vit_flops(
    *,
    depth: int,
    width: int,
    patch: int,
    image_size: int,
    mlp_ratio: float = 4.0,
    extra_tokens: int = 1,
) -> int:
    """Forward FLOPs of a plain ViT on one RGB image: DINOv2-B is (12, 768, 14, 224), 46 GFLOP."""
    grid = (image_size // patch) ** 2
    block = block_flops(tokens=grid + extra_tokens, width=width, mlp_ratio=mlp_ratio, modulation=0)
    return linear_flops(grid, 3 * patch * patch, width).forward + depth * block.forward


@dataclass(frozen=True)
class StepCost:
    """What one image costs in one training step, by part, in FLOPs.

    `warmup` and `full` are the network's forward and backward in either phase, `projector` the same
    for the projection heads, `teacher` the frozen encoder's forward (it has no backward), which is
    `always_taught` where the network needs the class token also without alignment.
    """

    warmup: int
    full: int
    projector: int
    teacher: int
    always_taught: bool = False

    def per_image(self, *, warmup: bool, aligned: bool = True) -> int:
        """Everything one image costs in a step; without alignment projector and teacher rest."""
        network = self.warmup if warmup else self.full
        teacher = self.teacher if aligned or self.always_taught else 0
        return network + teacher + (self.projector if aligned else 0)

    @property
    def ratio(self) -> float:
        """A warm-up step over a full one, projector and teacher counted in both."""
        return self.per_image(warmup=True) / self.per_image(warmup=False)


def training_step_flops(
    *,
    depth: int,
    width: int,
    tokens: int,
    patch: int,
    channels: int,
    warmup_depth: int,
    dims: tuple[int, ...] = (),
    projector_hidden: int = 2048,
    mlp_ratio: float = 4.0,
    mlp: MlpKind = "gelu",
    adaln_shift: bool = True,
    class_token: int = 0,
    representation: int = 0,
    outputs: int = 1,
    teacher: int = 0,
) -> StepCost:
    """Cost per image of SiT, DiT, REPA and ERW steps: `dims` are the teachers' feature sizes.

    `teacher` is the forward FLOPs of all frozen encoders on one image. Whether they are paid in
    every step (encoding online) or once (a cache) is the business of `erw.training.ledger`.
    """
    sizes: dict[str, Any] = {
        "depth": depth,
        "width": width,
        "tokens": tokens,
        "patch": patch,
        "channels": channels,
        "mlp_ratio": mlp_ratio,
        "mlp": mlp,
        "adaln_shift": adaln_shift,
        "class_token": class_token,
        "representation": representation,
    }
    heads = [  # REG aligns the class token too, where one projector fits it
        projector_flops(
            tokens=tokens + (dim == class_token), width=width, dim=dim, hidden=projector_hidden
        ).total
        for dim in dims
    ]
    return StepCost(
        warmup=sit_flops(**sizes, stop_at=warmup_depth).total,
        full=sit_flops(**sizes, outputs=outputs).total,
        projector=sum(heads),
        teacher=teacher,
        always_taught=bool(class_token or representation),
    )
