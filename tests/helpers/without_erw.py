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
