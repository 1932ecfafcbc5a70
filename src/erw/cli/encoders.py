"""`erw encoders`: vision encoders by name, and which of them suits some images."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from erw import data
from erw.cli.prepare import Reading, given
from erw.cli.settings import Settings
from erw.encoders.names import at_hand, described
from erw.errors import ConfigError, DataError, raised_as
from erw.io import write_json
from erw.log import Progress

ALL = Reading()


def encoders(
    reading: Settings[Reading] = ALL,
    *,
    rank: str | None = None,
    encoders: tuple[str, ...] = (),
    image_size: int = 64,
    count: int = 500,
    out: str | None = None,
) -> None:
    """List the vision encoders; with --rank, say which of them suits some images.

    spatial: how much more alike near tokens are than far ones. knn: accuracy of an image's class by
    its 20 nearest, never of the same glyph. nearness: cosine of a token to the mean one.

    Args:
        rank: images, as of erw prepare.
        encoders: as of erw prepare; none: what needs no download or is in the hub's local cache.
        image_size: side of the cropped square.
        count: how many images, evenly spread.
        out: write the table as JSON too.
    """
    if rank is None:
        if encoders or out or reading != ALL:
            raise ConfigError("to rank encoders give --rank IMAGES; without it they are listed")
        return print("\n".join(f"{name:<24}{width:>6}  {at}" for name, width, at in described()))
    composed: dict[str, Any] = {"size": image_size, "count": count} if rank in data.BUILT_IN else {}
    source = data.open_source(rank, **given(asdict(reading)), **composed)
    import numpy as np
    import torch

    from erw.data.images import crop
    from erw.dist import current
    from erw.encoders.registry import load_encoder
    from erw.evaluation.ranking import rate

    rows = sorted({int(row) for row in np.linspace(0, len(source) - 1, max(1, count))})
    pixels, labels = list[np.ndarray](), list[int]()
    for row in rows:
        with raised_as(DataError, f"{source.location(row)}: take it out"):
            image, label = source[row]
            pixels.append(crop(image, image_size))
            labels.append(label)
    images = torch.from_numpy(np.stack(pixels))
    _, origins = np.unique([str(source.origin(row)) for row in rows], return_inverse=True)
    labelled = images.permute(0, 3, 1, 2), torch.tensor(labels), torch.from_numpy(origins)
    names, table = encoders or at_hand(), []
    with Progress("rank", len(names), unit="encoders") as progress:
        for name in names:
            table.append(rate(load_encoder(name, device=str(current().device)), *labelled))
            progress.update()
    table.sort(key=lambda x: x["spatial"] if x["knn"] is None else x["knn"], reverse=True)
    print(f"{'':<24}" + "".join(f"{name:>9}" for name in list(table[0])[1:]))
    for name, grid, width, *numbers in (row.values() for row in table):
        cells = ["-" if x is None else f"{x:.3f}" for x in numbers]
        print(f"{name:<24}" + "".join(f"{x:>9}" for x in (f"{grid[0]} x {grid[1]}", width, *cells)))
    if out:
        settings = {"images": rank, "image_size": image_size, "count": len(rows)} | asdict(reading)
        write_json(Path(out), settings | {"encoders": table})
