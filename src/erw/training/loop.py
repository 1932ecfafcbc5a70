"""Training, from the first step to the last. Read it top to bottom.

    result = train(run, "runs/quickstart")     # the same call, made again, goes on where it stopped

Everything random is a function of (seed, step), the data's position is a function of the step, and
a checkpoint holds the rest, so a run that was killed ends with the same bits as one that was not.
"""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erw.config import Run
from erw.data.cache import Cache
from erw.dist import World, world
from erw.errors import CheckpointError
from erw.io import write_text
from erw.log import Console, Metrics, Reporter, Silent
from erw.training import build, checkpoint, run_dir
from erw.training.checkpoint import Progress
from erw.training.ledger import Ledger
from erw.training.objective import Losses, Step
from erw.training.state import State
from erw.training.trained import RECIPE, Trained, load


class Result(NamedTuple):
    """What `train` leaves: the run's folder, and the steps that its weights have behind them."""

    out: Path
    step: int


def train(
    run: Run,
    out: str | Path,
    *,
    at: Collection[int] = (),
    evaluate: Callable[[int, Trained, World], None] | None = None,
    step_fn: Step | None = None,
    init: Trained | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """Train `run` in the folder `out`, going on from its newest checkpoint if it has one.

    Args:
        run: the settings.
        out: folder for `recipe.json`, `metrics.jsonl`, `checkpoints/` and `ema.safetensors`.
        at: steps after which a checkpoint is written and `evaluate(step, model, world)` is called
            with the EMA model, in every process. Its time is not counted in `seconds`. It is called
            again when the run is resumed at that very step.
        step_fn: another objective in place of `FlowMatching`.
        init: the model to begin with (`erw.interop.starting_point`); give the same to go on.
        reporter: another console.

    Raises:
        ConfigError, CacheError, CheckpointError: settings, cache and folder do not fit each other.
        NumericsError: a loss or gradient is not finite; the weights have not moved in that step.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    out = Path(out)
    cache = Cache.open(run.data.cache)
    resolved = build.resolve(run, cache)
    cost = build.step_cost(resolved, cache)
    ledger = Ledger(resolved.plan, resolved.data.batch_size, cost, cache.encoded)
    with world() as here, run_dir.locked(out) if here.first else nullcontext(), _ctrl_c() as asked:
        recipe = run_dir.claim(out, run, resolved, cache, cost, init=init) if here.first else ""
        console = (reporter or Console(resolved.name)) if here.first else Silent()
        state = State(
            resolved, cache, here, out / "checkpoints", step_fn or build.build_step(resolved)
        )
        _introduce(console, state, ledger)
        for name, asked_for in (("eval.every", run.eval.every), ("log.preview", run.log.preview)):
            if asked_for and evaluate is None:
                console.say(f"{name} is without effect here: give evaluate=, or use erw train")

        start = Progress(0, 0.0, [])
        there = checkpoint.paths(state.saved)
        if there:
            start = state.load(there[-1])
            console.say(f"going on from {there[-1]}")
        elif init:
            state.begin_with(init)
            console.say(f"begins with {init.source}: {init.origin}")
        if start.step > run.steps:
            raise CheckpointError(
                f"{out} has {start.step} steps behind it, more than the {run.steps} asked for"
            )
        if here.first:
            write_text(out / RECIPE, recipe)
            if there:
                state.make_up(start.step)
        metrics = Metrics(out / "metrics.jsonl", step=start.step) if here.first else None
        sums = Sums(start.sums, here)
        clock = Clock(start.seconds)

        def pause(step: int) -> None:
            """Hand the EMA model of `step` to the caller, with the clock stopped."""
            clock.stop()
            if evaluate:
                evaluate(step, load(out, device=here.device), here)
            if here.agree(asked.is_set()):
                raise stopped(step)
            clock.go()

        if there and start.step in at:
            pause(start.step)

        for step, batch in state.batches(start.step, run.steps):
            phase = resolved.plan(step)
            if 0 < resolved.plan.warmup == step:
                state.cross_the_boundary()
            state.enter(phase)
            losses, norm = state.step(step, phase, batch)
            sums.add(losses, norm)

            done = step + 1
            last = done == run.steps
            # A line never spans the boundary: a mean over two phases' losses says nothing.
            logs = last or done == resolved.plan.warmup or done % run.log.every == 0
            if logs:
                state.stop_if_not_finite()
                means = sums.take()
                console.note(f"{phase.name}  flow {means['flow']:.4f}  align {means['align']:.4f}")
                if metrics:
                    spent = ledger.spent(done)
                    line = {"kind": "train", "step": done, "images": ledger.images(done)}
                    line |= {f"flops_{part}": value for part, value in spent._asdict().items()}
                    line |= {"seconds": clock.read(), **means, "align_weight": phase.align_weight}
                    line |= {"lr": state.lr(step, phase), "phase": phase.name}
                    metrics.write(line)
            console.step(done, run.steps, ledger.share(done, run.steps))

            # Processes may hear Ctrl-C at different steps; they agree where they meet anyway.
            stop = here.agree(asked.is_set()) if logs or here.size == 1 else False
            if last or stop or done in at or done % run.log.checkpoint == 0:
                state.stop_if_not_finite()
                means_so_far = here.mean(sums.values).tolist()
                if here.first:
                    state.save(Progress(done, clock.read(), means_so_far))
                here.barrier()
            if here.first and state.snapshot_due(done):
                state.stop_if_not_finite()
                state.snapshot(done)
            if done in at:
                pause(done)
            if stop and not last:
                raise stopped(done)
        state.synced = state.net  # lets go of the group of processes, which ends next
    return Result(out, run.steps)


def stopped(step: int) -> KeyboardInterrupt:
    """What Ctrl-C raises once the checkpoint of `step` is saved."""
    return KeyboardInterrupt(f"stopped after step {step}; the same command goes on from there")


class Sums:
    """Running sums of what is logged, on the device, so that no step waits for a number."""

    names = ("loss", "flow", "align", "grad_norm")

    def __init__(self, values: list[float], here: World) -> None:
        start = values or [0.0] * (len(self.names) + 1)  # the last one counts the steps
        self.values, self.here = torch.tensor(start, dtype=torch.float64, device=here.device), here

    def add(self, losses: Losses, norm: Tensor) -> None:
        """Add one step."""
        self.values += torch.stack([*losses, norm, torch.ones_like(norm)]).double()

    def take(self) -> dict[str, float]:
        """The means over the steps since the last call, and over processes."""
        *sums, count = self.here.mean(self.values).tolist()
        self.values.zero_()
        return {name: value / count for name, value in zip(self.names, sums, strict=True)}


class Clock:
    """Seconds of training, over stops and starts."""

    def __init__(self, seconds: float) -> None:
        self.before, self.began = seconds, time.monotonic()

    def read(self) -> float:
        return self.before + time.monotonic() - self.began

    def stop(self) -> None:
        self.before = self.read()

    def go(self) -> None:
        self.began = time.monotonic()


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that the loop looks at; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(_signal: int, _frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _introduce(console: Reporter, state: State, ledger: Ledger) -> None:
    """Say what was decided, and why."""
    run, here = state.run, state.here
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    spent = ledger.spent(run.steps)
    kind = {"sit": "SiT", "rdm": "RDM"}[run.model.net]
    kind = "DiT" if run.flow.objective == "ddpm" else kind
    console.say(
        f"{run.name}: {kind} of {millions:.1f} M parameters, {run.steps} steps on {state.cache!r}"
    )
    name = str(state.dtype).removeprefix("torch.")
    console.say(f"{here.size} process(es) on {here.device.type}, {name} ({state.why_dtype})")
    if spent.total:
        share = spent.warmup / spent.total
        teacher = spent.teacher / spent.total
        console.say(f"{spent.total:.3g} FLOPs: {share:.0%} warm-up, {teacher:.1%} teacher")
