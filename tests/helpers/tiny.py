"""A small real cache and a small real run on it, for tests of training and of what follows it.

Run as a program, it trains: `python tiny.py CACHE OUT ...`, with options that kill it.
"""

import argparse
import dataclasses
import os
import signal
import time
from pathlib import Path

import torch

from erw.config import Dist, Eval, Flow, Run, Sample
from erw.data.cache import Cache
from erw.data.prepare import prepare
from erw.data.sources.openmoji import OpenMojiSet
from erw.encoders import load_encoder, load_vae
from erw.plan import Align, Routing, stop_at
from erw.recipes import recipe


def tiny_images(count: int = 48) -> OpenMojiSet:
    return OpenMojiSet("train", size=16, count=count)


def tiny_cache(out: Path, *, count: int = 48, rows_per_shard: int = 16) -> Cache:
    """Composed glyphs at 16 x 16 in plain pixels, with the features of EfficientNet-Lite0 (2 x 2)
    and its class token."""
    return prepare(
        tiny_images(count),
        out,
        vae=load_vae("none"),
        encoders=[load_encoder("efficientnet-lite0")],
        image_size=16,
        class_token=True,
        rows_per_shard=rows_per_shard,
    )


def tiny_run(cache: str | Path, **changes: object) -> Run:
    """The debug recipe on that cache, in float32."""
    run = recipe("debug")
    run = run.replace(
        model=dataclasses.replace(run.model, patch=8),
        data=dataclasses.replace(run.data, cache=str(cache)),
        optim=dataclasses.replace(run.optim, precision="fp32"),
    )
    return run.replace(**changes)


def as_dit(run: Run) -> Run:
    """The same run with DiT's objective."""
    return run.replace(flow=Flow(objective="ddpm"), sample=Sample(steps=4, solver="ddim"))


def with_loss(run: Run, loss: str) -> Run:
    """The run with that alignment loss, over ranks; reg: cosine, and a class token is denoised;
    sprint, tread: cosine, and blocks 2 and 3 are routed until step 8; muon: cosine, and that
    optimiser; haste: cosine with targets standardised over the images, and beside it the attention
    of block 2, both until step 8."""
    if loss == "reg":
        return run.replace(model=dataclasses.replace(run.model, class_token="denoised"))
    if loss == "sprint":
        routing = Routing("sprint", (2, 3), 0.25, "grid", until=8, path_drop=0.25)
        return run.replace(
            model=dataclasses.replace(run.model, fusion=(2, 3)),
            plan=dataclasses.replace(run.plan, routing=routing),
        )
    if loss == "tread":
        routing = Routing("tread", (2, 3), until=8)
        return run.replace(plan=dataclasses.replace(run.plan, routing=routing))
    if loss == "haste":
        names = Cache.open(run.data.cache).features
        teacher = next(f"encoder:{name}" for name in names if "#attention" in name)
        features = dataclasses.replace(
            run.plan.align[0], normalize="images", weight=stop_at(2.0, over=4)
        )
        attention = Align(name="attention", block=2, target=teacher, heads=2, projector="none",
                          loss="attention", weight=stop_at(0.5, over=4), phase="full")  # fmt: skip
        return run.replace(plan=dataclasses.replace(run.plan, align=(features, attention)))
    if loss == "muon":
        return run.replace(optim=dataclasses.replace(run.optim, name="muon"))
    return with_term(run, loss="nt_xent_batch" if loss == "nt_xent" else loss)


def with_methods(run: Run) -> Run:
    """The run with the methods after ERW, all at once."""
    terms = (
        Align(name="irepa", block=2, projector="conv", normalize="irepa"),
        Align(name="sra", block=2, target="ema", target_block=3, earlier=0.2, phase="full"),
        Align(name="apart", block=3, target="none", projector="none", loss="dispersive",
              phase="full"),
    )  # fmt: skip
    return run.replace(
        model=dataclasses.replace(run.model, internal=2),
        flow=dataclasses.replace(run.flow, contrastive=0.05),
        plan=dataclasses.replace(run.plan, align=terms, routing=Routing("tread", (3, 4), until=10)),
    )


def with_term(run: Run, **changes: object) -> Run:
    """The run with another alignment term."""
    term = dataclasses.replace(run.plan.align[0], **changes)  # type: ignore[arg-type]
    return run.replace(plan=dataclasses.replace(run.plan, align=(term,)))


def _die_in_rename(number: int) -> None:
    """Kill this process, for real, within the writing of its `number`th checkpoint."""
    rename, seen = os.replace, 0

    def replace(source: object, to: object) -> None:
        nonlocal seen
        seen += "step-" in str(to)
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, to)  # type: ignore[arg-type]

    os.replace = replace  # type: ignore[assignment]


def _die_in_score(number: int) -> None:
    """Kill this process once its `number`th score or validation loss is known, before its line."""
    from erw.training.metrics import Metrics

    write, seen = Metrics.write, 0

    def written(self: Metrics, line: dict[str, object], step: int) -> None:
        nonlocal seen
        seen += line["kind"] != "train"
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, line, step)

    Metrics.write = written  # type: ignore[method-assign]


if __name__ == "__main__":
    from erw.cli.train import watching
    from erw.log import Progress
    from erw.training import train
    from erw.training.loop import Trainer
    from erw.training.network import resolve
    from erw.training.objective import build_objective

    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("out")
    parser.add_argument("--die-after", type=int, help="SIGKILL once this many steps are done")
    parser.add_argument("--nan-after", type=int, help="NaN in the second rank's loss then")
    parser.add_argument("--die-in-checkpoint", type=int, help="SIGKILL while writing this one")
    parser.add_argument("--die-in-score", type=int, help="SIGKILL within this score")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that each step waits")
    parser.add_argument("--stop-after", type=int, help="the second rank hangs, all of it, then")
    parser.add_argument("--no-batch-after", type=int, help="reading hangs in the last rank then")
    parser.add_argument("--patience", type=float, default=1800.0)
    parser.add_argument("--eval-every", type=int, default=0)
    parser.add_argument("--validate-every", type=int, default=0)
    parser.add_argument("--loss", default="cosine", help="see `with_loss`")
    parser.add_argument("--dit", action="store_true", help="DiT's objective")
    parser.add_argument("--methods", action="store_true", help="those after ERW")
    parser.add_argument("--strategy", default="ddp", help="of several processes")
    parser.add_argument("--shard-size", type=int, help="of hsdp")
    parser.add_argument("--recompute", action="store_true", help="blocks, in the backward pass")
    args = parser.parse_args()
    torch.set_num_threads(1)

    if args.die_in_checkpoint:
        _die_in_rename(args.die_in_checkpoint)
    if args.die_in_score:
        _die_in_score(args.die_in_score)
    run = tiny_run(args.cache)
    run = as_dit(run) if args.dit else run
    run = with_methods(run) if args.methods else run
    run = run if args.methods else with_loss(run, args.loss)
    run = run.replace(optim=dataclasses.replace(run.optim, recompute=args.recompute))
    every = args.eval_every
    loss = every or args.validate_every
    run = run.replace(
        eval=Eval(every=every, samples=8, reference_count=16, loss=loss, loss_images=8),
        dist=Dist(args.strategy, args.shard_size, args.patience),
    )
    watched = watching(run, args.out, say=print)
    cache = Cache.open(args.cache)
    learn = build_objective(resolve(run, cache), cache)

    def deadly(net, batch, phase, rng, **options):  # type: ignore[no-untyped-def]
        if rng.step == args.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if rng.step == args.stop_after and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(args.slow)
        losses = learn(net, batch, phase, rng, **options)
        if rng.step == args.nan_after and os.environ["RANK"] == "1":
            return {name: loss * float("nan") for name, loss in losses.items()}
        return losses

    if args.no_batch_after is not None and os.environ.get("RANK", "1") == "1":
        read = Trainer.read

        def hangs(self: Trainer, step: int) -> object:
            time.sleep(1000 * (step == args.no_batch_after))
            return read(self, step)

        Trainer.read = hangs  # type: ignore[method-assign, assignment]
    train(run, args.out, objective=deadly, progress=Progress("", 1, quiet=True), **watched)
