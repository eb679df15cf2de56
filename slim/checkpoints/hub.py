"""Weights on the Hugging Face hub, through `huggingface_hub` (extra `hub`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.core.extras import ExtraMissing
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.source import HUB_NAME


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How weights are fetched from the hub. All arguments are as in `huggingface_hub.snapshot_download`.

    Attributes
    ----------
    revision : str or None
        A tag, branch or commit.
    cache_dir : path or None
        Folder of the downloaded files.
    token : str, bool or None
        For private models; by default the token of `hf auth login`.
    local_files_only : bool
        Use the cache only, without a connection.
    """

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False


class HubError(CheckpointError):
    """The hub does not provide, or does not take, a model."""


def fetch(source: str, name: str, options: HubOptions, files: Sequence[str], expected: str) -> Path:
    """Download a model into the cache of `huggingface_hub`.

    Parameters
    ----------
    source : str
        As the user named it, for errors.
    name : str
        OWNER/NAME.
    options : HubOptions
    files : sequence of str
        Patterns of the files that are needed.
    expected : str
        What could have been given instead, for errors.

    Raises
    ------
    HubError
        If `huggingface_hub` is not installed, or the hub does not provide the model.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = "If it is a name on the hub, pip install 'slim-brain[hub]'"
        raise HubError(source, "", "no such folder", expected, hint) from None
    try:
        return Path(
            snapshot_download(
                name,
                revision=options.revision,
                cache_dir=options.cache_dir,
                token=options.token,
                local_files_only=options.local_files_only,
                allow_patterns=[*files],
            )
        )
    except Exception as error:  # many types: unknown or private name, no network, no space
        got = f"no such folder, and the hub does not provide it ({type(error).__name__}: {error})"
        raise HubError(source, "", got, expected, "Check the name, the connection and your access") from None


def push(folder: Path, name: str, *, private: bool, token: str | bool | None, message: str) -> str:
    """Upload an exported folder as a model; makes the model if it does not exist.

    Returns
    -------
    str
        The URL of the commit.

    Raises
    ------
    ExtraMissing
        If `huggingface_hub` is not installed.
    HubError
        If the hub refuses the model.
    """
    if HUB_NAME.fullmatch(name) is None or "@" in name:
        raise HubError("push_to_hub", "repo_id", name, "OWNER/NAME")
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ExtraMissing(["huggingface_hub"]) from None
    try:
        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # many types: no access, no network, a name that is not valid
        got = f"a model that the hub does not take ({type(error).__name__}: {error})"
        raise HubError(name, "", got, "a model of yours", "Check the name, the connection and your token") from None
