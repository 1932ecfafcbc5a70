"""Images to latents: `erw prepare` against REPA's `dataset_tools.py`, on the same images and VAE.

    python benchmarks/prepare.py --peer repa=PATH_OF_A_CLONE [--images 512] [--rounds 3]

JPEGs of 500 x 375, ADM crop to 256 px, a small VAE of factor 8 with random weights. REPA runs
`convert` and then `encode`, as its guide says; erw does both in one pass. Each side runs in a
process of its own, in turn, and is timed from the first image to the last file, imports left out.
REPA's `encode` names the device "cuda"; without one, its images stay on the CPU. The last line is
JSON. Run it on an idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

SIZE = 256
PEER = """
import json, sys, time
clone, vae, images, out, size = sys.argv[1:]
sys.path.insert(0, clone + "/preprocessing")
import torch
if not torch.cuda.is_available():
    move = torch.Tensor.to
    torch.Tensor.to = lambda x, *a, **k: move(x, *("cpu" if y == "cuda" else y for y in a), **k)
import dataset_tools, diffusers
side = int(size)
began = time.monotonic()
dataset_tools.convert.callback(images, out + "/images", None, "center-crop-dhariwal", (side, side))
middle = time.monotonic()
dataset_tools.encode.callback(vae, out + "/images", out + "/vae-sd", None)
print(json.dumps([middle - began, time.monotonic() - middle]))
"""
OURS = """
import json, sys, time
vae, images, out, size, encoder = sys.argv[1:]
from erw.data import prepare
from erw.encoders import load_encoder, load_vae
vae, encoders = load_vae(vae), [load_encoder(encoder)] if encoder else []
began = time.monotonic()
prepare(images, out, vae=vae, encoders=encoders, image_size=int(size), progress=False)
print(json.dumps([time.monotonic() - began]))
"""


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


def run(program: str, *args: str | Path | int) -> list[float]:
    """Seconds of each stage of a program in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(done.stderr.split())[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", metavar="repa=PATH", help="a clone of sihyun-yu/REPA")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", default="", help="erw also stores these features (not REPA)")
    args = parser.parse_args()
    clone = ""
    if args.peer:
        name, _, clone = args.peer.partition("=")
        if name != "repa" or not (Path(clone) / "preprocessing" / "dataset_tools.py").exists():
            raise SystemExit("error: --peer: expected repa=PATH, a clone of sihyun-yu/REPA")
    found: dict[str, list[float]] = {"erw": [], "repa convert": [], "repa encode": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "photos", args.images)
        make_vae(root / "vae")
        began = time.monotonic()
        for turn in range(args.rounds):
            out = root / f"erw-{turn}"
            found["erw"] += run(OURS, root / "vae", root / "photos", out, SIZE, args.encoder)
            if clone:
                peer = root / f"repa-{turn}"
                paths = Path(clone).resolve(), root / "vae", root / "photos", peer
                seconds = run(PEER, *paths, SIZE)
                found["repa convert"].append(seconds[0])
                found["repa encode"].append(seconds[1])
        total = time.monotonic() - began
    report: dict[str, object] = {
        "cores": os.cpu_count(), "load": os.getloadavg()[0], "images": args.images,
        "encoder": args.encoder or "none", "seconds in all": round(total, 1),
    }  # fmt: skip
    report["erw images/s"] = round(args.images / median(found["erw"]), 2)
    if clone:
        both = [a + b for a, b in zip(found["repa convert"], found["repa encode"], strict=True)]
        report["repa images/s"] = round(args.images / median(both), 2)
        report["erw over repa"] = round(median(both) / median(found["erw"]), 2)
    report |= {f"{k} seconds": [round(x, 2) for x in v] for k, v in found.items() if v}
    print("\n".join(f"{name:<24}{value}" for name, value in report.items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
