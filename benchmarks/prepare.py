"""Images to latents: `erw prepare` beside REPA's `dataset_tools.py`, on the same images and VAE.

    python benchmarks/prepare.py --peer repa=PATH_TO_CLONE
    python benchmarks/prepare.py --encoder efficientnet-lite0      # erw stores features as well

JPEGs of 500 x 375, ADM crop to 256 px, a small VAE of factor 8 with random weights, as much of the
machine as each side takes. REPA runs `convert`, then `encode`, as its guide says: images one by
one, written as PNG and read again, the VAE in float32 on one image at a time. erw does both in one
pass: threads decode and crop ahead, the VAE takes batches. Without a GPU REPA's images stay on the
CPU although `encode` names "cuda". Each turn is a process of its own, timed from the first image to
the last file, imports and the loading of weights left out on erw's side only. A turn of each is one
round, and ratios are taken within rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from record import add_peer, begun, beside_repa, write

SIZE = 256
CLOCK = """
import resource, time
def clock():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), used.ru_utime + used.ru_stime
"""
PEER = (
    CLOCK
    + """
import json, sys
clone, vae, images, out, size = sys.argv[1:]
sys.path.insert(0, clone + "/preprocessing")
import torch
if not torch.cuda.is_available():
    move = torch.Tensor.to
    torch.Tensor.to = lambda x, *a, **k: move(x, *("cpu" if y == "cuda" else y for y in a), **k)
import dataset_tools, diffusers
from diffusers import AutoencoderKL
side = int(size)
a = clock()
dataset_tools.convert.callback(images, out + "/images", None, "center-crop-dhariwal", (side, side))
b = clock()
dataset_tools.encode.callback(vae, out + "/images", out + "/vae-sd", None)
c = clock()
parts = {"convert": (a, b), "encode": (b, c), "all": (a, c)}
print(json.dumps({k: [y - x for x, y in zip(*v)] for k, v in parts.items()}))
"""
)
OURS = (
    CLOCK
    + """
import json, sys
vae, images, out, size, encoder, precision = sys.argv[1:]
import torch
from erw.data.prepare import prepare
from erw.encoders import load_encoder, load_vae
device = "cuda" if torch.cuda.is_available() else "cpu"
vae = load_vae(vae, device=device)
encoders = [load_encoder(encoder, device=device)] if encoder else []
a = clock()
prepare(images, out, vae=vae, encoders=encoders, image_size=int(size), precision=precision,
        device=device, progress=False)
b = clock()
print(json.dumps({"all": [y - x for x, y in zip(a, b)]}))
"""
)


def make_images(folder: Path, count: int) -> None:
    """JPEGs with the size and about the detail of photographs, in two class folders."""
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        inside = folder / str(number % 2)
        inside.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        noise = random.integers(-12, 13, (375, 500, 3))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(inside / f"{number:06d}.jpg", quality=90)


def make_vae(folder: Path) -> None:
    """Stable Diffusion's architecture at an eighth of the width, random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.18215,
    ).save_pretrained(folder)


def run(program: str, *args: str | Path | int) -> dict[str, list[float]]:
    """[wall seconds, CPU seconds] of each stage of a program in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(done.stderr.split())[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender: images a second and a CPU second, and ratios to REPA."""
    found: dict[str, list[dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "photos", args.images)
        make_vae(root / "vae")
        for turn in range(args.rounds):
            if args.peer:
                told = args.peer, root / "vae", root / "photos", root / f"repa-{turn}", SIZE
                found.setdefault("repa", []).append(run(PEER, *told))
            for precision in args.precision:
                out = root / f"erw-{precision}-{turn}"
                told = root / "vae", root / "photos", out, SIZE, args.encoder, precision
                found.setdefault(f"erw {precision}", []).append(run(OURS, *told))
            latest = {name: rounds[-1] for name, rounds in found.items()}
            print(f"round {turn + 1} seconds (wall, CPU): {latest}", file=sys.stderr)
    rates = {
        name: [
            dict(zip(("wall", "cpu"), (args.images / t for t in one["all"]), strict=True))
            for one in rounds
        ]
        for name, rounds in found.items()
    }
    rows = beside_repa(rates, "images")
    return [row | {"seconds [wall, CPU] by part": found[row["contender"]]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_peer(parser)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoder", default="", help="erw also stores these features (not REPA)")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()
    record = begun(
        "images a second and a CPU second (all threads), median over rounds (min to max)",
        packages=("torch", "pillow", "diffusers"),
        clone=args.peer, out=args.out,
    )  # fmt: skip
    record |= {
        "images": f"{args.images} JPEGs of 500 x 375 to {SIZE}, features: {args.encoder or None}",
        "rows": compare(args),
    }
    print(json.dumps(record, indent=1))
    write(record, args.out)


if __name__ == "__main__":
    main()
