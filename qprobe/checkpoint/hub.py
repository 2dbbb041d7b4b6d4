"""Checkpoints and manifests that lie on the Hugging Face hub: fetched into its cache, and written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qprobe.errors import ModelError
from qprobe.loading.source import is_hub_id
from qprobe.system.wording import SAID, shortened

MANIFEST_FILE = "skiplist.json"  # in a run folder, and in the folder that `qprobe quantize` writes
CODE = ("*.py", "*.pyc", "*.bin", "*.pt", "*.pth", "*.pkl")  # never fetched: none of it is read here


def fetched(where: str | Path, allow_downloads: bool = False) -> Path:
    """`where` itself if it is here; for a hub id the folder of its files in the hub's cache.

    allow_downloads: fetch what the cache lacks, where HF_HUB_OFFLINE does not forbid it. A path that is not
    here is given back, for whoever reads it to say so. Raises ModelError for files that cannot be had.
    """
    path = Path(where)
    if path.exists() or not is_hub_id(path.as_posix()) or path.suffix == ".json":
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            path.as_posix(), ignore_patterns=list(CODE), local_files_only=not allow_downloads
        )
    except (OSError, ValueError) as error:
        if isinstance(error, LocalEntryNotFoundError) and not allow_downloads:
            raise ModelError(
                f"{where} is no folder here, and the hub's cache holds no files of that name. Pass "
                "--allow-downloads to fetch them, or check the path."
            ) from error
        said = shortened(str(error).strip().splitlines()[0] if str(error).strip() else "", SAID)
        raise ModelError(
            f"The files of {where!s} cannot be had: {said} Check the name and the network, run `hf auth "
            "login` where it is private, or pass a local folder."
        ) from error
    return Path(found)


def manifest_in(where: str | Path, allow_downloads: bool = False) -> Path:
    """The manifest at `where`: the file itself, or that in a folder or in a checkpoint on the hub.

    Errors as of `fetched`, and for a folder without one.
    """
    found = fetched(where, allow_downloads)
    if not found.is_dir():
        return found
    path = found / MANIFEST_FILE
    if not path.is_file():
        raise ModelError(
            f"{where} holds no {MANIFEST_FILE}, which `qprobe quantize` and `qprobe scan` write. Pass the "
            "manifest."
        )
    return path


def refuse_to_push(repo: str) -> None:
    """Raises ModelError for a name that is none on the hub."""
    if not is_hub_id(repo):
        raise ModelError(f"{repo!r} is no name on the hub. Pass owner/name.")


def push(folder: Path, repo: str, api: Any = None) -> str:
    """The address of the commit that holds the files of `folder` in `repo`, made private where it is new.

    api: a huggingface_hub.HfApi. Raises ModelError where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    refuse_to_push(repo)
    hub = HfApi() if api is None else api
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo, folder_path=str(folder), commit_message="Checkpoint written by qprobe quantize"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = shortened(str(error).strip().splitlines()[0] if str(error).strip() else "", SAID)
        raise ModelError(
            f"{repo} on the hub cannot be written: {said} {folder} holds the whole checkpoint. Run `hf auth "
            "login`, check the name, and upload it with `hf upload`."
        ) from error
    return str(commit.commit_url)
