"""Upload of exported models to the Hugging Face hub."""

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
    **options: Any,
) -> str:
    """Export a model and upload the folder as the repository `repo`; returns its address.

    Args:
        source: as `erw.export` takes it; an exported folder is uploaded as it is.
        repo: "owner/name"; created if it does not exist.
        out: the exported folder; default: next to the source, its name with "-export" appended.
        private: visibility of a new repository; None: the account's default.
        options: as for `erw.export`.

    Raises:
        ConfigError: no such name, or `out` is missing for a loaded model.
        CheckpointError: as `export`; or the hub refuses or cannot be reached. The folder is then
            complete and can be pushed later.
    """
    if not REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository on the hub; expected owner/name")
    if out is None and isinstance(source, Trained):
        raise ConfigError("out= is missing: the folder in which a loaded model is exported")
    path = Path() if isinstance(source, Trained) else Path(source).expanduser()
    if out is None and (path / METADATA).is_file():
        folder = path
        if options:
            raise ConfigError(f"{folder} is exported already; leave out {', '.join(options)}")
    else:
        name = path.resolve().name if path.is_dir() else path.stem
        folder = Path(out) if out else path.resolve().parent / f"{name}-export"
        export(source, folder, repo=repo, **options)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="erw export")
    except Exception as error:  # network, login and rights raise many types
        raise CheckpointError(
            f"could not push to {repo} ({one_line(error)}); {folder} is complete, connect and log "
            f"in (hf auth login), then: erw export {folder} --push {repo}"
        ) from error
    return str(info.commit_url).partition("/commit/")[0]
