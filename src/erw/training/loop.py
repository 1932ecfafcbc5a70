"""Training, from the first step to the last. Read it top to bottom.

    result = train(run, "runs/quickstart")     # the same call, made again, goes on where it stopped

Everything random is a function of (seed, step), the data's position is a function of the step, and
a checkpoint has the rest, so a run that was killed ends with the same bits as one that was not.
"""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from erw.config import Run
from erw.data.cache import Batch, Cache
from erw.data.loader import Loader, prefetch
from erw.dist import World, precision, unsynced, world
from erw.ema import Ema, PowerEmas
from erw.errors import CheckpointError, NumericsError
from erw.io import save_tensors, tensor_header, write_json
from erw.log import Metrics, Progress
from erw.models import build_model
from erw.plan import Phase
from erw.rng import Draws
from erw.training import checkpoint, posthoc_ema, run_dir
from erw.training.checkpoint import Position
from erw.training.flops import Ledger
from erw.training.network import build_network, fresh_projectors, resolve
from erw.training.objective import Losses, Objective, build_objective, total
from erw.training.trained import RECIPE, WEIGHTS, Trained, assembled, begin_with

STOPPED = "stopped after step {}; the same command goes on from there"

Callback = Callable[[int, Trained, World], Sequence[dict[str, Any]] | None]
"""(step, EMA model, processes) -> lines for `metrics.jsonl`, each with its `kind`."""


class Result(NamedTuple):
    """What `train` leaves: the run's folder, and the number of steps its weights have taken."""

    out: Path
    step: int


def train(
    run: Run,
    out: str | Path,
    *,
    at: Collection[int] = (),
    evaluate: Callback | None = None,
    objective: Objective | None = None,
    init: Trained | None = None,
    progress: Progress | None = None,
    sink: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Train `run` in the folder `out`, going on from its newest checkpoint if it has one.

    Args:
        run: the settings.
        out: folder for `recipe.json`, `metrics.jsonl`, `checkpoints/` and `ema.safetensors`.
        at: steps after which `evaluate(step, model, world)` is called in every process, with the
            EMA model, and again when the run is resumed at that very step. The lines that it
            returns are written with step and costs. Its time is not counted in `seconds`.
        objective: in place of the one that the settings name.
        init: the model to begin with (`erw.interop.starting_point`); give the same to go on.
        progress: a bar to show progress on, its total in FLOPs; None: one of its own.
        sink: is given every line of `metrics.jsonl` too.

    Raises:
        ConfigError, CacheError, CheckpointError: settings, cache and folder do not fit each other.
        NumericsError: a loss or gradient is not finite; the weights have not moved in that step.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    out = Path(out)
    cache = Cache.open(run.data.cache)
    resolved = resolve(run, cache)
    ledger = Ledger.of(resolved, cache)
    with ExitStack() as stack:
        processes = stack.enter_context(world())
        if processes.first:
            stack.enter_context(run_dir.locked(out))
        interrupted = stack.enter_context(_ctrl_c())
        recipe = processes.broadcast(
            lambda: run_dir.claim(out, run, resolved, cache, ledger, init=init)
        )
        objective = objective or build_objective(resolved)
        trainer = Trainer(resolved, cache, processes, out, recipe, objective)
        newest = checkpoint.paths(trainer.checkpoints)
        parts = trainer.net, trainer.ema, trainer.profiles, trainer.optimizer
        start = checkpoint.load(newest[-1], *parts) if newest else Position(0, 0.0, {})
        if init and not newest:
            trainer.begin_with(init)
        if start.step > run.steps:
            raise CheckpointError(
                f"{out} is at step {start.step} already, past the {run.steps} requested"
            )
        whole, done = ledger.spent(run.steps), ledger.spent(start.step).total
        bar = progress or stack.enter_context(
            Progress(run.name, whole.total, done=done, quiet=not processes.first)
        )
        bar.say(
            f"{run.name}: {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M "
            f"parameters, {run.steps} steps of {run.flow.objective} on {cache!r}\n"
            f"{processes.size} process(es) on {processes.device.type}, {trainer.dtype} "
            f"({trainer.why_dtype})\n{whole.total:.3g} FLOPs: {whole.warmup / whole.total:.0%} "
            f"warm-up, {whole.teacher / whole.total:.1%} teacher"
        )
        if newest:
            bar.say(f"going on from {newest[-1]}")
        elif init:
            bar.say(f"begins with {init.source}: {init.origin}")
        metrics = None
        if processes.first:
            write_json(out / RECIPE, recipe)
            trainer.complete(start.step)
            metrics = Metrics(out / "metrics.jsonl", step=start.step)
        sums, began, paused = Sums(start.sums, processes), time.monotonic() - start.seconds, 0.0

        def seconds() -> float:
            """Of training, over stops and starts."""
            return (paused or time.monotonic()) - began

        def record(line: dict[str, Any], step: int) -> None:
            """Write a line with what the run has cost up to `step`."""
            spent = {f"flops_{k}": v for k, v in ledger.spent(step)._asdict().items()}
            costs = {"step": step, "images": ledger.images(step), **spent}
            line = {"kind": line["kind"], **costs, "seconds": seconds(), **line}
            if metrics:
                metrics.write(line)
                if sink:
                    sink(line)

        def pause(step: int) -> None:
            """Hand the EMA model of `step` to the caller, with the clock stopped."""
            nonlocal began, paused
            paused = time.monotonic()
            if evaluate:
                for line in evaluate(step, trainer.ema_model(step), processes) or ():
                    record(line, step)
            if processes.agree(interrupted.is_set()):
                raise KeyboardInterrupt(STOPPED.format(step))
            began, paused = began + time.monotonic() - paused, 0.0

        if newest and start.step in at:
            pause(start.step)

        for step, batch in trainer.batches(start.step, run.steps):
            phase = resolved.phase(step)
            if 0 < resolved.plan.warmup == step:
                trainer.cross_the_boundary()
            trainer.enter(phase)
            losses, loss, norm = trainer.step(step, phase, batch)
            sums.add({"loss": loss, "grad_norm": norm, **losses})

            done = step + 1
            last = done == run.steps
            # A line never spans the boundary: a mean over two phases' losses says nothing.
            logs = last or done == resolved.plan.warmup or done % run.log.every == 0
            if logs:
                trainer.stop_if_not_finite()
                means = sums.take()
                line = {"kind": "train", "phase": phase.name, "lr": trainer.lr(step, phase)}
                line |= {name: means.pop(name) for name in ("grad_norm", "loss")}
                record(line | {"losses": means, "weights": dict(phase.weights)}, done)
                values = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
                bar.note(f"step {done}/{run.steps}  {phase.name}  {values}")
            bar.update(ledger.spent(done).total - ledger.spent(step).total)

            # Processes may hear Ctrl-C at different steps; they agree where they meet anyway.
            meets = logs or processes.size == 1
            stop = processes.agree(interrupted.is_set()) if meets else False
            if last or stop or done % run.log.checkpoint == 0:
                trainer.stop_if_not_finite()
                position = Position(done, seconds(), sums.state())
                if processes.first:
                    trainer.save(position)
                processes.barrier()
            if processes.first:
                trainer.snapshot(done)
            if done in at:
                pause(done)
            if stop and not last:
                raise KeyboardInterrupt(STOPPED.format(done))
        trainer.synced = trainer.net  # lets go of the group of processes, which ends next
    return Result(out, run.steps)


class Trainer:
    """Network, averages and optimiser of a run in one process, and where its batches come from."""

    def __init__(
        self,
        run: Run,
        cache: Cache,
        processes: World,
        out: Path,
        recipe: dict[str, Any],
        objective: Objective,
    ) -> None:
        self.run, self.processes, self.out, self.recipe = run, processes, out, recipe
        self.objective, self.device = objective, processes.device
        self.checkpoints = out / "checkpoints"
        self.dtype, self.why_dtype = precision(run.optim.precision, self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        # glibc holds on to blocks up to the largest one that was freed, at most 32 MB. Without this
        # block each step would hand its activations back and fault them in again.
        torch.empty(2**25 - 2**14, dtype=torch.uint8)
        self.cache, self.dims = cache, {name: spec.dim for name, spec in cache.features.items()}
        self.net = build_network(run, self.dims).to(self.device)
        self.ema = Ema(self.net, decay=run.optim.ema)
        self.profiles = PowerEmas(self.model, run.optim.ema_profiles)
        options = {key: getattr(run.optim, key) for key in ("lr", "betas", "weight_decay", "eps")}
        # It leaves alone the parameters that have no gradient in a phase.
        self.optimizer = torch.optim.AdamW(self.net.parameters(), fused=True, **options)
        loader = partial(
            Loader, cache, seed=run.seed, token=run.data.class_token or "",
            stored=self.device.type != "cpu",
        )  # fmt: skip
        self.loader, self.without_features = loader(features=run.data.features), loader()
        if run.optim.compile:
            for block in self.model.blocks:
                block.compile()
        self.synced: nn.Module = self.net  # what averages gradients over processes
        self.trains: object = None  # Phase.trains that `enter` has arranged
        # The first step that was not finite, -1 as long as all were. It stays on the device: asking
        # for it every step would make the device wait.
        self.bad_step = torch.full((), -1.0, device=self.device)
        self.found_inf = torch.zeros((), device=self.device)
        # Fused AdamW holds still while this is 1.
        self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]

    @property
    def model(self) -> Any:
        """The backbone."""
        return self.net.model

    def begin_with(self, init: Trained) -> None:
        """Start from other weights than fresh ones; the average starts from them too."""
        begin_with(self.model, init, projectors=self.net.projectors)
        self.ema = Ema(self.net, decay=self.run.optim.ema)

    def enter(self, phase: Phase) -> None:
        """Set requires_grad for this phase and wrap the network for several processes anew."""
        if phase.trains == self.trains:
            return
        self.trains = phase.trains
        self.net.train_only(phase)
        self.optimizer.zero_grad()
        self.synced = self.processes.wrap(self.net)

    def cross_the_boundary(self) -> None:
        """From warm-up to full training: the weights stay; what the plan says starts afresh.

        The average starts again from the weights themselves, as in the release.
        """
        plan = self.run.plan
        if plan.projector == "fresh":
            fresh = fresh_projectors(self.run, self.dims)
            self.net.projectors.load_state_dict(fresh.state_dict())
            for p in self.net.projectors.parameters():
                self.optimizer.state.pop(p, None)
        if plan.optimizer == "fresh":
            self.optimizer.state.clear()
        self.ema = Ema(self.net, decay=self.run.optim.ema)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(step, this process's rows of its batch) for each step, read ahead."""
        steps = range(start, stop)
        return zip(steps, prefetch(self.read, steps, threads=self.cache.threads), strict=True)

    def read(self, step: int) -> Batch:
        """This process's rows of a step's batch; the encoder's features only where needed."""
        plan, size = self.run.plan, self.run.data.batch_size
        count = plan.batch(step, size)
        lo, hi = self.processes.share(count)
        loader = self.loader if plan(step).reads_encoder else self.without_features
        return loader.batch(plan.images(step, size), count, lo=lo, hi=hi)

    def step(self, step: int, phase: Phase, batch: Batch) -> tuple[Losses, Tensor, Tensor]:
        """One optimiser step: losses, their weighted sum and the gradient's norm before clipping,
        all of which stay on the device."""
        batch, rng = batch.to(self.device), self.draws(step)
        parts = self.run.optim.accumulate
        size = len(batch.labels) // parts
        losses: Losses = {}
        for i in range(parts):
            rows = slice(i * size, (i + 1) * size)
            with unsynced(self.synced, last=i == parts - 1):
                part = self.losses(batch.rows(rows), phase, rng.rows(rows.start, rows.stop))
                part["loss"] = total(part, phase)
                (part["loss"] / parts).backward()
            for name, value in part.items():
                value = value.detach() / parts
                losses[name] = losses[name] + value if i else value
        loss = losses.pop("loss")

        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.run.optim.clip, foreach=True)
        self.watch(step, torch.isfinite(norm) & torch.isfinite(loss))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step, phase)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.net)
        if self.profiles.tensors and not phase.warmup:
            self.profiles.update(self.model, step + 1 - self.run.plan.warmup)
        return losses, loss, norm.detach()

    def draws(self, step: int) -> Draws:
        """The step's random numbers for this process's rows."""
        count = self.run.plan.batch(step, self.run.data.batch_size)
        return Draws(self.run.seed, step, *self.processes.share(count), count, self.device)

    def losses(self, batch: Batch, phase: Phase, rng: Draws) -> Losses:
        """The objective under autocast."""
        on = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=on):
            return self.objective(self.synced, batch, phase, rng, ema=self.ask_ema)  # type: ignore[arg-type]

    def ask_ema(self, *args: Any, **kwargs: Any) -> Any:
        """The EMA model, called like the backbone."""
        return functional_call(self.model, self.ema_weights(), args, kwargs)

    def lr(self, step: int, phase: Phase) -> float:
        """The learning rate of a step."""
        optim = self.run.optim
        ramp = min(1.0, (step + 1) / optim.lr_warmup) if optim.lr_warmup else 1.0
        return optim.lr * phase.lr_scale * ramp

    def watch(self, step: int, finite: Tensor) -> None:
        """Hold the optimiser still, in all processes, from the first step that is not finite."""
        bad = self.processes.any((~finite).float())
        first = (bad > 0) & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first, float(step), self.bad_step))
        self.found_inf.copy_((self.bad_step >= 0).float())
        if self.device.type == "cpu":  # asking costs nothing here; on a GPU the log step asks
            self.stop_if_not_finite()

    def stop_if_not_finite(self) -> None:
        """Raise NumericsError if some step was not finite; since then no weight has moved."""
        if (step := int(self.bad_step.item())) < 0:
            return
        saved = checkpoint.paths(self.checkpoints)
        good = f"{saved[-1]} is good" if saved else "there is no checkpoint before it"
        raise NumericsError(
            f"loss or gradient is not finite in step {step + 1}; the weights were not moved by it, "
            f"and {good}: try a lower optim.lr, or optim.precision fp32, in another --out"
        )

    def save(self, position: Position) -> None:
        """Write the checkpoint, then the EMA model alone."""
        parts = self.net, self.ema, self.profiles, self.optimizer
        checkpoint.save(self.checkpoints, *parts, position, keep=self.run.log.keep)
        self.save_weights(position.step)

    def save_weights(self, step: int) -> None:
        """Write the EMA model alone."""
        header = {"step": str(step), "recipe": self.run.name}
        save_tensors(self.out / WEIGHTS, self.ema_weights(), header)

    def ema_weights(self) -> dict[str, Tensor]:
        """The backbone's averaged parameters by name, not copied."""
        own = "model."
        return {k.removeprefix(own): v for k, v in self.ema.tensors.items() if k.startswith(own)}

    def ema_model(self, step: int) -> Trained:
        """The EMA model as a record that can be sampled; it shares the average's memory."""
        with torch.device("meta"):
            net = build_model(self.run.model, outputs=self.run.flow.outputs)
        net.load_state_dict(self.ema_weights(), assign=True)
        for path, buffer in self.model.named_buffers():
            parent, _, name = path.rpartition(".")
            net.get_submodule(parent).register_buffer(name, buffer, persistent=False)
        return assembled(net, self.recipe, self.out, step=step, source=str(self.out))

    def complete(self, step: int) -> None:
        """Write what follows the checkpoint of `step`, if a kill came in between."""
        weights = self.out / WEIGHTS
        if step and (not weights.exists() or tensor_header(weights).get("step") != str(step)):
            self.save_weights(step)
        if step and not checkpoint.path_of(self.out / posthoc_ema.FOLDER, step).exists():
            self.snapshot(step)

    def snapshot(self, step: int) -> None:
        """Write the averages of `optim.ema_profiles`, for `erw ema`, if they are due."""
        t, due = step - self.run.plan.warmup, not step % self.run.log.snapshot
        if (due or step == self.run.steps) and self.profiles.tensors and t > 0:
            self.stop_if_not_finite()
            posthoc_ema.write(self.out, step, t, self.profiles)


class Sums:
    """Running sums of what is logged, by name, on the device, so that no step waits for a number.

    The values of one step are added in one go. Which losses there are changes with the phase, so
    there is one vector of sums for each set of names, with the number of steps last.
    """

    def __init__(self, vectors: dict[str, list[float]], processes: World) -> None:
        self.processes, self.vectors = processes, dict[str, Tensor]()
        for names, values in vectors.items():
            self.vectors[names] = torch.tensor(values, dtype=torch.float64, device=processes.device)

    def add(self, values: Losses) -> None:
        """Add one step."""
        vector = torch.stack([*values.values(), torch.ones_like(values["loss"])]).double()
        names = " ".join(values)
        self.vectors[names] = self.vectors[names] + vector if names in self.vectors else vector

    def state(self) -> dict[str, list[float]]:
        """The vectors by the names in them, averaged over processes."""
        return {names: self.processes.mean(v).tolist() for names, v in self.vectors.items()}

    def take(self) -> dict[str, float]:
        """The means over the steps since the last call, and over processes."""
        sums, counts = dict[str, float](), dict[str, float]()
        for names, (*values, count) in self.state().items():
            for name, value in zip(names.split(), values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + count
        self.vectors.clear()
        return {name: value / counts[name] for name, value in sums.items()}


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that the loop looks at; a second one interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handler(_signal: int, _frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
