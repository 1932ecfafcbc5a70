"""The 2015 Inception network: its architecture, its resize, and weights from every kind of file."""

import hashlib
import importlib
import importlib.util
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from erw.errors import CheckpointError, DataError
from erw.evaluation.graphdef import read_graph
from erw.evaluation.inception import LOGITS, POOL, SPATIAL, Inception, folded, resize_tf1
from erw.evaluation.inception_table import BLOCKS, STEM, names
from erw.evaluation.inception_weights import find_inception, load_inception
from helpers.inception_parts import const, graph_of, message, node, random_state


def pictures(count: int = 2, *, side: int = 40) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=rng, dtype=torch.uint8)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def net(state: dict[str, Tensor]) -> Inception:
    made = Inception()
    made.load_state_dict(folded(state))
    return made


def test_names_are_those_that_are_published() -> None:
    lines = (Path(__file__).parents[1] / "golden" / "inception_names.txt").read_text().splitlines()
    published = dict(line.split() for line in lines if not line.startswith("#"))
    assert names() == published and len(published) == 94


def test_every_layer_is_torch_fidelitys(net: Inception, state: dict[str, Tensor]) -> None:
    """With shared random weights, layer by layer; only the module of the network is loaded."""
    found = importlib.util.find_spec("torch_fidelity")
    if found is None:
        pytest.skip("torch-fidelity is not at hand: pip install --no-deps torch-fidelity")
    package = types.ModuleType("torch_fidelity")  # its __init__ would import torchvision
    package.__path__ = list(found.submodule_search_locations or [])
    before = set(sys.modules)
    sys.modules["torch_fidelity"] = package
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]

    class Theirs(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined, misc]
        def load_state_dict(self, state_dict: object, **kwargs: object) -> object:
            return torch.nn.Module.load_state_dict(self, state, strict=False)

    loading, torch.load = torch.load, lambda *args, **kwargs: state  # no file, no download
    try:
        theirs = Theirs("x", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")
    finally:
        torch.load = loading
    outputs: dict[str, Tensor] = {}
    for name in [conv.name for conv in STEM] + [spec.name for spec in BLOCKS]:
        part = theirs.get_submodule(name)
        part.register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o.clone()}))
    part = theirs.Mixed_6d.branch1x1
    part.register_forward_hook(lambda m, i, o: outputs.update({"spatial": o.clone()}))
    images = pictures()
    pool, logits = theirs(images)
    for name, ours in net.layers(images):
        scale = outputs[name].abs().max()
        assert (ours - outputs[name]).abs().max() < 1e-4 * scale, name
    ours = net(images)
    torch.testing.assert_close(ours.pool, pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.logits(ours.pool), logits, rtol=1e-4, atol=1e-4)
    spatial = outputs["spatial"][:, :7].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(ours.spatial, spatial, rtol=1e-4, atol=1e-4)


def test_features_have_adms_shapes_and_follow_each_image_alone(net: Inception) -> None:
    images = pictures()
    both = net(images)
    assert both.pool.shape == (2, POOL) and both.spatial.shape == (2, SPATIAL)
    assert both.spatial.shape[1] == 2023 and (both.spatial >= 0).all()  # behind the ReLU
    assert net.logits(both.pool).shape == (2, LOGITS)
    alone = net(images[1:])
    torch.testing.assert_close(alone.pool, both.pool[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both.pool[0], both.pool[1])
    assert torch.equal(net.logits(torch.zeros(1, POOL)), torch.zeros(1, LOGITS))  # without bias
    assert net.train().training is False
    with pytest.raises(DataError, match="expected uint8"):
        net(images.float())


@pytest.mark.parametrize(("height", "width"), [(2, 3), (299, 299), (64, 500)])
def test_resize_is_tensorflow_ones(height: int, width: int) -> None:
    """Pixel i of the output lies at i * size / 299 of the input; the last one is held."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(256, (1, 2, height, width), generator=rng).float()
    made = resize_tf1(x, 299)
    if (height, width) == (299, 299):
        assert torch.equal(made, x)
    for i, j in ((0, 0), (298, 298), (150, 7), (17, 260)):
        v, u = i * height / 299, j * width / 299
        y, z, p, q = int(v), int(u), v - int(v), u - int(u)
        y2, z2 = min(y + 1, height - 1), min(z + 1, width - 1)
        top = x[0, :, y, z] * (1 - q) + x[0, :, y, z2] * q
        low = x[0, :, y2, z] * (1 - q) + x[0, :, y2, z2] * q
        assert torch.allclose(made[0, :, i, j], top * (1 - p) + low * p, atol=0.02), (i, j)


def test_weights_from_a_file_of_pytorch(
    tmp_path: Path, state: dict[str, Tensor], net: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    extra = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(state | extra, path)
    with pytest.raises(CheckpointError, match="expected 6726825d"):
        load_inception(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("ERW_WEIGHTS", str(tmp_path))
    loaded = load_inception(sha256=digest[:8])
    assert loaded.file == path.name and loaded.sha256 == digest
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value), name
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="another network"):
        load_inception(path, sha256="")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="plain weights"):
        load_inception(path, sha256="")


def test_files_with_code_are_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match="not run"):
        load_inception(tmp_path / "trap.pth", sha256="")
    assert not (tmp_path / "ran").exists()


def test_no_weights_says_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ERW_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"https://github.com/mseitzer.*--weights"):
        find_inception()
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_inception("nothing.pth")


def test_weights_from_tensorflows_graph(
    tmp_path: Path, state: dict[str, Tensor], net: Inception
) -> None:
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(graph_of(state))
    loaded = load_inception(path)
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value), name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        load_inception(path)
    path.write_bytes(whole.replace(b"Relu", b"Conv"))
    with pytest.raises(CheckpointError, match="mixed_6/conv is Conv"):
        load_inception(path)


def test_graph_reader_takes_every_way_to_store_floats(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 0.25], "<f4")
    packed = message((5, values.tobytes()))
    singly = b"".join(b"\x2d" + struct.pack("<f", v) for v in values)  # field 5, 32 bits each
    filled = message((5, struct.pack("<f", 7.0)))
    path = tmp_path / "graph.pb"
    path.write_bytes(
        const("content", (3,), message((4, values.tobytes())))
        + const("packed", (3, 1), packed)
        + const("singly", (3,), singly)
        + const("filled", (2, 2), filled)
        + const("scalar", (), filled)
        + const("whole numbers", (1,), message((7, 1)), dtype=3)
        + node("sum", "Add", inputs=("a", "b"))
        + message((4, b"versions"), (9, 300))  # fields of later TensorFlows are passed over
    )
    graph = read_graph(path)
    assert graph.ops["sum"] == "Add" and graph.ops["content"] == "Const"
    for name in ("content", "singly"):
        assert np.array_equal(graph.constants[name], values)
    assert np.array_equal(graph.constants["packed"], values[:, None])
    assert np.array_equal(graph.constants["filled"], np.full((2, 2), 7))
    assert graph.constants["scalar"] == 7 and "whole numbers" not in graph.constants


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"hello, this is no graph", b"\x0a\x7f"])
def test_what_is_no_graph_says_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pb").write_bytes(data)
    with pytest.raises(CheckpointError, match="no frozen TensorFlow graph"):
        read_graph(tmp_path / "x.pb")
