"""Constants of a frozen TensorFlow graph, read from the wire format without TensorFlow.

A `GraphDef` is a list of nodes, field 1, in Protocol Buffers' wire format. Of each node these
fields matter; everything else is skipped. Nothing in the file is run.

| message     | field: meaning                                                          |
| NodeDef     | 1 name, 2 op, 5 attributes (map entries: 1 key, 2 AttrValue)            |
| AttrValue   | 8 TensorProto                                                           |
| TensorProto | 1 dtype (1: float32), 2 shape (2 dimensions: 1 size), 4 bytes, 5 floats |

Source: tensorflow/core/framework/*.proto; protobuf.dev/programming-guides/encoding.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erw.errors import CheckpointError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOAT32 = 1


class Graph(NamedTuple):
    """ops: operation by node name. constants: float32 arrays by node name."""

    ops: dict[str, str]
    constants: dict[str, np.ndarray]


def read_graph(path: str | Path) -> Graph:
    """The nodes of a frozen graph (`.pb`).

    Raises FileNotFoundError, or CheckpointError for a file that is cut short or no graph.
    """
    path = Path(path)
    data = memoryview(path.read_bytes())
    graph = Graph({}, {})
    try:
        for field, node in fields(data):
            if field == 1 and isinstance(node, memoryview):
                _node(node, graph)
    except (ValueError, struct.error, IndexError) as error:
        raise CheckpointError(
            f"{path} is no frozen TensorFlow graph, or cut short ({error}): download it again"
        ) from error
    if not graph.ops:
        raise CheckpointError(f"{path} is no frozen TensorFlow graph: it has no nodes")
    return graph


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message; numbers as int, the rest as the bytes they are.

    Raises ValueError for bytes that are no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if field == 0 or at + size > len(data):
            raise ValueError(f"field {field} of {size} bytes at byte {at} of {len(data)}")
        yield field, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"number of more than 64 bits at byte {at}")


def _node(data: memoryview, graph: Graph) -> None:
    name = op = ""
    tensor: memoryview | None = None
    for field, value in fields(data):
        if isinstance(value, int):
            continue
        if field == 1:
            name = bytes(value).decode()
        elif field == 2:
            op = bytes(value).decode()
        elif field == 5:
            entry = dict(fields(value))
            key, attribute = entry.get(1), entry.get(2)
            if isinstance(key, memoryview) and bytes(key) == b"value":
                assert isinstance(attribute, memoryview)
                found = dict(fields(attribute)).get(8)
                tensor = found if isinstance(found, memoryview) else None
    graph.ops[name] = op
    if op == "Const" and tensor is not None:
        array = _tensor(tensor)
        if array is not None:
            graph.constants[name] = array


def _tensor(data: memoryview) -> np.ndarray | None:
    """A float32 tensor; None for another type. Fewer values than elements: the last one repeats."""
    shape: list[int] = []
    values: list[np.ndarray] = []
    for field, value in fields(data):
        if field == 1 and value != FLOAT32:
            return None
        if isinstance(value, int):
            continue
        if field == 2:
            shape = [_size(d) for f, d in fields(value) if f == 2 and isinstance(d, memoryview)]
        elif field in (4, 5):  # whole, packed or one by one: the same little-endian floats
            values.append(np.frombuffer(value, "<f4"))
    flat = np.concatenate(values) if values else np.zeros(1, np.float32)
    missing = math.prod(shape) - len(flat)
    if missing < 0 or not len(flat):
        raise ValueError(f"a tensor of shape {tuple(shape)} with {len(flat)} values")
    if missing:
        flat = np.concatenate([flat, np.full(missing, flat[-1])])
    return flat.astype(np.float32, copy=True).reshape(shape)


def _size(dimension: memoryview) -> int:
    size = dict(fields(dimension)).get(1, 0)
    if not isinstance(size, int) or size > 1 << 31:
        raise ValueError("a dimension without a size")
    return size
