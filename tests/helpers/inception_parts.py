"""Random weights for the 2015 Inception network, and a writer of TensorFlow graphs to hold them."""

import torch
from torch import Tensor

from erw.evaluation.inception import Inception
from erw.evaluation.inception_table import names


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights under their names in PyTorch files; He's scale, batch norms off the identity."""
    rng = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, p in Inception().state_dict().items():
        if name.startswith("fc."):
            state[name] = 0.1 * torch.randn(p.shape, generator=rng)
        elif name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            scale = (2 / p[0].numel()) ** 0.5
            state[f"{layer}.conv.weight"] = scale * torch.randn(p.shape, generator=rng)
            for key, (middle, spread) in {
                "weight": (1.0, 0.1),
                "bias": (0.0, 0.1),
                "running_mean": (0.0, 0.1),
                "running_var": (1.0, 0.1),
            }.items():
                noise = torch.rand(len(p), generator=rng) * 2 - 1
                state[f"{layer}.bn.{key}"] = middle + spread * noise
    return state


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """Fields in Protocol Buffers' wire format: numbers as varints, the rest with its length."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(out)


def node(name: str, op: str, *, inputs: tuple[str, ...] = (), value: bytes | None = None) -> bytes:
    """A NodeDef inside a GraphDef, with a device and some attribute that nobody reads."""
    attributes = [(5, message((1, b"dtype"), (2, message((6, 1)))))]
    if value is not None:
        attributes.append((5, message((1, b"value"), (2, message((8, value))))))
    sources = [(3, source.encode()) for source in inputs]
    return message((1, message((1, name.encode()), (2, op.encode()), *sources, *attributes)))


def const(name: str, shape: tuple[int, ...], values: bytes, *, dtype: int = 1) -> bytes:
    """A constant; `values` are the fields of its TensorProto that hold them."""
    dimensions = message(*((2, message((1, size))) for size in shape))
    return node(name, "Const", value=message((1, dtype), (2, dimensions)) + values)


def graph_of(state: dict[str, Tensor]) -> bytes:
    """A frozen graph with all constants of the network, as `classify_image_graph_def.pb` has."""

    def write(name: str, value: Tensor) -> bytes:
        data = value.contiguous().numpy().astype("<f4").tobytes()
        return const(name, tuple(value.shape), message((4, data)))

    parts: list[bytes] = []
    for ours, theirs in names().items():
        kernel = state[f"{ours}.conv.weight"].permute(2, 3, 1, 0)
        parts.append(write(f"{theirs}/conv2d_params", kernel))
        for key, name in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "moving_mean"),
            ("running_var", "moving_variance"),
        ):
            parts.append(write(f"{theirs}/batchnorm/{name}", state[f"{ours}.bn.{key}"]))
        parts.append(node(theirs, "Relu", inputs=(f"{theirs}/batchnorm",)))
    parts.append(node("pool_3", "AvgPool", inputs=("mixed_10/join",)))
    parts.append(write("softmax/weights", state["fc.weight"].T))
    parts.append(write("softmax/biases", state["fc.bias"]))
    return b"".join(parts)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
