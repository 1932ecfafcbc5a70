"""`erw bench`: time training steps on this machine."""

from erw.cli.settings import Recipe, Settings
from erw.config import Run
from erw.errors import ConfigError


def bench(recipe: Recipe, run: Settings[Run], *, tiny: bool = False, rounds: int = 10) -> None:
    """Time a recipe's training steps on this machine.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
        rounds: steps of each phase.
    """
    from erw.study.bench import bench as measure

    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; expected 1 or more")
    timings = measure(run, rounds=rounds)
    for t in timings:
        print(
            f"{t.phase:<7} {t.seconds:.4f} s a step ({t.low:.4f} to {t.high:.4f}), "
            f"{t.images} images, {t.images / t.seconds:.1f} images/s, "
            f"{t.speed / 1e9:.1f} GFLOP/s, {t.steps:,} steps"
        )
    hours = sum(t.steps * t.seconds for t in timings) / 3600
    print(f"run     {hours:.2f} h of training steps")
