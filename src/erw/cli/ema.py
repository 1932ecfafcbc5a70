"""`erw ema`: averages of a run's weights with any power-function profile, after the training."""

from pathlib import Path

from erw.cli.settings import RunDir, required
from erw.errors import ConfigError


def ema(
    run: RunDir, *, sigma_rel: tuple[float, ...], step: int | None = None, out: str | None = None
) -> None:
    """Mix any power-function average of EDM2 from those that the run stored.

    Every verb that takes a run takes the file that this writes.

    Args:
        run: the folder of a run with optim.ema_profiles.
        sigma_rel: widths relative to the training's length; above 0, at most 0.2887.
        step: of a snapshot; none: the last.
        out: a .safetensors file; a folder for several widths; none: only say how well they mix.
    """
    if out and (Path(out).suffix == ".safetensors") != (len(sigma_rel) == 1):
        expected = "a .safetensors file for one width, a folder for several"
        raise ConfigError(f"--out {out}: expected {expected}")
    required(run)
    from erw.training import posthoc_ema

    for width in sigma_rel:
        average = posthoc_ema.reconstruct(run, width, step=step)
        error, count = average.mix.error, len(average.stored)
        quality = f"profile off by {error:.2%}" if error else "itself stored"
        print(f"sigma_rel {width:g} after step {average.step}: of {count} stored, {quality}")
        if out:
            file = Path(out) if len(sigma_rel) == 1 else Path(out) / f"sigma-{width}.safetensors"
            posthoc_ema.save(average, run, width, file)
            print(file)
