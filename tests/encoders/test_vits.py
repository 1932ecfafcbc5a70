"""Every family in its real on-disk format: the same patch tokens as the library's own model."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from erw.align import attention_logits
from erw.encoders import load_encoder, names, vits
from erw.errors import CheckpointError, ConfigError, DataError
from erw.io import weight_hash
from helpers.vits import FAMILIES, HALF, IMAGENET, TINY, images, saved


def library_tokens(entry: str, model: Any, pixels: Tensor, *, before: int | None = None) -> Tensor:
    """Tokens as the library's own model gives them for normalised pixels, those of patches or all
    from `before` on."""
    before = FAMILIES[entry][4] if before is None else before
    more: dict[str, Any] = {} if entry.startswith("dinov") else {"interpolate_pos_encoding": True}
    if entry in ("clip-l", "siglip2-b"):
        model = model.vision_model
    if entry == "mae-l":
        model = model.vit
        model.config.mask_ratio = 0.0
        patches = (pixels.shape[-1] // 16) ** 2
        more["noise"] = torch.arange(patches).float()[None].expand(len(pixels), -1)
    with torch.no_grad():
        return model(pixel_values=pixels, **more).last_hidden_state[:, before:]


@pytest.mark.parametrize("entry", FAMILIES)
def test_tokens_are_those_of_the_librarys_model(entry: str, tmp_path: Path) -> None:
    model = saved(entry, tmp_path / "weights")
    encoder = load_encoder(f"{entry}={tmp_path / 'weights'}")
    assert encoder.name == entry and encoder.grid(256) == (16, 16) and encoder.dim == 24
    batch = images()
    _, _, (mean, std), side, first = FAMILIES[entry]
    pixels = batch.float()
    if side != 256:
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
    pixels = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    tokens = encoder(batch)
    assert tokens.shape == (2, 256, 24) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, library_tokens(entry, model, pixels), atol=1e-4, rtol=1e-4)
    patches, token = encoder.both(batch)
    assert torch.equal(patches, tokens) and token.shape == (2, encoder.dim_class)
    if entry.startswith("dino") or entry == "mae-l":  # CLS after the last norm, of the same pass
        whole = library_tokens(entry, model, pixels, before=0)
        torch.testing.assert_close(token, whole[:, 0], atol=1e-4, rtol=1e-4)
    width, tokens = TINY["hidden_size"], 256 + first
    hidden = 4 * width if entry.startswith("dinov2") else TINY["intermediate_size"]
    block = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * hidden
    embedding = 2 * 3 * width * side**2  # every pixel takes part once
    assert 0.99 < encoder.flops(256) / (2 * block + embedding) < 1.1  # more: a head for pooling
    smaller = load_encoder(f"{entry}={tmp_path / 'weights'}@{side // 2}")
    assert smaller.name == f"{entry}@{side // 2}" and smaller.grid(64) == (8, 8)
    assert smaller(images(1, 64)).shape == (1, 64, 24)


def test_every_entry_of_the_hub_is_of_a_family() -> None:
    families = "|".join(vits.FAMILIES)
    for name, place in names.HUB.items():
        assert re.fullmatch(rf"({families})(-\w+)*", name), name
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", place), place
    for family in vits.FAMILIES.values():
        assert hasattr(transformers, family.model)


def test_a_bare_folder_tells_its_family(tmp_path: Path) -> None:
    saved("dinov2-b", tmp_path / "my-dino")
    encoder = load_encoder(str(tmp_path / "my-dino"))
    assert encoder.name == "my-dino" and encoder.grid(256) == (16, 16)
    same = load_encoder(f"dinov2-b={tmp_path / 'my-dino'}")
    assert torch.equal(encoder(images(1)), same(images(1)))


def test_a_bare_folder_tells_its_mean_and_deviation(tmp_path: Path) -> None:
    folder = tmp_path / "my-dino"
    model, told = saved("dinov2-b", folder), folder / "preprocessor_config.json"
    plain = load_encoder(str(folder))
    batch = images(1, 224)
    told.write_text(json.dumps({"image_mean": HALF[0], "image_std": HALF[1]}))
    own = load_encoder(f"{folder}@224")
    wanted = library_tokens("dinov2-b", model, batch / 127.5 - 1)
    torch.testing.assert_close(own(batch), wanted, atol=1e-4, rtol=1e-4)
    by_name = load_encoder(f"dinov2-b={folder}")  # an entry has its own
    assert torch.equal(by_name(batch), plain(batch))
    assert weight_hash(by_name) == weight_hash(plain) != weight_hash(own)
    told.write_text(json.dumps({"image_mean": IMAGENET[0]}))
    assert weight_hash(load_encoder(str(folder))) == weight_hash(plain)
    for key, wrong in (
        ("image_std", [0.5, 0.5, 0]), ("image_mean", [0.5, 0.5]), ("image_std", 0.5),
        ("image_mean", [0.5, 0.5, float("nan")]), ("image_mean", ["a", 1, 1]),
    ):  # fmt: skip
        told.write_text(json.dumps({key: wrong}))
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json has .*3 numbers"):
            load_encoder(str(folder))
    for text in ("[]", "{"):
        told.write_text(text)
        with pytest.raises(CheckpointError, match="no JSON object"):
            load_encoder(str(folder))


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("dinov2-b", tmp_path / "dino")
    with pytest.raises(CheckpointError, match="of type 'dinov2': expected vit_mae"):
        load_encoder(f"mae-l={tmp_path / 'dino'}")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_encoder(f"mae-l={tmp_path}")
    with pytest.raises(ConfigError, match="multiple of its patch, 14"):
        load_encoder(f"dinov2-b={tmp_path / 'dino'}@100")
    with pytest.raises(DataError, match=r"16 px a token do not divide 72; .*@224"):
        load_encoder(f"dinov2-b={tmp_path / 'dino'}").grid(72)
    weights = tmp_path / "dino" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is truncated or not safetensors"):
        load_encoder(f"dinov2-b={tmp_path / 'dino'}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(names.HUB, "dinov2-b", "nobody/nothing@" + "0" * 40)
    with pytest.raises(CheckpointError, match=r"nobody/nothing.*cannot be loaded.*=FOLDER"):
        load_encoder("dinov2-b")
    with pytest.raises(CheckpointError, match=r"mocov3-b=FILE"):
        load_encoder("mocov3-b")


@pytest.mark.parametrize("entry", ["dinov2-b", "clip-l"])
def test_attention_is_the_librarys_among_the_patches(entry: str, tmp_path: Path) -> None:
    model: Any = saved(entry, tmp_path)
    encoder = load_encoder(f"{entry}#attention2={tmp_path}@56")
    assert encoder.name == f"{entry}#attention2@56" and encoder.dim == 48
    vision = model.vision_model if entry == "clip-l" else model
    vision.set_attn_implementation("eager")
    batch = images(2, 56)
    with torch.no_grad():
        whole = vision(pixel_values=encoder.normalised(batch), output_attentions=True)
    among = whole.attentions[1][:, :, 1:, 1:]
    got = attention_logits(encoder(batch), 3).softmax(-1)
    torch.testing.assert_close(got, among / among.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_calls_in_several_threads_keep_their_own_attention(tmp_path: Path) -> None:
    """A batch is cut into pieces that threads encode at once: here one within another."""
    saved("dinov2-b", tmp_path)
    encoder = load_encoder(f"dinov2-b#attention2={tmp_path}@56")
    batch, others = images(2, 56), 255 - images(2, 56)
    wanted = encoder(batch)
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(*_: object) -> None:
            if current_thread() is main_thread():
                pool.submit(encoder, others).result()

        encoder.network.layernorm.register_forward_pre_hook(meanwhile)
        assert torch.equal(encoder(batch), wanted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1e9),
        ("num_attention_heads", -1),
        ("hidden_size", 10**12),
        ("depths", [1, 10**9]),
    ],
)
def test_a_folder_with_sizes_that_its_weights_cannot_have(
    tmp_path: Path, key: str, value: Any
) -> None:
    saved("dinov2-b", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    said = rf"config\.json does not fit its weights: {key}.* with \d+ tensors"
    with pytest.raises(CheckpointError, match=said) as error:
        load_encoder(str(tmp_path))
    assert "\n" not in str(error.value)
