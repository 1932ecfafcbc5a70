"""`erw bench`: how fast a recipe trains here, and where the time of a step goes."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

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
    peers: Annotated[tuple[str, ...], arg(name="peer")] = (),
    out: str | None = None,
) -> None:
    """Time training steps of a recipe on this machine; needs no cache, writes nothing but `--out`.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
        repeat: steps that are timed, of each phase.
        peers: others' released code to run beside it, as repa=CLONE or lightningdit=CLONE, taking
            turns from the same weights. Code of the clone runs in this process.
        out: file for the numbers as JSON.
    """
    if repeat < 1:
        raise ConfigError(f"--repeat is {repeat}: expected at least 1")
    pairs = [word.partition("=") for word in peers]
    if bad := next((name for name, _, path in pairs if not path), None):
        raise ConfigError(f"--peer {bad}: expected NAME=CLONE, as in repa=../REPA")
    clones = {name: Path(path) for name, _, path in pairs}
    run, _, ledger, cache, text = account(run)
    from erw.dist import world
    from erw.io import write_json
    from erw.training.benchmark import MadeUp
    from erw.training.benchmark import bench as timed

    with world() as processes:
        dims = dict.fromkeys(run.data.features, TEACHER_DIM)
        rows = MadeUp(run, dims) if cache is None else cache
        record = timed(run, rows, ledger, steps=repeat, peers=clones)
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
    for name, peer in record["peers"].items():
        median, least, most = peer["times"]
        print(f"{name:<14}{peer['seconds'][0]:.4g} s a step, ours {peer['ours'][0]:.4g} beside it: "
              f"{median:.2f} times as fast ({least:.2f} to {most:.2f})")  # fmt: skip
    if out:
        write_json(Path(out), {"recipe": run.name, **record})
