"""EfficientNet-Lite: shapes, preprocessing, the package's own numbers."""

import numpy as np
import pytest
import torch

from erw.encoders import Encoder, load_encoder
from erw.encoders.efficientnet import pretrained
from erw.errors import DataError
from helpers.images import glyphs


@pytest.fixture(scope="module", params=["efficientnet-lite0", "efficientnet-lite2"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return load_encoder(request.param)


def test_patch_tokens_follow_the_grid(encoder: Encoder) -> None:
    tokens = encoder(glyphs("test", 4))
    assert encoder.grid(64) == (8, 8)
    assert tokens.shape == (4, 64, encoder.dim) and tokens.dtype == torch.float32
    assert encoder.dim == {"efficientnet-lite0": 112, "efficientnet-lite2": 120}[encoder.name]
    assert not tokens.requires_grad


def test_tokens_are_row_major() -> None:
    encoder = load_encoder("efficientnet-lite0")
    blank = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    marked = blank.clone()
    marked[..., 4:12, 52:60] = 0  # row 0 to 1, column 6 to 7 of the 8 x 8 grid
    change = (encoder(marked) - encoder(blank)).norm(dim=-1).view(8, 8)
    row, column = divmod(int(change.argmax()), 8)
    assert row <= 2 and column >= 5


def test_same_numbers_as_the_packages_network(encoder: Encoder) -> None:
    """Folded batch norms and merged padding change nothing but speed."""
    batch = glyphs("test", 4).repeat_interleave(2, -1).repeat_interleave(2, -2)  # 128 pixels
    network = pretrained(encoder.name)
    with torch.no_grad():
        wanted = network.extract_features((batch.float() - 127) / 128).mean((2, 3))
    pooled = encoder.pooled(batch)
    assert pooled.shape == (4, encoder.dim_pooled) == (4, 1280)
    torch.testing.assert_close(pooled, wanted, atol=1e-3, rtol=1e-3)


def test_preprocessing_classifies_a_football() -> None:
    """(x - 127) / 128 on a white ground: ImageNet class 805 is the soccer ball."""
    encoder, network = load_encoder("efficientnet-lite0@224"), pretrained("efficientnet-lite0")
    glyph = torch.from_numpy(football(224)).permute(2, 0, 1)[None]
    with torch.no_grad():
        classes = network._fc(encoder.pooled(glyph)).softmax(-1)
    assert classes.argmax() == 805 and classes.max() > 0.5


def football(side: int) -> np.ndarray:
    from erw.data.sources.openmoji import _rasterise

    glyph = _rasterise("26BD", side).astype(np.int64)
    return (glyph[..., :3] + 255 - glyph[..., 3:]).astype(np.uint8)


def test_features_do_not_depend_on_the_batch(encoder: Encoder) -> None:
    batch = glyphs("test", 3)
    alone = torch.cat([encoder(image[None]) for image in batch])
    torch.testing.assert_close(encoder(batch), alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "block"), [("efficientnet-lite0", 15), ("efficientnet-lite2", 20)]
)
def test_the_last_map_is_the_last_blocks(name: str, block: int) -> None:
    encoder, images = load_encoder(f"{name}-last"), glyphs("test", 2)
    assert encoder.grid(64) == (8, 8) and encoder.grid(128) == (8, 8)
    network, seen = pretrained(name), list[torch.Tensor]()
    network._blocks[block].register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        network.extract_features((encoder.resized(images) - 127) / 128)
    assert block == len(network._blocks) - 1
    wanted = seen[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(images), wanted, atol=2e-3, rtol=1e-3)


def test_the_control_is_the_same_network_with_fixed_random_weights() -> None:
    torch.manual_seed(1)
    one, trained, images = (
        load_encoder("random"),
        load_encoder("efficientnet-lite0"),
        glyphs("test", 2),
    )
    torch.manual_seed(2)
    assert torch.equal(one(images), load_encoder("random")(images))
    assert one(images).shape == trained(images).shape and not torch.equal(
        one(images), trained(images)
    )
    assert 0.1 < one(images).std() < 100
    assert one.flops(64) == trained.flops(64)


def test_flops_count_only_what_runs(encoder: Encoder) -> None:
    patch, both = encoder.flops(64), encoder.flops(64, both=True)
    assert 1e8 < patch < both < 5e8
    assert load_encoder(f"{encoder.name}@256").flops(64) == pytest.approx(4 * patch, rel=0.01)


def test_encoder_refuses_other_images(encoder: Encoder) -> None:
    with pytest.raises(DataError, match="uint8"):
        encoder(torch.zeros(1, 3, 64, 64))
    with pytest.raises(DataError, match="squares"):
        encoder(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"8 px a token do not divide 61; .*@256"):
        encoder.grid(61)
