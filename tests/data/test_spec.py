"""The spec of a cache: JSON both ways, and the sizes in the documentation."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from erw.data.manifest import (
    CacheSpec,
    EncoderSpec,
    SourceSpec,
    VaeSpec,
    readable,
)
from erw.errors import CacheError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
IMAGENET = 1_281_167
LATENTS = {
    "4 x 32 x 32": (4, 32, 32),
    "16 x 32 x 32": (16, 32, 32),
    "32 x 16 x 16": (32, 16, 16),
}
WIDTHS = {
    "efficientnet-lite0": 112,
    "dinov2-s, dinov3-s": 384,
    "dinov2-b, dino-b, dinov3-b, mocov3-b, siglip2-b": 768,
    "dinov2-l, dinov3-l, clip-l, mae-l, mocov3-l, siglip2-l": 1024,
    "siglip2-so400m": 1152,
    "ijepa-h": 1280,
    "dinov2-g": 1536,
}


def spec(latent: tuple[int, int, int], *, dim: int = 0, format: str = "float16") -> CacheSpec:
    encoder = EncoderSpec("e", "hash", dim, (16, 16), 0, format)
    return CacheSpec(
        source=SourceSpec("s", "print", IMAGENET),
        background=(255, 255, 255),
        crop="adm",
        image_size=256,
        rows_per_shard=1024,
        precision="float32",
        seed=0,
        flip=False,
        images=True,
        latent_shape=latent,
        vae=VaeSpec("v", "hash", 8, 0.18215, (0.25,) * latent[0], 0, revision="a" * 40),
        encoders=(encoder,) * bool(dim),
    )


def size(of: CacheSpec, *, part: str) -> int:
    """Bytes per image of the columns in one of a shard's files, less number and label."""
    names = of.columns()[part].keys() - {"label", "item"}
    return sum(of.row_bytes()[name] for name in names)


def row(name: str, size: int) -> str:
    return f"| {name} | {size:,} | {readable(size * IMAGENET)} |"


def rows() -> list[str]:
    """The table of the page."""
    lines = [row(f"latents {name}", size(spec(shape), part="")) for name, shape in LATENTS.items()]
    lines.append(row("images (`--images`)", size(spec((4, 32, 32)), part="images")))
    for name, dim in WIDTHS.items():
        for kind in ("float16", "int8"):
            title = "float16, bfloat16" if kind == "float16" else kind
            bytes_ = size(spec((4, 32, 32), dim=dim, format=kind), part="0")
            lines.append(row(f"{name}: {title}", bytes_))
    return lines


def test_the_pages_size_table() -> None:
    text = PAGE.read_text("utf-8").split("## Size")[1]
    table = [line for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)][2:]
    assert table == rows()


def test_flipped_rows_take_twice_the_bytes_but_for_images() -> None:
    once = spec((4, 32, 32), dim=768, format="int8")
    twice = replace(once, flip=True)
    factors = [size(twice, part=part) / size(once, part=part) for part in ("", "images", "0")]
    assert factors == [2, 1, 2]
    assert sum(replace(once, images=False).row_bytes().values()) == 214_028
    assert readable(214_028 * IMAGENET) == "274.2 GB"


def test_json_and_back() -> None:
    for one in (spec((4, 32, 32)), spec((3, 8, 8), dim=5, format="int8")):
        values = json.loads(json.dumps(asdict(one)))
        assert CacheSpec.from_json(values) == one
    assert values["vae"]["revision"] == "a" * 40


@pytest.mark.parametrize("change", [{"format": "float8"}, {"pca": {"kept": 8}}])
def test_features_of_earlier_versions_are_refused_with_a_command(change: dict) -> None:
    values = json.loads(json.dumps(asdict(spec((4, 32, 32), dim=8))))
    values["encoders"][0] |= change
    with pytest.raises(CacheError, match=r"this erw does not read: .*erw prepare .*int8"):
        CacheSpec.from_json(values)
