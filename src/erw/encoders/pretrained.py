"""Pretrained weights: by name and revision from the hub, or from a local folder, and whole."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from erw.errors import CheckpointError, DataError, one_line


class Hub(NamedTuple):
    """A repository on the Hugging Face hub. ``revision``: a commit, or None for the newest."""

    repo: str
    revision: str | None
    subfolder: str = ""


def model_type(folder: Path) -> str:
    """``model_type`` in the folder's config.json; ``CheckpointError`` if there is none."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text("utf-8")).get("model_type")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no config.json: expected a folder as transformers saves it"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    return str(found)


def pretrained(
    model: str,
    types: tuple[str, ...],
    hub: Hub | None,
    folder: Path | None,
    *,
    name: str,
    **options: Any,
) -> Any:
    """The transformers model of class ``model`` in float32, with every weight it needs.

    Raises ``DataError`` without transformers, ``CheckpointError`` where the weights cannot be had,
    are damaged, of another family (``types``), or leave a part of the model without weights.
    """
    try:
        import transformers
    except ImportError as error:
        raise DataError(
            f"encoder {name} needs transformers, which cannot be imported ({error}): "
            'pip install "erw[encoders]"'
        ) from error
    if folder is not None and (found := model_type(folder)) not in types:
        raise CheckpointError(
            f"{folder} holds a model of type {found!r}; {name} expects {' or '.join(types)}"
        )
    assert folder is not None or hub is not None
    alone = folder is not None or os.environ.get("ERW_OFFLINE") == "1"
    where: dict[str, Any] = {"local_files_only": alone}
    if hub is not None and folder is None:
        where["revision"] = hub.revision
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would warn of is raised below
    try:
        network, info = getattr(transformers, model).from_pretrained(
            str(folder or (hub and hub.repo)),
            **where,
            **options,
            dtype="float32",
            output_loading_info=True,
        )
    except Exception as error:  # network, gate, disk and damage come as many types
        raise _unavailable(name, hub, folder, error) from error
    finally:
        transformers.logging.set_verbosity(level)
    wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if wrong:
        raise CheckpointError(
            f"weights of {name} in {folder or (hub and hub.repo)} are not whole: {len(wrong)} are "
            f"missing or of another shape, first {wrong[0]!r}"
        )
    return network


def _unavailable(
    name: str, hub: Hub | None, folder: Path | None, error: Exception
) -> CheckpointError:
    line = one_line(error)
    if folder is not None or hub is None:
        return CheckpointError(f"weights of {name} in {folder} cannot be loaded: {line}")
    return CheckpointError(
        f"weights of {name} ({hub.repo} on the Hugging Face hub) cannot be fetched: {line}; "
        f"connect and log in where it asks so, or name a local folder: {name}=FOLDER"
    )
