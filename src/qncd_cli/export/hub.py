"""An exported folder on a model hub."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ArtifactError, ConfigError


def check_id(name: str) -> None:
    """Raises ConfigError for what is no id of a repository, owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {name}: {error}", "an id is OWNER/NAME") from error
    if name.count("/") != 1:
        raise ConfigError(f"--push-to-hub {name}: names no owner", "an id is OWNER/NAME")


def push(folder: Path, name: str) -> str:
    """Upload a folder in one commit, into a repository that is made where there is none.

    The hub is that of HF_ENDPOINT, the user the one that huggingface_hub knows. Returns the
    commit's address. Raises ArtifactError where that fails; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="qncd-cli")
    try:
        api.create_repo(name, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Quantized by qncd"
        )
    except Exception as error:  # of requests, of the hub, of its uploader: all mean the same here
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(
            f"{name}: cannot be pushed: {said}",
            f"the folder {folder} is written; may you write there? log in with: hf auth login",
        ) from error
    return str(done.commit_url)
