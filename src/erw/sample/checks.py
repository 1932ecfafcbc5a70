"""What cannot be sampled is refused at once, not at the first batch."""

from erw.config import nearest
from erw.errors import ConfigError
from erw.sample.model import Model, path_of
from erw.sample.solvers import SOLVERS


def check(
    solver: str,
    steps: int,
    batch_size: int,
    precision: str,
    interval: tuple[float, float],
    shift: float,
    guided_channels: int | None,
    *,
    class_token: int = 0,
) -> None:
    """Raise ConfigError for settings that are impossible."""
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}{nearest(solver, SOLVERS)}")
    SOLVERS[solver].times(steps, shift=shift)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
    if precision not in ("fp32", "bf16", "auto"):
        raise ConfigError(f"precision is {precision!r}; expected 'fp32', 'bf16' or 'auto'")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ConfigError(f"guidance interval {interval}; expected 0 <= low <= high <= 1")
    if guided_channels is not None and guided_channels < 1:
        raise ConfigError(f"guided_channels is {guided_channels}; expected 1 or more, or none: all")
    if guided_channels is not None and class_token:
        raise ConfigError(
            "guided_channels are of latents alone; with a class token leave it at none"
        )


def check_pair(model: Model, weak: Model) -> None:
    """Raise ConfigError unless `weak` can guide `model`: same latents, classes and path."""
    for what, of in (
        ("latents", lambda m: m.latent_shape),
        ("class token", lambda m: getattr(m.net, "class_token", 0)),
        ("number of classes", lambda m: m.num_classes),
        ("path", lambda m: path_of(m).name),
    ):
        if of(model) != of(weak):
            raise ConfigError(
                f"autoguidance: the weaker model's {what} {of(weak)} differ from the model's "
                f"{of(model)}; give one trained on the same data"
            )
