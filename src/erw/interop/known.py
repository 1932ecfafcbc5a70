"""What a released file leaves unsaid: the run's settings that go with it, and its VAE."""

from pathlib import Path
from typing import Any

from erw.config import Flow, Model, Run, Sample
from erw.errors import CheckpointError, ConfigError
from erw.interop.layouts import TIMES
from erw.plan import PRESETS

# The peers' names for ours.
PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine", "vp": "vp"}
PREDICTIONS = {
    "v": "velocity",
    "velocity": "velocity",
    "noise": "noise",
    "score": "score",
    "x": "x",
}
VAES = {4: "sd-vae-ft-ema", 32: "va-vae"}  # by latent channels
# LightningDiT counts time the other way: timestep_shift 0.3, no guidance below 0.11, 250 points.
LIGHTNING = Sample(
    steps=249, solver="euler", shift=1 / 0.3, interval=(0.0, 0.89), guided_channels=3
)
DIT = Sample(steps=250, solver="ddpm", guided_channels=3)


def known_run(
    path: object, sizes: dict[str, Any], settings: dict[str, Any], layout: str, **told: str | None
) -> Run:
    """What is known of a released model as a run's settings.

    `told` are the `prediction` and `path_type` that the user states, None where not.

    Raises:
        CheckpointError: they are not known, or the file says others.
        ConfigError: they are stated for a DiT, which has its own.
    """
    token = sizes["class_token"]
    model = Model(
        **{k: v for k, v in sizes.items() if k not in ("out_channels", "class_token")},
        class_token="denoised" if token else "none",
        class_dim=token or None,
    )
    sample = LIGHTNING if layout == "lightningdit" else Sample()
    if TIMES[layout] == "steps":
        if any(told.values()):
            raise ConfigError(f"{path} is a DiT, which predicts noise on its chain; say no other")
        flow, sample = Flow(objective="ddpm"), DIT
    else:
        names = {"prediction": PREDICTIONS, "path_type": PATHS}
        found = {k: _known(path, settings, k, names[k], told[k]) for k in names}
        flow = Flow(prediction=found["prediction"], path=found["path_type"])  # type: ignore[arg-type]
    return Run(
        name=Path(str(path)).stem, model=model, flow=flow, plan=PRESETS["sit"], sample=sample
    )


def _known(
    path: object, settings: dict[str, Any], key: str, names: dict[str, str], told: str | None
) -> str:
    """Our name for what the file or the user says; where neither does, SiT's default."""
    said = {
        who: str(value).lower()
        for who, value in (("it", settings.get(key)), ("you", told))
        if value is not None
    }
    for who, value in said.items():
        if value not in names:
            raise CheckpointError(
                f"{path}: {who} say{'s' * (who == 'it')} {key} {value!r}; known: {', '.join(names)}"
            )
    meant = {names[value] for value in said.values()}
    if len(meant) > 1:
        raise CheckpointError(
            f"{path} says {key} {said['it']}, you say {said['you']}; leave {key} out"
        )
    return meant.pop() if meant else next(iter(names.values()))


def unusual(flow: Flow) -> list[str]:
    """What a flow model has other than the velocity on the linear path, in words."""
    said = [f"predicts the {flow.prediction}"] * (flow.prediction != "velocity")
    return said + [f"{flow.path} path"] * (flow.path != "linear")


def vae_of(channels: int) -> str:
    """The VAE whose latents have so many channels; where there is none, words that say so."""
    return VAES.get(channels, f"a VAE of {channels} channels")
