"""Encoders by name."""

import pytest

from erw.encoders import load_encoder, moco, vits
from erw.encoders.registry import ENCODERS
from erw.errors import ConfigError


def test_encoder_by_name() -> None:
    assert load_encoder("efficientnet-lite0@192").grid(64) == (12, 12)
    with pytest.raises(ConfigError, match="did you mean 'efficientnet-lite0'"):
        load_encoder("efficientnet_lite0")
    with pytest.raises(ConfigError, match="choose from"):
        load_encoder("zzz")
    with pytest.raises(ConfigError, match="side in pixels"):
        load_encoder("efficientnet-lite0@big")
    with pytest.raises(ConfigError, match="multiple of its patch, 16"):
        load_encoder("efficientnet-lite0@100")


def test_every_entry_of_a_family_is_registered() -> None:
    assert set(vits.HUB) | set(moco.SIZES) < set(ENCODERS)
