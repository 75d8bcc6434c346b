"""A model's place on this machine: a local path as it is, a Hugging Face hub id after its download.

The hub's library keeps the files in its cache, resumes downloads, and reads HF_TOKEN, HF_ENDPOINT, HF_HOME
and HF_HUB_OFFLINE. Without a connection, a model that is in the cache is used from there.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import yaml
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jquant.core import OutputError, UserError
from jquant.io.paths import AnyPath, is_url, open_url

_HUB_ID = re.compile(r"(hf:)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<tag>[\w][\w./-]*))?", re.ASCII)
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".json", ".pt", ".pth")
_SHARD = re.compile(r"-(\d{5})-of-\d{5}(?=\.gguf$)")
_BESIDE_WEIGHTS = re.compile(r"[^/]+\.(json|jinja)|tokenizer\.model")
_TIMEOUT = 10  # seconds for an answer, not for a download
# What the HTTP library of any version raises: its base is a base of the hub's own error.
_NETWORK_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
)


class Wanted(NamedTuple):
    """What to download of a repository, and where the model then begins: "" is the folder itself."""

    files: tuple[str, ...]
    start: str


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> AnyPath:
    """The folder or file of `model`: a path, a URL, or a hub id, which is downloaded.

    A hub id is "org/name"; "org/name:Q8_0" picks a GGUF file by its type, "org/name:file.gguf" by its name.
    "hf:org/name" is never taken for a path.
    revision: branch, tag or commit. token, endpoint: in place of HF_TOKEN and HF_ENDPOINT.

    Raises UserError where there is no such path, repository, revision or file, where the hub refuses access,
    and where it cannot be reached and the cache has no copy.
    """
    if is_url(model):
        return open_url(model)
    local = os.path.expanduser(model)  # noqa: PTH111  (unlike pathlib's, these two never raise)
    if os.path.exists(local):  # noqa: PTH110
        return Path(local)
    match = _HUB_ID.fullmatch(model)
    if match is None or match["repo"].endswith(_FILE_SUFFIXES):
        raise UserError(f"{model!r}: no such file or folder (a hub id looks like org/name or org/name:Q8_0).")
    parent = model.partition("/")[0]
    if Path(parent).is_dir():
        raise UserError(
            f"{model}: nothing of this name in the folder {parent}; write hf:{model} if the hub is meant."
        )
    repo, tag = match["repo"], match["tag"]

    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    try:
        info = api.model_info(repo, revision=revision, timeout=_TIMEOUT)
        wanted = select([file.rfilename for file in info.siblings or ()], tag, repo)
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            endpoint=endpoint,
            etag_timeout=_TIMEOUT,
            allow_patterns=[_literal(name) for name in wanted.files],
        )
    except (HFValidationError, *_NETWORK_ERRORS) as error:
        if (lasting := _lasting(error, repo, revision, api.endpoint)) is not None:
            raise lasting from None
        return _from_cache(repo, revision, cache_dir, tag, error)
    return Path(folder) / wanted.start


def name_of(model: str) -> str | None:
    """The name in a hub id; None for a path. A download lies in a folder that is named after its commit."""
    local = os.path.expanduser(model)  # noqa: PTH111  (as in `resolve`)
    if is_url(model) or os.path.exists(local):  # noqa: PTH110
        return None
    return re.split(r"[/:]", model.removeprefix("hf:"))[1]


def folder_name(folder: AnyPath) -> str:
    """What people call the model in a folder: its name, or of a snapshot in the hub's cache
    (models--ORG--NAME/snapshots/COMMIT) the repository's."""
    place = folder.resolve()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return place.name


def select(names: Sequence[str], tag: str | None, repo: str) -> Wanted:
    """Which of a repository's files to download.

    Without a tag: the safetensors model at the top with its configuration and tokenizer, or the only GGUF
    file. With one: the GGUF file, with all its shards, of this name or with this type in its name.
    """
    weights = [name for name in names if re.fullmatch(r"[^/]+\.safetensors", name)]
    # Some repositories hold the weights twice, the second time as "consolidated…"; others add adapters.
    weights = [name for name in weights if name.startswith("model")] or weights
    if tag is None and weights:
        return Wanted((*weights, *filter(_BESIDE_WEIGHTS.fullmatch, names)), "")

    ggufs: dict[str, list[str]] = {}  # name without shard number -> its files
    for name in sorted(names):
        if name.endswith(".gguf") and not re.search("mmproj|imatrix", name):
            ggufs.setdefault(_SHARD.sub("", name), []).append(name)
    if tag is not None and tag.endswith(".gguf"):
        found = [files for whole, files in ggufs.items() if tag in (whole, *files)]
    elif tag is not None:
        as_part = re.compile(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [files for whole, files in ggufs.items() if as_part.search(whole)]
    else:
        found = list(ggufs.values())
    if len(found) == 1:
        return Wanted(tuple(found[0]), found[0][0])
    if not ggufs:
        raise UserError(f"{repo}: the repository has no {'' if tag else 'safetensors or '}GGUF files.")
    choices = ", ".join(f"{repo}:{files[0]}" for files in (found or ggufs.values()))
    what = f"several GGUF files match {tag or 'it'}" if found else f"no GGUF file matches {tag}"
    raise UserError(f"{repo}: {what}; choose one of {choices}.")


def _from_cache(
    repo: str, revision: str | None, cache_dir: str | Path | None, tag: str | None, error: Exception
) -> Path:
    """The model as an earlier download left it; UserError with the network's error if there is none."""
    try:
        folder, names = _cached(repo, revision, cache_dir, "model")
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repo}: cannot download it from the hub ({_reason(error)}), and the cache has no copy; "
            "check the connection, or give the path of a local folder or GGUF file."
        ) from None
    return folder / select(names, tag, repo).start


def _cached(
    repo: str, revision: str | None, cache_dir: str | Path | None, kind: str
) -> tuple[Path, list[str]]:
    """(folder, names of the files in it) of what is in the cache."""
    found = huggingface_hub.snapshot_download(
        repo,
        repo_type=kind,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=True,
        allow_patterns=[],
    )
    folder = Path(found)
    return folder, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and _status(error) is None:
        return f"{error.strerror}"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _lasting(
    error: Exception, repo: str, revision: str | None, endpoint: str, kind: str = "model"
) -> UserError | None:
    """What the user is told of an error that another try, or the cache, will not mend; None for others."""
    if isinstance(error, HFValidationError):
        return UserError(f"{repo!r}: neither a local path nor a valid hub id ({error}).")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{repo}: the disk is full; free some space in the hub's cache.")
    known = isinstance(error, (GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError))
    if not known and _status(error) not in (401, 403):
        return None
    where = repo if kind == "model" else f"datasets/{repo}"
    return UserError(_refusal(repo, revision, error, endpoint, where))


def _refusal(repo: str, revision: str | None, error: Exception, endpoint: str, where: str) -> str:
    """One line for an answer of the hub that another try will not change. where: the repository's page."""
    what = "repository" if where == repo else "dataset"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo}: the repository has no revision {revision!r}; name a branch, tag or commit that it has."
        )
    if isinstance(error, GatedRepoError) or _status(error) == 403:
        return (
            f"{repo}: access is restricted; ask for it at {endpoint}/{where}, then set HF_TOKEN to a token "
            "of that account."
        )
    if _status(error) == 401:
        return (
            f"{repo}: neither a local path nor a public {what} of {endpoint}; if it is private, set "
            "HF_TOKEN to a valid token that may read it."
        )
    return f"{repo}: neither a local path nor a {what} of {endpoint}; check the spelling."


def _status(error: Exception) -> int | None:
    """The HTTP status of the hub's answer, if it answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _literal(name: str) -> str:
    """A file name as a pattern that matches only itself."""
    return re.sub(r"([\[?*])", r"[\1]", name)


def dataset(
    repo: str, *, cache_dir: str | Path | None = None, endpoint: str | None = None
) -> tuple[list[str], Path | None]:
    """(names of the files of a dataset, its README.md, downloaded).

    Without a connection, of what is in the cache. Raises UserError as `resolve` does.
    """
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
        info = api.dataset_info(repo, timeout=_TIMEOUT)
    except (HFValidationError, *_NETWORK_ERRORS) as error:
        if (lasting := _lasting(error, repo, None, api.endpoint, "dataset")) is not None:
            raise lasting from None
        try:
            folder, names = _cached(repo, None, cache_dir, "dataset")
        except LocalEntryNotFoundError:
            raise UserError(
                f"{repo}: cannot download it from the hub ({_reason(error)}), and the cache has no copy; "
                "check the connection, or give a local file."
            ) from None
        return names, folder / "README.md" if "README.md" in names else None
    names = [file.rfilename for file in info.siblings or ()]
    if "README.md" not in names:
        return names, None
    return names, dataset_file(repo, "README.md", cache_dir=cache_dir, endpoint=endpoint)


def card_configs(repo: str, readme: Path | None) -> list[Mapping]:
    """`configs` of the head of a README.md: which files make which configuration and split."""
    if readme is None:
        return []
    try:
        data = huggingface_hub.DatasetCard.load(readme, repo_type="dataset", ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{repo}: its README.md cannot be read ({reason}); name a file: {repo}:FILE."
        ) from None
    configs = data.to_dict().get("configs")
    return [c for c in configs if isinstance(c, Mapping)] if isinstance(configs, list) else []


def dataset_file(
    repo: str, name: str, *, cache_dir: str | Path | None = None, endpoint: str | None = None
) -> Path:
    """A file of a dataset on the hub, downloaded or from the cache.

    Raises UserError where the hub refuses it, or cannot be reached and the cache has no copy.
    """
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repo,
                name,
                repo_type="dataset",
                cache_dir=cache_dir,
                endpoint=endpoint,
                etag_timeout=_TIMEOUT,
            )
        )
    except (*_NETWORK_ERRORS, LocalEntryNotFoundError, HfHubHTTPError) as error:
        where = endpoint or huggingface_hub.HfApi().endpoint
        if (lasting := _lasting(error, repo, None, where, "dataset")) is not None:
            raise lasting from None
        reason = str(error).partition("\n")[0]
        raise UserError(f"{repo}/{name} cannot be had from the hub ({reason[:120]}).") from None
