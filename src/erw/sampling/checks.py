"""What cannot be sampled is refused at once, not at the first batch."""

from erw.config import nearest
from erw.errors import ConfigError
from erw.sampling.model import Model, flow_of
from erw.sampling.solvers import SOLVERS


def chosen_solver(model: Model, name: str | None) -> str:
    """The solver of that name; None: the usual one for what the model was trained for.

    Raises ConfigError if there is none of that name, or it is for other models.
    """
    objective = flow_of(model).objective
    name = name or ("heun" if objective == "flow" else "ddim")
    check_solver(name, objective)
    return name


def check_solver(name: str, objective: str) -> None:
    """Raise ConfigError if there is no solver of that name, or it is for another objective."""
    if name not in SOLVERS:
        raise ConfigError(f"unknown solver {name!r}{nearest(name, SOLVERS)}")
    if SOLVERS[name].objective != objective:
        kind = "a flow model" if objective == "flow" else "a DiT, which predicts noise on a chain"
        fit = [other for other in SOLVERS if SOLVERS[other].objective == objective]
        raise ConfigError(f"solver {name!r} cannot draw {kind}; choose {', '.join(fit)}")


def check(
    model: Model,
    solver: str,
    steps: int,
    batch_size: int,
    precision: str,
    interval: tuple[float, float],
    shift: float,
    guided_channels: int | None,
) -> None:
    """Raise ConfigError for settings that are impossible."""
    SOLVERS[solver].times(steps, shift=shift)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
    if precision not in ("fp32", "bf16", "auto"):
        raise ConfigError(f"precision is {precision!r}; expected 'fp32', 'bf16' or 'auto'")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ConfigError(f"guidance interval {interval}; expected 0 <= low <= high <= 1")
    channels = model.latent_shape[0]
    if guided_channels is not None and not 1 <= guided_channels <= channels:
        raise ConfigError(
            f"guided_channels is {guided_channels}; expected 1 to {channels}, or none: all"
        )
    if guided_channels is not None and getattr(model.net, "class_token", False):
        raise ConfigError(
            "guided_channels are of latents alone; with a class token leave it at none"
        )


def check_pair(model: Model, weak: Model) -> None:
    """Raise ConfigError unless `weak` can guide `model`: same latents, classes, objective, path."""
    for what, of in (
        ("latents", lambda m: m.latent_shape),
        ("class token", lambda m: getattr(m.net, "class_token", 0)),
        ("representation", lambda m: getattr(m.net, "representation", 0)),
        ("number of classes", lambda m: m.num_classes),
        ("objective", lambda m: flow_of(m).objective),
        ("path", lambda m: flow_of(m).path),
    ):
        if of(model) != of(weak):
            raise ConfigError(
                f"autoguidance: the weaker model's {what} {of(weak)} differ from the model's "
                f"{of(model)}; give one trained on the same data"
            )
