"""What the shards of a cache hold: which columns, of which types."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from erw.data.batch import FeatureSpec
from erw.data.codec import SCALED
from erw.data.shards import Kind


class Columns(NamedTuple):
    """Columns of a cache with these features, latents and images."""

    features: Mapping[str, FeatureSpec]
    latent_shape: tuple[int, int, int]
    image_size: int

    def names(self, features: Sequence[str], token: str) -> list[str]:
        """Those that make up rows with the features of these encoders, and a class token."""
        names = ["label", "moments", *(f"features.{name}" for name in features)]
        names += [f"scale.{name}" for name in features if self.features[name].format in SCALED]
        return names + ([f"class.{token}"] if token else [])

    def kind(self, column: str) -> Kind:
        """Type and shape of a row."""
        what, _, name = column.partition(".")
        if name:
            return self.features[name].kind(what)
        channels, *sides = self.latent_shape
        kinds: dict[str, Kind] = {
            "label": ("int32", ()),
            "item": ("int64", ()),
            "image": ("uint8", (3, self.image_size, self.image_size)),
            "moments": ("float16", (2 * channels, *sides)),
        }
        return kinds[what]
