"""The Inception network of 2015 that FID, sFID and the Inception Score are defined with.

It differs from the Inception v3 that is common today: average pooling leaves the padding out, the
last block pools by maximum, and there are 1,008 logits. Modules are named as in pytorch-fid and
torch-fidelity, so that their weights load by name. Images enter as in ADM's evaluator.

Source: Szegedy et al. (arXiv 1512.00567); `evaluations/evaluator.py` of openai/guided-diffusion.
"""

import tomllib
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from erw.encoders.base import check_images
from erw.encoders.pretrained import load_exactly, read_state
from erw.io import cache_home, download

SIDE = 299
POOL, SPATIAL, LOGITS = 2048, 17 * 17 * 7, 1008  # features, and what they are scored by
WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d"  # first digits

Branches = dict[str, list[str]]
BLOCKS: dict[str, Branches] = tomllib.loads(
    resources.files("erw.evaluation").joinpath("inception.toml").read_text()
)
"""Block -> branch -> convolutions: "channels rowsxcolumns", with a second kernel beside the first
where there are two."""


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Zero padding keeps the size unless `pad` is False."""

    def __init__(
        self, inputs: int, width: int, kernel: Any, stride: int = 1, *, pad: bool = True
    ) -> None:
        super().__init__()
        padding = "same" if pad else "valid"
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels in order; without "branch_pool" it halves the map."""

    def __init__(self, inputs: int, branches: Branches, *, maximum: bool = False) -> None:
        super().__init__()
        self.halves = "branch_pool" not in branches
        mean = partial(F.avg_pool2d, count_include_pad=False)
        self.pool = partial(F.max_pool2d if maximum else mean, kernel_size=3, stride=1, padding=1)
        self.steps: dict[str, list[list[str]]] = {}
        self.width = inputs if self.halves else 0
        for branch, convs in branches.items():
            width, self.steps[branch] = inputs, []
            for i, conv in enumerate(convs, 1):
                out, *kernels = conv.split()
                stem = f"{branch}_{i}" if len(convs) > 1 else branch
                names = [stem] if len(kernels) == 1 else [f"{stem}a", f"{stem}b"]
                last = self.halves and i == len(convs)
                for name, kernel in zip(names, kernels, strict=True):
                    sides = tuple(map(int, kernel.split("x")))
                    self.add_module(name, Conv(width, int(out), sides, 1 + last, pad=not last))
                self.steps[branch].append(names)
                width = int(out)
            self.width += width * len(names)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, steps in self.steps.items():
            ends = [x if branch != "branch_pool" else self.pool(x)]
            for names in steps:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            outputs += ends
        if self.halves:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """The network; `load_inception` fills it with weights. `kept`: only so many leading features of
    an image are kept where those of all images are needed."""

    name = "inception-2015-adm"
    kept = POOL

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        width = 192
        for name, branches in BLOCKS.items():
            block = Mixed(width, branches, maximum=name == "Mixed_7c")
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(POOL, LOGITS)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) of any size -> (B, 2048 + 2023), as in ADM's evaluator: the mean of
        the last map, `pool_3`, then sFID's spatial features (17, 17, 7)."""
        check_images(images)
        x = (resize_tf1(images.float(), SIDE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":  # of branch1x1, which is ADM's mixed_6/conv after its ReLU
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return torch.cat([x.mean((2, 3)), spatial], 1).float()

    def logits(self, pool: Tensor) -> Tensor:
        """`pool_3` (B, 2048) -> logits (B, 1008) *without* the bias, as ADM scores them."""
        return pool @ self.fc.weight.T

    def fold(self) -> None:
        """Fold the batch norms into the convolutions: the same outputs, faster."""
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv.double(), module.bn.double()).float()
                module.bn = nn.Identity()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """float32 (B, C, H, W) -> (B, C, side, side) by TensorFlow 1's bilinear rule: pixel i lies at
    i * H / side of the input, without half-pixel centres or antialiasing."""
    for _ in "xy":
        last = images.shape[-1] - 1
        at = torch.arange(side, dtype=torch.float32, device=images.device) * ((last + 1) / side)
        low = at.floor().long().clamp(max=last)
        left, right = images[..., low], images[..., (low + 1).clamp(max=last)]
        images = (left + (right - left) * (at - low)).mT
    return images


def find_inception() -> Path:
    """The file of `WEIGHTS` in the user's cache folder, downloaded if necessary."""
    try:
        return download(WEIGHTS, cache_home() / "weights" / Path(WEIGHTS).name, sha256=SHA256)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or --weights FILE; fd-lite2 needs none") from error


def load_inception(path: str | Path | None = None, *, device: str = "cpu") -> Inception:
    """The network with weights from a file of pytorch-fid or torch-fidelity, batch norms folded.
    Raises FileNotFoundError without a file, CheckpointError for a damaged or another network's."""
    path = Path(path or find_inception())
    state, net = read_state(path), Inception()
    # Files of before PyTorch 0.4 have no counters of batches, which nothing here reads.
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    load_exactly(net, counters | state, f"{path} is no Inception of 2015")
    net.fold()
    return net.to(device)
