"""The 2015 Inception network: its layers, its resize, and weights from files."""

import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from erw.errors import CheckpointError, DataError
from erw.evaluation.inception import (
    LOGITS,
    POOL,
    SPATIAL,
    Inception,
    find_inception,
    load_inception,
    resize_tf1,
)
from helpers.inception import pool_and_spatial, random_state


def images(count: int = 2, *, side: int = 40) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=rng, dtype=torch.uint8)


def record(net: nn.Module, outputs: dict[str, Tensor]) -> None:
    """Keep the output of every convolution (after its ReLU) and block of `net` by name."""
    for name, module in net.named_modules():
        if name.startswith(("Conv2d_", "Mixed_")) and not name.endswith((".conv", ".bn")):
            module.register_forward_hook(_keep(name, outputs))


def _keep(name: str, outputs: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        outputs[name] = output.clone()

    return hook


def test_every_layer_equals_torch_fidelitys(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one file of random weights. Its package imports torchvision, its network does not: the
    network is imported from a package with the same path and an empty `__init__`."""
    spec = importlib.util.find_spec("torch_fidelity")
    assert spec is not None, "pip install --no-deps torch-fidelity (`make tools` does it)"
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or [])
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    ours = load_inception(weights)
    expected: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    record(theirs, expected)
    record(ours, outputs)
    pool, logits = theirs(images())
    our_pool, our_spatial = pool_and_spatial(ours, images())
    assert outputs.keys() == expected.keys() and len(outputs) == 94 + 11
    for name, value in expected.items():
        assert (outputs[name] - value).abs().max() < 1e-4 * value.abs().max(), name
    torch.testing.assert_close(our_pool, pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits(our_pool), logits, rtol=1e-4, atol=1e-4)
    spatial = expected["Mixed_6d.branch1x1"][:, :7].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(our_spatial, spatial, rtol=1e-4, atol=1e-4)


def test_folding_changes_no_output(net: Inception) -> None:
    plain = Inception()
    plain.load_state_dict(random_state())
    torch.testing.assert_close(net.pooled(images()), plain.pooled(images()), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def test_features_have_adms_shapes_and_depend_on_one_image_each(net: Inception) -> None:
    pool, spatial = pool_and_spatial(net, images())
    assert pool.shape == (2, POOL) and spatial.shape == (2, SPATIAL)
    assert spatial.shape[1] == 2023 and (spatial >= 0).all()  # after the ReLU
    assert net.logits(pool).shape == (2, LOGITS)
    alone, _ = pool_and_spatial(net, images()[1:])
    torch.testing.assert_close(alone, pool[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pool[0], pool[1])
    assert torch.equal(net.logits(torch.zeros(1, POOL)), torch.zeros(1, LOGITS))  # without bias
    with pytest.raises(DataError, match="expected uint8"):
        net.pooled(images().float())


@pytest.mark.parametrize(("height", "width"), [(2, 3), (299, 299), (64, 500)])
def test_resize_is_tensorflow_ones(height: int, width: int) -> None:
    """Pixel i of the output lies at i * size / 299 of the input; the last one is repeated."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(256, (1, 2, height, width), generator=rng).float()
    result = resize_tf1(x, 299)
    if (height, width) == (299, 299):
        assert torch.equal(result, x)
    for i, j in ((0, 0), (298, 298), (150, 7), (17, 260)):
        v, u = i * height / 299, j * width / 299
        y, z, p, q = int(v), int(u), v - int(v), u - int(u)
        y2, z2 = min(y + 1, height - 1), min(z + 1, width - 1)
        top = x[0, :, y, z] * (1 - q) + x[0, :, y, z2] * q
        low = x[0, :, y2, z] * (1 - q) + x[0, :, y2, z2] * q
        assert torch.allclose(result[0, :, i, j], top * (1 - p) + low * p, atol=0.02), (i, j)


def test_weights_are_checked(
    tmp_path: Path, weights: Path, net: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "erw" / "weights" / "pt_inception-2015-12-05-6726825d.pth"
    named.parent.mkdir(parents=True)
    shutil.copy(weights, named)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = load_inception()
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    path = tmp_path / "other.pth"
    old = {k: v for k, v in random_state().items() if "num_batches" not in k}
    torch.save(old, path)  # as PyTorch 0.3 saved it
    assert torch.equal(load_inception(path).pooled(images()), net.pooled(images()))
    torch.save(old | {"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(
        CheckpointError, match=r"no Inception of 2015: 1 of another shape: fc\.weight"
    ):
        load_inception(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="plain tensors"):
        load_inception(path)


def test_files_with_code_are_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match="not run"):
        load_inception(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_no_weights_says_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"https://github.com/mseitzer.*--weights"):
        find_inception()
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_inception("nothing.pth")
