"""Images per second: erw's sampling next to REPA's generate.py and diffusers' DiTPipeline.

    python benchmarks/sample.py --peer repa=PATH_TO_CLONE      # SiT-B/2 and DiT-B/2, 4 steps of 4

The same random weights for all, written in each peer's own layout: SiT-B/2 for REPA and erw (Euler,
classifier-free guidance within an interval), DiT-B/2 for diffusers and erw (DDIM, guidance). Every
contender starts from noise and ends with decoded uint8 images; files are not written. The VAE is a
small one, the same for all, so that the sampler is what is timed. Contenders live in processes of
their own and take turns; ratios are taken within a round.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erw.align import Projector
from erw.config import SIZES
from erw.interop.layouts import positions, to_diffusers
from erw.models import SiT
from record import add_peer, begun, machine, summary, write
from turns import Contender, table

PEERS = {
    "erw": "repa",
    "erw compiled": "repa",
    "erw dit": "diffusers",
    "erw dit compiled": "diffusers",
}


def weights(folder: Path, sizes: dict[str, int]) -> None:
    """sit.pt (REPA's), dit.pt (DiT's), dit-diffusers.pt and vae/: random, no layer zero."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    for name, outputs in (("sit", 1), ("dit", 2)):
        net = SiT(**sizes, input_size=32, channels=4, num_classes=1000, out_channels=4 * outputs)
        for p in net.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)
        state = {key: p.detach() for key, p in net.named_parameters()}
        head = Projector(sizes["width"], 2048, 768)
        heads = {f"projectors.0.{key}": p.detach() for key, p in head.named_parameters()}
        released = positions(net) | state
        if name == "sit":
            torch.save({"ema": released | heads}, folder / "sit.pt")
        else:
            torch.save(released, folder / "dit.pt")
            torch.save(to_diffusers(state), folder / "dit-diffusers.pt")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")  # fmt: skip


def specs(args: argparse.Namespace, folder: Path, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """What takes part."""
    common = {
        "model": args.model,
        "sizes": sizes,
        "batch": args.batch,
        "steps": args.steps,
        "guidance": args.guidance,
        "high": args.high,
        "threads": args.threads,
        "folder": str(folder),
        "layout": "repa",
        "compile": False,
    }
    contenders = [{"name": "erw", "title": "erw"}]
    if args.peer:
        contenders.insert(0, {"name": "repa", "title": "repa", "path": str(args.peer)})
    compiled = {"name": "erw", "compile": True}
    contenders += [
        compiled | {"title": "erw compiled"},
        {"name": "diffusers", "title": "diffusers"},
        {"name": "erw", "title": "erw dit", "layout": "dit"},
        compiled | {"title": "erw dit compiled", "layout": "dit"},
    ]
    return [common | spec for spec in contenders if not args.only or spec["title"] in args.only]


def measure(args: argparse.Namespace, all_specs: list[dict[str, Any]]) -> dict[Any, list[float]]:
    """Seconds of a batch by (precision, contender, clock), one median for each round."""
    contenders = [Contender(spec, script="samplers.py") for spec in all_specs]
    times: dict[Any, list[float]] = {}
    try:
        for precision in args.precision:
            for contender in contenders:
                contender.ask({"precision": precision, "turns": 1})
            for number in range(args.rounds):
                for contender in contenders:
                    answer = contender.ask({"precision": precision, "turns": args.turns})
                    for clock in ("wall", "cpu"):
                        key = (precision, contender.name, clock)
                        times.setdefault(key, []).append(statistics.median(answer[clock]))
                    turn = f"round {number + 1} {precision} {contender.name}"
                    wall = times[precision, contender.name, "wall"][-1]
                    print(f"{turn:<36} {wall:8.3f} s", file=sys.stderr)
    finally:
        for contender in contenders:
            contender.close()
    return times


def results(times: dict[Any, list[float]], batch: int) -> list[dict[str, Any]]:
    """One row per (precision, contender), with ratios against its peer by both clocks."""
    rows = []
    for precision, name in dict.fromkeys(key[:2] for key in times):
        wall, cpu = (times[precision, name, clock] for clock in ("wall", "cpu"))
        row: dict[str, Any] = {"precision": precision, "contender": name}
        row["images/s"] = summary([batch / s for s in wall])
        row["CPU seconds an image"] = summary([s / batch for s in cpu])
        for against in dict.fromkeys([precision, "fp32"]):
            peer = PEERS.get(name, "")
            for clock, mine in (("wall", wall), ("cpu", cpu)):
                if theirs := times.get((against, peer, clock)):
                    pairs = [a / b for a, b in zip(theirs, mine, strict=True)]
                    row[f"times peer's {against}, {clock} clock"] = summary(pairs)
        rows.append(row)
    return rows


def agreement(folder: Path) -> dict[str, float]:
    """Relative L2 distance of our float32 latents from REPA's, of the same noise and weights."""
    distances = {}
    theirs = folder / "repa-fp32.npy"
    for mine in ("erw-fp32.npy", "erw-bf16.npy", "erw-compiled-bf16.npy"):
        if theirs.exists() and (folder / mine).exists():
            a, b = np.load(folder / mine), np.load(theirs)
            distances[mine.removesuffix(".npy")] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_peer(parser)
    parser.add_argument("--model", default="B/2", help="size and patch: S, B, L, XL / 2, 4, 8")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of Euler and of DDIM")
    parser.add_argument("--guidance", type=float, default=1.8)
    parser.add_argument("--high", type=float, default=0.7, help="guidance up to here (REPA: 0.7)")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"]
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help=f"of repa, diffusers, {', '.join(PEERS)}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=1, help="batches a turn; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()

    size, patch = args.model.split("/")
    sizes = dict(zip(("depth", "width", "heads"), SIZES[size], strict=True)) | {"patch": int(patch)}
    record = begun(
        "images per second of sampling, median over rounds (min to max)",
        packages=("torch", "diffusers"),
        clone=args.peer, out=args.out, threads=args.threads,
    )  # fmt: skip
    record |= {
        "model": f"SiT-{args.model} and DiT-{args.model}, latents 4 x 32 x 32, batch {args.batch}, "
        f"{args.steps} steps, guidance {args.guidance} (SiT: within 0 to {args.high})",
        "stand-ins": "in REPA's process: three timm layers; bf16 is autocast around its sampler, "
        "which its generate.py has no option for",
    }
    with tempfile.TemporaryDirectory() as folder:
        weights(Path(folder), sizes)
        record["rows"] = results(measure(args, specs(args, Path(folder), sizes)), args.batch)
        record["distance from REPA's float32 latents"] = agreement(Path(folder))
    record["machine"]["load_after"] = machine().get("load_before")
    for key, value in record.items():
        if key != "rows":
            print(f"{key}: {value}")
    print(f"\n{table(record['rows'])}")
    write(record, args.out)


if __name__ == "__main__":
    main()
