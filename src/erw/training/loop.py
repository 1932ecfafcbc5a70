"""Training, from the first step to the last. Read it top to bottom.

    result = train(run, "runs/quickstart")     # the same call, made again, goes on where it stopped

Everything random is a function of (seed, step), the data's position is a function of the step, and
a checkpoint has the rest, so a run that was killed ends with the same bits as one that was not.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from erw.config import Run
from erw.data.cache import Batch, Cache
from erw.data.loader import Loader, on_device, prefetch
from erw.data.sources import overview
from erw.dist import (
    World,
    as_sharded,
    computing_with,
    one_thread_each,
    precision,
    unsynced,
    whole,
    world,
)
from erw.ema import Ema, PowerEmas
from erw.errors import CheckpointError, NumericsError
from erw.io import lock, tensor_header, write_json
from erw.log import Progress, Sink
from erw.models import build_model
from erw.plan import Phase
from erw.rng import Draws
from erw.training import checkpoint, posthoc_ema
from erw.training.checkpoint import Position, State, Writer
from erw.training.flops import Ledger
from erw.training.metrics import Metrics
from erw.training.network import build_network, fresh_projectors, resolve
from erw.training.objective import Losses, Objective, build_objective, total
from erw.training.optimizer import build_optimizer
from erw.training.run_dir import claim
from erw.training.signals import collected, stopped
from erw.training.trained import RECIPE, WEIGHTS, Trained, assembled, begin_with
from erw.training.watch import READING, SAVING, STEPPING, watching

SPIKE_AFTER = 20
"""Steps of a phase before a loss can be a spike."""

Callback = Callable[[int, Trained, World], Sequence[dict[str, Any]] | None]
"""(step, EMA model, processes) -> lines for `metrics.jsonl`, each with its `kind`."""


class Result(NamedTuple):
    """What `train` leaves: the run's folder, and the number of steps its weights have taken."""

    out: Path
    step: int


def train(
    run: Run, out: str | Path, *, at: Collection[int] = (), evaluate: Callback | None = None,
    objective: Objective | None = None, init: Trained | None = None,
    progress: Progress | None = None, sink: Sink | None = None,
) -> Result:  # fmt: skip
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

    Raises ConfigError, CacheError, CheckpointError: settings, cache and folder do not fit each
    other; NumericsError: a loss or gradient is not finite; the weights have not moved in that step;
    KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    out = Path(out)
    cache = Cache.open(run.data.cache)
    resolved = resolve(run, cache)
    ledger = Ledger.of(resolved, cache)
    with ExitStack() as stack:
        processes = stack.enter_context(world())
        if processes.first and not stack.enter_context(lock(out / ".lock")):
            raise CheckpointError(f"another process is training in {out}: choose another --out")
        if processes.first:
            checkpoint.remove_partial(out / "checkpoints")
        signals = stack.enter_context(collected())
        recipe = processes.broadcast(lambda: claim(out, run, resolved, cache, ledger, init=init))
        objective = objective or build_objective(resolved, cache)
        trainer = Trainer(resolved, cache, processes, out, recipe, objective)
        state = State(trainer.net, trainer.ema, trainer.profiles, trainer.optimizer)
        stack.callback(trainer.written)
        newest, start, damaged = checkpoint.load_newest(trainer.checkpoints, state)
        if start.step > run.steps:
            problem = f"at step {start.step} already, past the {run.steps} requested"
            raise CheckpointError(f"{out} is {problem}")
        if init and not newest:
            trainer.begin_with(init)

        whole, spent = ledger.spent(run.steps), ledger.spent(start.step).total
        bar = progress or stack.enter_context(
            Progress(run.name, whole.total, done=spent, quiet=not processes.first)
        )
        if processes.first:
            bar.say("\n".join(overview(cache)))
            final = run.phase(run.steps - 1)
            if cache.vae["name"] == "none" and final.reads_encoder and not final.warmup:
                bar.say(
                    "warning: REPA to the end hurts in pixel space (arXiv 2603.14366); take a VAE, "
                    "or end it: --plan.align.0.weight.kind stop_at --plan.align.0.weight.over STEPS"
                )
        bar.say(
            f"{run.name}: {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M "
            f"parameters, {run.steps} steps of {run.flow.objective} on {cache!r}\n"
            f"{processes.size} process(es) on {processes.device.type}, {trainer.dtype} "
            f"({trainer.why_dtype})\n{whole.total:.3g} FLOPs: {whole.warmup / whole.total:.0%} "
            f"warm-up, {whole.teacher / whole.total:.1%} teacher"
        )
        for error in damaged:
            bar.say(f"warning: {error}; going on from the checkpoint before it")
        if newest:
            trainer.usual.copy_(torch.tensor(start.usual))
            bar.say(f"going on from {newest}")
        elif init:
            bar.say(f"begins with {init.source}: {init.origin}")
        if processes.first:
            write_json(out / RECIPE, recipe)
        if newest:  # a kill may have come between the checkpoint and these
            weights, profiles = out / WEIGHTS, out / posthoc_ema.FOLDER
            written = lambda: weights.exists() and tensor_header(weights).get("step")  # noqa: E731
            if processes.broadcast(written) != str(start.step):
                trainer.save_weights(start.step)
            if not processes.broadcast(checkpoint.path_of(profiles, start.step).exists):
                trainer.save_profiles(start.step)
        cores = torch.get_num_threads()
        stack.enter_context(trainer.threaded())
        watch = stack.enter_context(watching(processes, run.dist.patience))
        path = out / "metrics.jsonl"
        metrics = Metrics(path, start, ledger=ledger, processes=processes, sink=sink)

        def evaluate_now(step: int) -> None:
            watch.rest()
            with metrics.paused(), computing_with(cores):
                lines = evaluate(step, trainer.ema_model(step), processes) if evaluate else ()
                for line in lines or ():
                    metrics.write(line, step)
                if processes.agree(bool(signals)):
                    raise stopped(signals, f"after step {step}")

        if newest and start.step in at:
            evaluate_now(start.step)

        def recover(step: int) -> None:
            """After a bad step: back to the weights of the newest checkpoint, and on with the next
            batch (`optim.on_nan` rewind); raises NumericsError where that is not wanted."""
            if (bad := trainer.first_bad()) is None:
                return
            back = trainer.rewind(bad, state)
            if back.step <= resolved.plan.warmup <= step and resolved.plan.warmup:
                trainer.cross_the_boundary()
            bar.say(f"step {bad + 1} was bad: back to the weights after step {back.step}")
            metrics.write({"kind": "rewind", "bad": bad + 1, "weights": back.step}, step + 1)

        steps = range(start.step, run.steps)
        batches = prefetch(trainer.read, steps, threads=cache.threads)
        batches = on_device(batches, trainer.device)
        for step in steps:
            watch.at(READING, step + 1)
            batch = next(batches)
            watch.at(STEPPING, step + 1)
            phase = resolved.phase(step)
            if 0 < resolved.plan.warmup == step:
                trainer.cross_the_boundary()
            trainer.enter(phase)
            metrics.add(trainer.step(step, phase, batch))

            done = step + 1
            last = done == run.steps
            if trainer.device.type == "cpu":  # elsewhere asking would make the device wait
                recover(step)
            # A line never spans the boundary: a mean over two phases' losses says nothing.
            logs = last or done == resolved.plan.warmup or done % run.log.every == 0
            if logs:
                recover(step)
                losses = metrics.means()
                if bad := round(losses.pop("bad")):
                    bar.say(f"{bad} bad steps until step {done}, which were left out")
                if not isfinite(losses["loss"]):
                    problem = (
                        f"no step since the last line of the log, up to step {done}, was finite"
                    )
                    raise NumericsError(f"{problem}: try a lower optim.lr, or optim.precision fp32")
                line = {"kind": "train", "phase": phase.name, "lr": trainer.lr(step, phase)}
                line |= {name: losses.pop(name) for name in ("grad_norm", "loss")}
                metrics.write(line | {"losses": losses, "weights": dict(phase.weights)}, done)
                values = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
                bar.note(f"step {done}/{run.steps}  {phase.name}  {values}")
            bar.update(ledger.spent(done).total - ledger.spent(step).total)

            # Processes may hear Ctrl-C at different steps; they agree where they meet anyway.
            meets = logs or processes.size == 1
            stop = processes.agree(bool(signals)) if meets else False
            if last or stop or done % run.log.checkpoint == 0:
                recover(step)
                watch.at(SAVING, done)
                mean, count = trainer.usual.tolist()
                position = Position(done, metrics.seconds, metrics.state(), (mean, count))
                trainer.written()
                if trainer.saver or processes.first:
                    to, keep = trainer.saver or trainer.writer, run.log.keep
                    checkpoint.save(trainer.checkpoints, state, position, keep=keep, to=to)
                trainer.save_weights(done)
                if last or stop:
                    trainer.written()  # torchrun ends whoever is left when others have ended
                processes.barrier()
            trainer.save_profiles(done)
            if done in at:
                evaluate_now(done)
            if stop and not last:
                raise stopped(signals, f"after step {done}")
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
        net = build_network(run, self.dims)
        sharded = processes.size > 1 and run.dist.strategy != "ddp"
        self.net = net if sharded else net.to(self.device)  # sharding moves it, block by block
        self.ema = Ema(self.net, decay=run.optim.ema)
        self.writer, self.saver = Writer(), cast(Any, None)  # a saver where the run is sharded
        if sharded:
            from erw.sharding import mesh_of, shard  # which imports much

            mesh, self.saver = mesh_of(processes, run.dist), checkpoint.sharded().Saver()
            shard(self.net, mesh, dtype=self.dtype, trains=True)
            shard(self.ema.module, mesh, dtype=self.dtype, trains=False)
            self.ema.tensors = dict(self.ema.module.named_parameters())
        self.model = cast(Any, self.net.model)
        self.averaged: Any = self.ema.module.model
        self.profiles = PowerEmas(self.model, run.optim.ema_profiles)
        loader = partial(
            Loader, cache, seed=run.seed, token=run.data.class_token or "",
            stored=self.device.type != "cpu",
        )  # fmt: skip
        self.loader, self.without_features = loader(features=run.data.features), loader()
        for block in self.model.blocks:  # not the hooks around it, which gather shards
            if run.optim.compile:
                block.forward = torch.compile(block.forward)
            if run.optim.recompute:
                again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                block.forward = partial(recomputed, block.forward, **again)
        self.synced: Any = self.net  # what averages gradients over processes
        self.trains: object = None  # Phase.trains that `enter` has arranged
        # The first bad step, -1 as long as there is none. It stays on the device: asking for it
        # every step would make the device wait. So do the usual loss and the steps it is a mean of.
        self.bad_step = torch.full((), -1.0, device=self.device)
        self.usual = torch.zeros(2, device=self.device)
        self.threads: ThreadPoolExecutor | None = None
        self.rewound: list[Path] = []  # the checkpoints gone back to
        self.found_inf = torch.zeros((), device=self.device)  # the optimiser holds still while 1
        self.optimizer = build_optimizer(self.net, run.optim, self.found_inf)

    def begin_with(self, init: Trained) -> None:
        """Start from other weights than fresh ones; the average starts from them too."""
        begin_with(self.model, init, projectors=self.net.projectors)
        self.ema.restart(self.net)

    def enter(self, phase: Phase) -> None:
        """Set requires_grad for this phase and wrap the network for several processes anew."""
        if phase.trains == self.trains:
            return
        self.trains = phase.trains
        self.net.train_only(phase)
        self.optimizer.zero_grad()
        self.synced = self.net if self.saver else self.processes.wrap(self.net)

    def cross_the_boundary(self) -> None:
        """From warm-up to full training: the weights stay; what the plan says starts afresh.

        The average starts again from the weights themselves, as in the release.
        """
        plan = self.run.plan
        if plan.projector == "fresh":
            fresh = fresh_projectors(self.run, self.dims)
            with torch.no_grad():
                for p, q in zip(self.net.projectors.parameters(), fresh.parameters(), strict=True):
                    p.copy_(as_sharded(q, p))
                    self.optimizer.state.pop(p, None)
        if plan.optimizer == "fresh":
            self.optimizer.state.clear()
        self.ema.restart(self.net)

    def read(self, step: int) -> Batch:
        """This process's rows of a step's batch; the encoder's features only where needed."""
        plan, size = self.run.plan, self.run.data.batch_size
        first, (lo, hi) = plan.images(step, size), self.processes.share(plan.batch(step, size))
        loader = self.loader if plan(step).reads_encoder else self.without_features
        batch = loader.batch(range(first + lo, first + hi))
        return batch.pinned() if self.device.type == "cuda" else batch

    def step(self, step: int, phase: Phase, batch: Batch) -> Losses:
        """One optimiser step, which a bad one is not: there nothing moves.

        Returns the losses by name, their weighted sum `loss`, `grad_norm`, the gradient's norm
        before clipping, and `bad`; all stay on the device.
        """
        count = self.run.plan.batch(step, self.run.data.batch_size)
        rng = Draws(self.run.seed, step, *self.processes.share(count), self.device)
        values: Losses = {}
        for losses in self.backward(phase, batch.to(self.device), rng):
            for name, value in losses.items():
                value = value.detach() / self.run.optim.accumulate
                values[name] = values[name] + value if name in values else value

        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.run.optim.clip, foreach=True)
        norm = whole(norm)
        bad = self.watch(step, phase, values["loss"], norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step, phase)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.net)
        if self.profiles.tensors and not phase.warmup:
            self.profiles.update(self.model, step + 1 - self.run.plan.warmup)
        return {"loss": values.pop("loss"), "grad_norm": norm.detach(), **values, "bad": bad}

    def backward(self, phase: Phase, batch: Batch, rng: Draws) -> Iterator[Losses]:
        """Add up the gradients of a batch, micro-batch by micro-batch, giving the losses of each.

        Where there are `threads` each takes a micro-batch; gradients are added in the same order.
        """
        parts = self.run.optim.accumulate
        size = len(batch.labels) // parts

        def losses_of(i: int) -> Losses:
            lo, hi = i * size, (i + 1) * size
            rows, draws = batch.rows(slice(lo, hi)), rng.rows(lo, hi)
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                losses = self.objective(self.synced, rows, phase, draws, ema=self.averaged)
            return losses | {"loss": total(losses, phase)}

        if self.threads is None:
            for i in range(parts):
                with unsynced(self.synced, last=i == parts - 1):
                    losses = losses_of(i)
                    (losses["loss"] / parts).backward()
                yield losses
            return
        trained = [p for p in self.net.parameters() if p.requires_grad]

        def alone(i: int) -> tuple[Losses, Sequence[Tensor | None]]:
            losses = losses_of(i)
            return losses, torch.autograd.grad(losses["loss"] / parts, trained, allow_unused=True)

        for losses, grads in self.threads.map(alone, range(parts)):
            for p, grad in zip(trained, grads, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad.add_(grad)
            yield losses

    @contextmanager
    def threaded(self) -> Iterator[None]:
        """Within it the micro-batches of one process on a CPU are taken by a thread each, which is
        faster than all threads on one, and gives the same bits however many there are."""
        optim, cpu = self.run.optim, self.device.type == "cpu"
        if self.processes.size > 1 or not cpu or optim.accumulate == 1 or optim.compile:
            yield
            return
        with one_thread_each() as self.threads:
            yield
        self.threads = None

    def lr(self, step: int, phase: Phase) -> float:
        """The learning rate of a step."""
        optim = self.run.optim
        return optim.lr * phase.lr_scale * optim.lr_factor(step, self.run.steps)

    def watch(self, step: int, phase: Phase, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step is bad, in all processes: a loss or gradient is not finite, or the loss is
        above `optim.spike` times the mean of the phase's last hundred. The optimiser holds still in
        it and, unless bad steps are skipped, from the first one on."""
        optim, new = self.run.optim, self.run.plan.warmup == step
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        if optim.spike:
            mean, count = self.usual * (not new)
            loss = self.processes.mean(loss.float())
            bad = bad | ((count >= SPIKE_AFTER) & (loss > optim.spike * mean))
            count = (count + 1).clamp(max=100)
            usual = torch.stack([mean + (loss - mean) / count, count])
            self.usual.copy_(torch.where(bad, self.usual * (not new), usual))
        bad = self.processes.any(bad.float())
        if optim.on_nan == "skip":
            self.found_inf.copy_(bad)
            return bad
        first = (bad > 0) & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first, float(step), self.bad_step))
        self.found_inf.copy_((self.bad_step >= 0).float())
        return self.found_inf.clone()

    def first_bad(self) -> int | None:
        """The first bad step since the last look; since then no weight has moved."""
        return None if (step := int(self.bad_step.item())) < 0 else step

    def rewind(self, bad: int, state: State) -> Position:
        """Go back to the newest checkpoint. Raises NumericsError if `optim.on_nan` is stop, if
        there is none, or if that did not help three times."""
        self.written()
        self.processes.barrier()  # all find the same checkpoints
        saved = checkpoint.paths(self.checkpoints)
        if self.run.optim.on_nan == "rewind" and saved and self.rewound.count(saved[-1]) < 3:
            self.rewound.append(saved[-1])
            self.bad_step.fill_(-1.0)
            self.found_inf.zero_()
            return checkpoint.load(saved[-1], state)
        good = f"{saved[-1]} is good" if saved else "there is no checkpoint before it"
        problem = "is not finite" + " or a spike" * bool(self.run.optim.spike)
        raise NumericsError(
            f"loss or gradient {problem} in step {bad + 1}; the weights were not moved by it, and "
            f"{good}: try a lower optim.lr, or optim.precision fp32, in another --out, or go on "
            "with --optim.on-nan skip or rewind"
        )

    def save_weights(self, step: int) -> None:
        """Begin to write the EMA model alone."""
        header = {"step": str(step), "recipe": self.run.name}
        weights = self.processes.collected(dict(self.averaged.named_parameters()))
        if self.processes.first:
            self.writer.begin(self.out / WEIGHTS, weights, header)

    def written(self) -> None:
        """Wait until all that was begun is written. Raises CheckpointError where it was not."""
        self.writer.wait()
        if self.saver:
            self.saver.wait()

    def save_profiles(self, step: int) -> None:
        """Write the averages of `optim.ema_profiles`, for `erw ema`, if they are due."""
        t, due = step - self.run.plan.warmup, not step % self.run.log.snapshot
        if (due or step == self.run.steps) and self.profiles.tensors and t > 0:
            tensors = {k: self.processes.collected(v) for k, v in self.profiles.tensors.items()}
            if self.processes.first:
                posthoc_ema.write(self.out, step, t, tensors)

    def ema_model(self, step: int) -> Trained:
        """The EMA model as a record that can be sampled; it shares the average's memory, unless the
        run is sharded."""
        net = self.averaged
        if self.saver:  # processes draw different numbers of images, so each needs all weights
            net = build_model(self.run.model, outputs=self.run.flow.outputs).to(self.device)
            with torch.no_grad():
                for p, q in zip(net.parameters(), self.averaged.parameters(), strict=True):
                    p.copy_(whole(q))
        return assembled(net, self.recipe, self.out, step=step, source=str(self.out))
