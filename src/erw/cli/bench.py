"""`erw bench`: how fast a recipe trains here, and where the time of a step goes."""

from pathlib import Path

from erw.cli.cost import TEACHER_DIM, account
from erw.cli.settings import Recipe, Settings
from erw.config import Run
from erw.errors import ConfigError


def bench(
    recipe: Recipe,
    run: Settings[Run],
    *,
    tiny: bool = False,
    repeat: int = 10,
    out: str | None = None,
) -> None:
    """Time training steps of a recipe on this machine; needs no cache, writes nothing but `--out`.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
        repeat: steps that are timed, of each phase.
        out: file for the numbers as JSON.
    """
    if repeat < 1:
        raise ConfigError(f"--repeat is {repeat}: expected at least 1")
    run, _, ledger, cache, text = account(run)
    from erw.dist import world
    from erw.io import write_json
    from erw.training.benchmark import MadeUp
    from erw.training.benchmark import bench as timed

    with world() as processes:
        dims = dict.fromkeys(run.data.features, TEACHER_DIM)
        rows = MadeUp(run, dims) if cache is None else cache
        record = timed(run, rows, ledger, steps=repeat)
        if not processes.first:
            return
    memory, peak = record["memory"] / 2**30, record["peak"]
    print(f"{run.name}: {text.splitlines()[0]}\n{record['device']}, {record['processes']} "
          f"process(es), {record['dtype']}: products at {peak / 1e12:.3g} TFLOP/s at most, "
          f"{memory:.1f} GiB used at most")  # fmt: skip
    for name, phase in record["phases"].items():
        median, least, most = phase["seconds"]
        parts = ", ".join(f"{part} {seconds / sum(phase['parts'].values()):.0%}"
                          for part, seconds in phase["parts"].items())  # fmt: skip
        print(f"{name:<8}{median:.4g} s a step ({least:.4g} to {most:.4g}), "
              f"{phase['images']:,.1f} images/s, {phase['utilisation']:.1%} of the products' peak\n"
              f"        {parts}")  # fmt: skip
    if out:
        write_json(Path(out), {"recipe": run.name, **record})
