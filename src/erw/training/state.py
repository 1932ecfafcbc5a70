"""What training moves: network, average, optimiser; and what one optimiser step does to them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from erw.align import Aligned
from erw.config import Optim, Run
from erw.data.cache import Batch, Cache
from erw.data.loader import Loader, prefetch
from erw.dist import World, precision, unsynced
from erw.ema import Ema, PowerEmas
from erw.errors import NumericsError
from erw.models import SiT
from erw.plan import Phase
from erw.rng import Draws
from erw.training import build, checkpoint, posthoc_ema
from erw.training.checkpoint import Progress
from erw.training.init import begin_with
from erw.training.objective import Losses, Step
from erw.training.trained import WEIGHTS, Trained


class State:
    """Network, EMA and optimiser of a run in one process, and where its batches come from.

    Args:
        run: resolved settings.
        saved: folder of the checkpoints.
        step_fn: the objective.
    """

    def __init__(self, run: Run, cache: Cache, here: World, saved: Path, step_fn: Step) -> None:
        self.run, self.cache, self.here, self.saved, self.step_fn = run, cache, here, saved, step_fn
        self.dtype, self.why_dtype = precision(run.optim.precision, here.device)
        if here.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.net: Aligned = build.build_net(run, cache).to(here.device)
        self.ema = Ema(self.net, decay=run.optim.ema)
        self.profiles = PowerEmas(self.model, run.optim.ema_profiles)
        self.optimizer = make_optimizer(self.net, run.optim)
        order = partial(
            Loader, cache, seed=run.seed, token=run.data.class_token or "",
            stored=here.device.type != "cpu",
        )  # fmt: skip
        self.loader, self.without_features = order(features=run.data.features), order()
        if run.optim.compile:
            for block in self.model.blocks:
                block.compile()
        self.synced: nn.Module = self.net  # what averages gradients over processes
        self.trains: object = None  # Phase.trains that `enter` has arranged
        # The first step that was not finite, -1 as long as all were. It stays on the device: asking
        # for it every step would make the device wait.
        self.bad_step = torch.full((), -1.0, device=here.device)
        self.found_inf = torch.zeros((), device=here.device)
        # Fused AdamW holds still while this is 1.
        self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]

    @property
    def model(self) -> SiT:
        return self.net.model  # type: ignore[return-value]

    def begin_with(self, init: Trained) -> None:
        """Start from other weights than fresh ones; the average starts from them too."""
        begin_with(self.model, init, projectors=self.net.projectors)
        self.ema = Ema(self.net, decay=self.run.optim.ema)

    def enter(self, phase: Phase) -> None:
        """Let train what the phase trains and nothing else; processes average just that."""
        if phase.trains == self.trains:
            return
        self.trains = phase.trains
        self.net.requires_grad_(True)
        if phase.stop:
            self.model.blocks[phase.at :].requires_grad_(False)
            self.model.final_layer.requires_grad_(False)
        self.net.projectors.requires_grad_(phase.align_weight > 0)
        self.optimizer.zero_grad()
        self.synced = self.here.wrap(self.net)

    def cross_the_boundary(self) -> None:
        """From warm-up to full training: the weights stay; what the plan says starts afresh.

        The average starts again from the weights themselves, as in the release.
        """
        plan = self.run.plan
        if plan.projector == "fresh":
            fresh = build.fresh_projectors(self.run, self.cache)
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
        """This process's rows of the batch of a step; the teacher's features only where aligned."""
        run = self.run
        first = run.plan.images(step, run.data.batch_size)
        total = run.plan.batch(step, run.data.batch_size)
        lo, hi = self.here.share(total)
        loader = self.loader if run.plan(step).align_weight else self.without_features
        return loader.batch(first, total, lo=lo, hi=hi)

    def step(self, step: int, phase: Phase, batch: Batch) -> tuple[Losses, Tensor]:
        """One optimiser step. Losses and gradient norm (before clipping) stay on the device."""
        batch, draws = batch.to(self.here.device), self.draws(step)
        parts = self.run.optim.accumulate
        size = len(batch.labels) // parts
        losses = torch.zeros(3, device=self.here.device)
        for i in range(parts):
            rows = slice(i * size, (i + 1) * size)
            with unsynced(self.synced, last=i == parts - 1):
                part = self.losses(batch.rows(rows), phase, draws.rows(rows.start, rows.stop))
                (part.total / parts).backward()
            losses += torch.stack(part).detach() / parts

        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.run.optim.clip, foreach=True)
        self.watch(step, torch.isfinite(norm) & torch.isfinite(losses).all())
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step, phase)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.net)
        if self.profiles.tensors and not phase.warmup:
            self.profiles.update(self.model, step + 1 - self.run.plan.warmup)
        return Losses(*losses), norm.detach()

    def draws(self, step: int) -> Draws:
        """The step's random numbers for this process's rows."""
        total = self.run.plan.batch(step, self.run.data.batch_size)
        return Draws(self.run.seed, step, *self.here.share(total), total, self.here.device)

    def losses(self, batch: Batch, phase: Phase, draws: Draws) -> Losses:
        """The objective under autocast."""
        on = self.dtype != torch.float32
        with torch.autocast(self.here.device.type, dtype=self.dtype, enabled=on):
            return self.step_fn(self.synced, batch, phase, draws)

    def lr(self, step: int, phase: Phase) -> float:
        """The learning rate of a step."""
        optim = self.run.optim
        ramp = min(1.0, (step + 1) / optim.lr_warmup) if optim.lr_warmup else 1.0
        return optim.lr * phase.lr_scale * ramp

    def watch(self, step: int, finite: Tensor) -> None:
        """Hold the optimiser still, in all processes, from the first step that is not finite."""
        bad = self.here.any((~finite).float())
        self.bad_step.copy_(
            torch.where((bad > 0) & (self.bad_step < 0), float(step), self.bad_step)
        )
        self.found_inf.copy_((self.bad_step >= 0).float())
        if (
            self.here.device.type == "cpu"
        ):  # looking costs nothing here; on a GPU the log step looks
            self.stop_if_not_finite()

    def stop_if_not_finite(self) -> None:
        """Raise NumericsError if some step was not finite; since then no weight has moved."""
        if (step := int(self.bad_step.item())) < 0:
            return
        there = checkpoint.paths(self.saved)
        good = f"{there[-1]} is good" if there else "there is no checkpoint before it"
        raise NumericsError(
            f"loss or gradient is not finite in step {step + 1}; the weights were not moved by it, "
            f"and {good}: try a lower optim.lr, or optim.precision fp32, in another --out"
        )

    def save(self, progress: Progress) -> None:
        """Write the checkpoint, then the EMA model alone."""
        checkpoint.save(
            self.saved,
            self.net,
            self.ema,
            self.profiles,
            self.optimizer,
            progress,
            keep=self.run.log.keep,
        )
        self.save_weights(progress.step)

    def save_weights(self, step: int) -> None:
        """Write the EMA model alone."""
        weights = {
            name.removeprefix("model."): value
            for name, value in self.ema.tensors.items()
            if name.startswith("model.")
        }
        header = {"step": str(step), "recipe": self.run.name}
        checkpoint.write_beside(weights, self.saved.parent / WEIGHTS, header=header)

    def make_up(self, step: int) -> None:
        """Write what comes after the checkpoint of `step`, if a kill came in between."""
        weights = self.saved.parent / WEIGHTS
        if not weights.exists() or checkpoint.header(weights).get("step") != str(step):
            self.save_weights(step)
        averages = checkpoint.path_of(self.saved.parent / posthoc_ema.FOLDER, step)
        if self.snapshot_due(step) and not averages.exists():
            self.snapshot(step)

    def snapshot_due(self, step: int) -> bool:
        """Whether `snapshot` is to be called after `step`."""
        return step == self.run.steps or step % self.run.log.snapshot == 0

    def load(self, path: Path) -> Progress:
        """Go back to a checkpoint."""
        return checkpoint.load(path, self.net, self.ema, self.profiles, self.optimizer)

    def snapshot(self, step: int) -> None:
        """Write the averages of `optim.ema_profiles` after `step`, for `erw ema`."""
        t = step - self.run.plan.warmup
        if self.profiles.tensors and t > 0:
            posthoc_ema.write(self.saved.parent, step, t, self.profiles)


def make_optimizer(net: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW, fused. It leaves alone the parameters that have no gradient in a phase."""
    return torch.optim.AdamW(
        net.parameters(),
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        eps=optim.eps,
        fused=True,
    )
