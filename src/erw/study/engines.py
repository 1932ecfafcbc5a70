"""Where the runs of a study are trained: in processes here, by torchrun, or as jobs of Slurm."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erw.errors import ConfigError, ErwError, one_line
from erw.io import write_text
from erw.log import say
from erw.study.rows import Task, finished
from erw.training.signals import collected, stopped
from erw.training.trained import RECIPE


class Job(NamedTuple):
    """A run under way."""

    poll: Callable[[], int | None]  # its exit code; None: not ended
    stop: Callable[[], object]  # has it save, and waits until it has ended


Start = Callable[[str, int], Job]
"""(name of a run, its place among those under way) -> the job that trains it."""


def run_tasks(
    todo: Mapping[str, Task], out: Path, start: Start, *, jobs: int,
    then: Callable[[], object] = lambda: None, tick: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Train what is not finished, `jobs` at a time, each after what it begins with; call `then`
    after each, and `tick` again and again meanwhile.

    Raises ErwError where some failed, once the others have ended; KeyboardInterrupt after Ctrl-C,
    SIGTERM or SIGUSR1 once those under way have saved.
    """
    waiting, failed, running = unfinished(todo, out), dict[str, str](), dict[str, tuple[int, Job]]()
    with collected() as signals:
        try:
            while waiting or running:
                if signals:
                    raise stopped(signals, "with the runs under way")
                unmet = {*waiting, *running, *failed}
                ready = [n for n in waiting if not {todo[n].warmup, todo[n].start} & unmet]
                places = sorted({*range(jobs)} - {place for place, _ in running.values()})
                for place, name in zip(places, ready, strict=False):
                    waiting.remove(name)
                    say(f"{name} begins; {len(running)} others are under way, {len(waiting)} wait")
                    running[name] = place, start(name, place)
                if not running:
                    break  # what waits would begin with what failed
                for name, (_, job) in [*running.items()]:
                    if (code := job.poll()) is not None:
                        del running[name]
                        log = out / "logs" / f"{name}.txt"
                        if code:
                            reason = log.read_text().strip().split("\n")[-1] if log.exists() else ""
                            failed[name] = f"{name} failed ({reason or f'exit code {code}'})"
                        elif todo[name].watched:
                            then()
                tick()
                time.sleep(0.1 * bool(running))
        except BaseException:
            for _, job in running.values():
                job.stop()
            raise
    if failed:
        rest = f"{len(waiting)} others were not begun; logs are in {out / 'logs'}"
        raise ErwError(f"{'; '.join(failed.values())}; {rest}, the same command tries again")


def unfinished(todo: Mapping[str, Task], out: Path) -> list[str]:
    """The runs that are still to be trained, and the warm-ups that those begin with."""
    ordered, needed = list[str](), set[str]()
    for name, task in reversed([*todo.items()]):
        if (name in needed or task.watched) and not finished(task, out):
            ordered.insert(0, name)
            if not (out / task.folder / RECIPE).exists():
                needed.add(task.warmup)
    return ordered


def local(study: str, out: Path, options: Mapping[str, Any]) -> Start:
    """Processes of one thread each, on one GPU each where there are some."""
    count = torch.cuda.device_count()
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")

    def start(name: str, place: int) -> Job:
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[place % count]} if count else {}
        return _process(study, out, name, 0, {"OMP_NUM_THREADS": "1"} | gpu)

    return start


def torchrun(study: str, out: Path, options: Mapping[str, Any]) -> Start:
    """Every run on all GPUs of this machine, or in so many `processes`."""
    size = int(options.get("processes") or torch.cuda.device_count() or 1)
    return lambda name, place: _process(study, out, name, size, {})


def slurm(study: str, out: Path, options: Mapping[str, Any]) -> Start:
    """A job for every run, see `submit`, whose parameters the `options` are."""
    gpus = int(options.get("gpus_per_node", 0))

    def start(name: str, place: int) -> Job:
        words = command(study, out, name, processes=gpus)
        job = submit(words, out / "logs", {"name": f"erw-{study}", **options})

        def poll() -> int | None:
            if job.done() and (error := job.exception()):
                write_text(out / "logs" / f"{name}.txt", str(error))
                return 1
            return 0 if job.done() else None

        return Job(poll, lambda: say(f"job {job.job_id} ({name}) goes on; scancel ends it"))

    return start


ENGINES: dict[str, Callable[[str, Path, Mapping[str, Any]], Start]] = {
    "local": local,
    "torchrun": torchrun,
    "slurm": slurm,
}
"""Name -> (study, its folder, options) -> what starts a run; add your own cluster here."""


def command(study: str, out: Path, name: str, *, processes: int) -> list[str]:
    """The command that trains one run of a study, by torchrun in so many processes (0: without)."""
    words = [*torchrun_words(processes), "study", study]
    return [*words, "--out", str(out), "--only", name]


class Command:
    """A command as the function of a submitit job: a preempted job's command saves and ends before
    the job is queued again."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def __call__(self) -> None:
        """Run it to its end. Raises ErwError with its exit code."""
        self.process = subprocess.Popen(self.words)
        if code := self.process.wait():
            raise ErwError(f"{shlex.join(self.words)} ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Called by submitit ahead of the limit: the same command, to be queued again."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()  # torchrun hands it on
        self.process.wait()
        return DelayedSubmission(Command(self.words))


def submit(words: Sequence[str], logs: Path, options: Mapping[str, Any]) -> Any:
    """The job of submitit that runs a command, with logs in `logs`. One that is preempted or out of
    time is queued again, and the same command goes on.

    Args:
        options: parameters of submitit; `cluster`: slurm, or local for this machine.

    Raises ConfigError without submitit, or for parameters that it has not.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--engine slurm needs submitit: pip install 'erw[slurm]'") from error
    options = {"cluster": "slurm", **options}
    try:
        executor = submitit.AutoExecutor(logs / "%j", cluster=options.pop("cluster"))
        executor.update_parameters(**options)
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"--engine-options: {one_line(error)}") from error
    return executor.submit(Command(words))


def torchrun_words(processes: int) -> list[str]:
    """How Python runs erw: by torchrun in so many processes, or by itself (0)."""
    run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [sys.executable, "-m", *(run if processes else []), "erw"]


def _process(study: str, out: Path, name: str, size: int, env: Mapping[str, str]) -> Job:
    log = out / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        # In a session of its own a Ctrl-C reaches it once, by `stop`; twice, it would not save.
        process = subprocess.Popen(
            command(study, out, name, processes=size), stdout=file, stderr=file,
            env=os.environ | env, start_new_session=True,
        )  # fmt: skip

    def stop() -> None:
        process.send_signal(signal.SIGINT)
        process.wait()

    return Job(process.poll, stop)
