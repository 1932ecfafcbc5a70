"""One contender of `sample.py`, in a process of its own: reads orders on stdin, answers on stdout.

An order is a JSON line {"precision", "turns"}; the answer {"wall": [...], "cpu": [...]} has seconds
of each turn by either clock, CPU time summed over threads. A turn is one batch of images from noise
to decoded uint8 pixels. The first turn's latents go to `latents`, a file that the driver compares.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Turn = Callable[[str], Tensor]
"""precision -> latents of one batch; its images are decoded on the way."""

CLASSES, SIDE = 1000, 32


def noise(spec: dict[str, Any]) -> Tensor:
    """The noise that every contender starts from."""
    from erw.sampling.generation import seed_noise

    return seed_noise(range(spec["batch"]), (4, SIDE, SIDE), "start")


def labels(spec: dict[str, Any]) -> Tensor:
    return torch.arange(spec["batch"]) * 37 % CLASSES


def pixels(decoded: Tensor) -> Tensor:
    """What every contender makes of its decoder's output."""
    return ((decoded + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def decoder(spec: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(Path(spec["folder"]) / "vae").eval()


def repa(spec: dict[str, Any]) -> Turn:
    """The clone's model and its `euler_sampler`, called as its generate.py does."""
    from erw.training.peers import importing

    clone, vae = Path(spec["path"]), decoder(spec)  # first: diffusers looks for a whole timm
    with importing(clone):
        from models.sit import SiT_models

        from samplers import euler_sampler

    # The clone's S models forget this setting and cannot run without it.
    mended = {"decoder_hidden_size": 384} if spec["model"].startswith("S/") else {}
    model = SiT_models[f"SiT-{spec['model']}"](
        input_size=SIDE,
        num_classes=CLASSES,
        use_cfg=True,
        z_dims=[768],
        encoder_depth=4,
        fused_attn=True,
        qk_norm=False,
        **mended,
    )
    model.load_state_dict(torch.load(Path(spec["folder"]) / "sit.pt", weights_only=True)["ema"])
    model.eval()
    z, y = noise(spec), labels(spec)

    def turn(precision: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            x = euler_sampler(
                model, z, y, num_steps=spec["steps"], cfg_scale=spec["guidance"],
                guidance_low=0.0, guidance_high=spec["high"], path_type="linear",
            ).float()  # fmt: skip
        pixels(vae.decode(x / 0.18215).sample)
        return x

    return turn


def erw(spec: dict[str, Any]) -> Turn:
    """`erw.generate` on REPA's file, or with `layout` dit on DiT's, down its chain by DDIM."""
    from erw import load_pretrained
    from erw.encoders import load_vae
    from erw.sampling import generate

    folder = Path(spec["folder"])
    options: dict[str, Any] = {"guidance": spec["guidance"], "compile": spec["compile"]}
    if spec["layout"] == "dit":
        model = load_pretrained(folder / "dit.pt", "dit")
        options |= {"solver": "ddim"}
    else:
        model = load_pretrained(folder / "sit.pt", "repa", projectors=False)
        options |= {"solver": "euler", "interval": (0.0, spec["high"])}
    options |= {"vae": load_vae(str(folder / "vae")), "batch_size": spec["batch"]}

    def turn(precision: str) -> Tensor:
        drawn = generate(
            model,
            range(spec["batch"]),
            labels(spec),
            steps=spec["steps"],
            precision=precision,  # type: ignore[arg-type]
            **options,
        )
        return drawn.collect().latents

    return turn


def pipeline(spec: dict[str, Any]) -> Turn:
    """DiTPipeline with its DDIM scheduler; bf16 is the pipeline cast to it, as its users do."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    size = spec["sizes"]
    pipes = {}
    for precision in ("fp32", "bf16"):
        transformer = DiTTransformer2DModel(
            num_layers=size["depth"], num_attention_heads=size["heads"],
            attention_head_dim=size["width"] // size["heads"], patch_size=size["patch"],
            in_channels=4, out_channels=8, sample_size=SIDE, num_embeds_ada_norm=CLASSES,
        )  # fmt: skip
        state = torch.load(Path(spec["folder"]) / "dit-diffusers.pt", weights_only=True)
        missing, unexpected = transformer.load_state_dict(state, strict=False)
        assert not unexpected and all("pos_embed" in name for name in missing), missing
        vae = AutoencoderKL.from_pretrained(Path(spec["folder"]) / "vae")
        scheduler = DDIMScheduler(clip_sample=False)
        pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        pipes[precision] = pipe.to(torch.bfloat16) if precision == "bf16" else pipe

    def turn(precision: str) -> Tensor:
        drawn = pipes[precision](
            labels(spec).tolist(), guidance_scale=spec["guidance"],
            generator=torch.Generator().manual_seed(0), num_inference_steps=spec["steps"],
            output_type="pt",
        )  # fmt: skip
        pixels(drawn.images * 2 - 1)
        return drawn.images

    return turn


CONTENDERS = {"repa": repa, "erw": erw, "diffusers": pipeline}


def main() -> None:
    """Build the contender that argv[1] describes and serve orders until stdin closes."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    torch.set_num_threads(spec["threads"])
    torch.set_grad_enabled(False)
    turn = CONTENDERS[spec["name"]](spec)
    for line in sys.stdin:
        order = json.loads(line)
        wall, cpu = [], []
        for _ in range(order["turns"]):
            start, start_cpu = time.perf_counter(), time.process_time()
            latents = turn(order["precision"])
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        name = f"{spec['title'].replace(' ', '-')}-{order['precision']}.npy"
        np.save(Path(spec["folder"]) / name, latents.float().numpy())
        print(json.dumps({"wall": wall, "cpu": cpu}), file=answers, flush=True)


if __name__ == "__main__":
    main()
