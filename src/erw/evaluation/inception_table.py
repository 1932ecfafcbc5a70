"""The convolutions of the 2015 Inception network as a table: shapes, and names in both worlds.

One table builds the network (`erw.evaluation.inception`), names its weights in PyTorch files and
names them in TensorFlow's graph. `mixed_6` of the graph is `Mixed_6d` here.
"""

from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution with batch norm and ReLU: name in PyTorch files, width, kernel, stride."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True  # zero padding that keeps the size; False: none


class Branch(NamedTuple):
    """Convolutions one after another behind an optional pooling; `split` run side by side after.

    `tower` is the branch's name in TensorFlow's graph.
    """

    tower: str
    convs: tuple[Conv, ...]
    split: tuple[Conv, ...] = ()
    pool: str = ""  # "mean", "max" (stride 1) or "halve" (maximum, stride 2)


class Spec(NamedTuple):
    """A block: names in PyTorch and in TensorFlow, and the branches whose outputs are joined."""

    name: str
    graph: str
    branches: tuple[Branch, ...]


def _a(pool: int) -> tuple[Branch, ...]:
    return (
        Branch("", (Conv("branch1x1", 64),)),
        Branch("tower", (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5)))),
        Branch(
            "tower_1",
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        Branch("tower_2", (Conv("branch_pool", pool),), pool="mean"),
    )


def _b() -> tuple[Branch, ...]:
    return (
        Branch("", (Conv("branch3x3", 384, (3, 3), 2, same=False),)),
        Branch(
            "tower",
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3), 2, same=False),
            ),
        ),
        Branch("", (), pool="halve"),
    )


def _c(inner: int) -> tuple[Branch, ...]:
    return (
        Branch("", (Conv("branch1x1", 192),)),
        Branch(
            "tower",
            (
                Conv("branch7x7_1", inner),
                Conv("branch7x7_2", inner, (1, 7)),
                Conv("branch7x7_3", 192, (7, 1)),
            ),
        ),
        Branch(
            "tower_1",
            (
                Conv("branch7x7dbl_1", inner),
                Conv("branch7x7dbl_2", inner, (7, 1)),
                Conv("branch7x7dbl_3", inner, (1, 7)),
                Conv("branch7x7dbl_4", inner, (7, 1)),
                Conv("branch7x7dbl_5", 192, (1, 7)),
            ),
        ),
        Branch("tower_2", (Conv("branch_pool", 192),), pool="mean"),
    )


def _d() -> tuple[Branch, ...]:
    return (
        Branch(
            "tower", (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, same=False))
        ),
        Branch(
            "tower_1",
            (
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, (1, 7)),
                Conv("branch7x7x3_3", 192, (7, 1)),
                Conv("branch7x7x3_4", 192, (3, 3), 2, same=False),
            ),
        ),
        Branch("", (), pool="halve"),
    )


def _e(pool: str) -> tuple[Branch, ...]:
    return (
        Branch("", (Conv("branch1x1", 320),)),
        Branch(
            "tower",
            (Conv("branch3x3_1", 384),),
            (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))),
        ),
        Branch(
            "tower_1",
            (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3))),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        Branch("tower_2", (Conv("branch_pool", 192),), pool=pool),
    )


STEM = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, same=False),
    Conv("Conv2d_2a_3x3", 32, (3, 3), same=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),  # a maximum of 3 x 3, stride 2, follows
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), same=False),  # and again
)
BLOCKS = (
    Spec("Mixed_5b", "mixed", _a(32)),
    Spec("Mixed_5c", "mixed_1", _a(64)),
    Spec("Mixed_5d", "mixed_2", _a(64)),
    Spec("Mixed_6a", "mixed_3", _b()),
    Spec("Mixed_6b", "mixed_4", _c(128)),
    Spec("Mixed_6c", "mixed_5", _c(160)),
    Spec("Mixed_6d", "mixed_6", _c(160)),
    Spec("Mixed_6e", "mixed_7", _c(192)),
    Spec("Mixed_7a", "mixed_8", _d()),
    Spec("Mixed_7b", "mixed_9", _e("mean")),
    Spec("Mixed_7c", "mixed_10", _e("max")),
)


def names() -> dict[str, str]:
    """Every convolution's name in PyTorch files -> its name in TensorFlow's graph."""
    found = {conv.name: f"conv_{i}" if i else "conv" for i, conv in enumerate(STEM)}
    for spec in BLOCKS:
        for branch in spec.branches:
            place = "/".join(filter(None, (spec.graph, branch.tower)))
            for i, conv in enumerate(branch.convs):
                found[f"{spec.name}.{conv.name}"] = f"{place}/conv" + f"_{i}" * bool(i)
            for i, conv in enumerate(branch.split):
                found[f"{spec.name}.{conv.name}"] = f"{place}/mixed/conv" + f"_{i}" * bool(i)
    return found
