"""Exported models on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from erw.errors import CheckpointError, ConfigError, one_line
from erw.interop.export import export
from erw.interop.metadata import METADATA
from erw.interop.pretrained import REPO
from erw.training.trained import Trained


def push_to_hub(
    source: str | Path | Trained,
    repo: str,
    *,
    out: str | Path | None = None,
    private: bool | None = None,
    **told: Any,
) -> str:
    """Export a model and upload the folder as the repository `repo`; returns its address.

    Args:
        source: as `erw.export` takes it; an exported folder is uploaded as it is.
        repo: "owner/name"; made if it is not there.
        out: the exported folder; default: beside the source, its name with "-export" behind it.
        private: of a new repository; None: as the account has it.
        told: as for `erw.export`.

    Raises:
        ConfigError: no such name, or `out` is missing for a loaded model.
        CheckpointError: as `export`; or the hub refuses or cannot be reached. The folder is then
            complete and can be pushed later.
    """
    if not REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository on the hub; expected owner/name")
    if isinstance(source, str | Path):
        source = Path(source).expanduser()
        done = out is None and (source / METADATA).is_file()
        folder = source if done else Path(out or default_out(source))
        if done and told:
            raise ConfigError(f"{folder} is exported already; leave out {', '.join(told)}")
    elif out is None:
        raise ConfigError("out= is missing: the folder in which a loaded model is exported")
    else:
        done, folder = False, Path(out)
    if not done:
        export(source, folder, repo=repo, **told)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="erw export")
    except Exception as error:  # network, login and rights come as many types
        line = one_line(error)
        raise CheckpointError(
            f"could not push to {repo} ({line}); {folder} is complete, connect and log in (hf auth "
            f"login), then: erw export {folder} --push {repo}"
        ) from error
    return str(info.commit_url).partition("/commit/")[0]


def default_out(source: Path) -> Path:
    """runs/mine -> runs/mine-export, last.pt -> last-export."""
    name = source.resolve().name if source.is_dir() else source.stem
    return source.resolve().parent / f"{name}-export"
