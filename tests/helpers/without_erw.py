"""Run exported folders as somebody would who has diffusers and no erw.

`python without_erw.py FOLDER`: for every FOLDER/CASE loads CASE/export, calls it as CASE/ask.json
says on the noise in CASE/noise.safetensors, and writes CASE/drawn.safetensors.
"""

import json
import sys
import warnings
from pathlib import Path

sys.modules["erw"] = None  # type: ignore[assignment]  # any import of it fails

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("error")


def run(case: Path) -> None:
    if case.name.startswith("dit"):
        return dit(case)
    where = case / "export"
    pipe = DiffusionPipeline.from_pretrained(
        where, custom_pipeline="pipeline", trust_remote_code=True, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    ask = json.loads((case / "ask.json").read_text())
    noise = load_file(case / "noise.safetensors")["noise"]
    drawn = {
        name: pipe(**ask, latents=noise, output_type=kind).images.contiguous()
        for name, kind in (("latents", "latent"), ("images", "pt"))
    }
    save_file(drawn, case / "drawn.safetensors")
    picture = pipe(**ask, latents=noise[:1] if ask.get("class_labels") is None else noise).images[0]
    assert picture.mode == "RGB", picture
    if (case / "more").exists():
        more(pipe, where)


def dit(case: Path) -> None:
    """diffusers' own DiTPipeline: one forward pass, and images with guidance and without."""
    pipe = DiffusionPipeline.from_pretrained(
        case / "export", trust_remote_code=True, use_safetensors=True
    )
    assert type(pipe).__name__ == "DiTPipeline" and pipe.labels == {"class 0": 0, "class 1": 1}
    pipe.set_progress_bar_config(disable=True)
    noise = load_file(case / "noise.safetensors")["noise"]
    t, y = torch.tensor([3, 700]), torch.tensor([1, 1000])
    with torch.no_grad():
        drawn = {"forward": pipe.transformer(noise, timestep=t, class_labels=y).sample}
    for name, scale in (("plain", 1.0), ("guided", 2.5)):
        rng = torch.Generator().manual_seed(0)
        ask = {"guidance_scale": scale, "num_inference_steps": 7, "output_type": "pt"}
        drawn[name] = pipe([1, 0], generator=rng, **ask).images.contiguous()
    save_file(drawn, case / "drawn.safetensors")


def more(pipe: DiffusionPipeline, where: Path) -> None:
    """Names, mistakes, other ways to load, half precision."""
    one = pipe("class 1", 2, num_images=3, generator=torch.manual_seed(0), output_type="np").images
    two = pipe(1, 2, num_images=3, generator=torch.manual_seed(0), output_type="np").images
    assert one.shape[0] == 3 and (one == two).all()
    assert len(pipe(num_inference_steps=1, num_images=2).images) == 2  # no class
    for wrong in (
        {"class_labels": "nobody"},
        {"class_labels": 3},
        {"class_labels": [0, 1], "num_images": 3},
        {"guidance_scale": 2.0},
        {"class_labels": 0, "latents": torch.zeros(1, 2, 3, 3)},
    ):
        try:
            pipe(**wrong)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            raise AssertionError(wrong)
    for other in (DiffusionPipeline.from_pretrained(where, trust_remote_code=True),
                  DiffusionPipeline.from_pretrained(
                      where, custom_pipeline=str(where), trust_remote_code=True,
                      dtype=torch.bfloat16)):  # fmt: skip
        other.set_progress_bar_config(disable=True)
        again = other(1, 2, num_images=3, generator=torch.manual_seed(0), output_type="np").images
        assert abs(again - two).mean() < 0.02


for case in sorted(Path(sys.argv[1]).iterdir()):
    run(case)
