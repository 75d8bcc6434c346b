"""Datasets of the hub as rows: which of a repository's files a name means.

"org/name" is the split "train" of the default configuration; "org/name:config", "org/name:split" and
"org/name:config:split" say another one, as load_dataset("org/name", "config", split="split") does, and
"org/name:folder/file.parquet" is one file. "hf:" before it says that no local path is meant. Files are
downloaded one after the other, as far as their rows are asked for.

Configurations and splits are those that the repository's README.md lists (`configs`), else split names are
looked for in the names of files and folders.
Source: https://huggingface.co/docs/hub/datasets-manual-configuration, …/datasets-file-names-and-splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jquant.core import UserError
from jquant.io import hub
from jquant.text._tables import FILES, Table, rows_of_file

_ID = re.compile(r"(?:hf:)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<tag>\w[^:]*))?(?::(?P<split>[^:]+))?")
_NO_DATA = re.compile(r"(^|/)(\.[^/]*|dataset_infos?\.json|config\.json|README[^/]*)$")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

Configs = Mapping[str, Mapping[str, Sequence[str]]]  # configuration → split → its files


class Name(NamedTuple):
    repo: str
    tag: str | None  # a configuration, a split or a file
    split: str | None


def parse(name: str) -> Name | None:
    """What a name of a dataset says; None for a local path.

    Raises UserError where it may be either.
    """
    if os.path.exists(os.path.expanduser(name)):  # noqa: PTH110, PTH111  (unlike pathlib's, these never raise)
        return None
    match = _ID.fullmatch(name)
    if match is None or match["repo"].endswith(FILES):
        return None
    parent = name.partition("/")[0]
    if Path(parent).is_dir():
        raise UserError(
            f"{name}: nothing of this name in the folder {parent}; write hf:{name} if the hub is meant."
        )
    return Name(match["repo"], match["tag"], match["split"])


def table(name: str, *, cache_dir: str | Path | None = None, endpoint: str | None = None) -> Table:
    """The rows of a dataset of the hub. cache_dir, endpoint: in place of the hub library's own.

    Raises UserError where there is no such dataset, configuration, split or file, where it has no file that
    is read here, and where the hub cannot be reached and the cache has no copy.
    """
    asked = parse(name)
    if asked is None:
        raise UserError(f"{name!r}: is no name of a dataset; one looks like org/name:config:split.")
    names, readme = hub.dataset(asked.repo, cache_dir=cache_dir, endpoint=endpoint)
    files = select(asked, names, hub.card_configs(asked.repo, readme))
    return Table(
        name.removeprefix("hf:"),
        tuple(partial(_download, asked.repo, file, cache_dir, endpoint) for file in files),
    )


def _download(repo: str, file: str, cache_dir: str | Path | None, endpoint: str | None):
    path = hub.dataset_file(repo, file, cache_dir=cache_dir, endpoint=endpoint)
    return rows_of_file(path, f"{repo}/{file}")


def select(asked: Name, names: Sequence[str], card: Sequence[Mapping]) -> Sequence[str]:
    """The files that a name means, of all files of its repository. card: `configs` of its README.md."""
    repo, tag, split = asked
    data = sorted(n for n in names if n.endswith(FILES) and not _NO_DATA.search(n))
    if tag is not None and tag in names:
        if tag not in data:
            raise UserError(f"{repo}:{tag}: is no file of these kinds: {', '.join(FILES)}.")
        return [tag]
    if not data:
        ends = sorted({Path(n).suffix or n for n in names})
        raise UserError(
            f"{repo}: the dataset has no files of these kinds: {', '.join(FILES)}; it has {', '.join(ends)}."
        )
    configs = _of_card(card, data) or {"default": _by_split(data)}
    folder = [] if tag is None else [n for n in data if n.startswith(f"{tag}/")]
    default = next((str(c.get("config_name")) for c in card if c.get("default")), "default")
    if tag in configs or (tag is not None and split is not None and not folder):
        splits = _pick(configs, str(tag), repo, "configuration", repo)
    elif folder:
        splits = _by_split(folder)
    elif tag is None:
        splits = _pick(configs, default, repo, "configuration", repo, or_only=True)
    else:
        split = tag
        owners = [c for c in (default, *configs) if split in configs.get(c, ())]
        if not owners:
            every = [*configs] + [s for c in configs.values() for s in c]
            raise UserError(
                f"{repo}: has no configuration or split {tag!r}; choose one of {_choices(repo, every)}."
            )
        splits = configs[owners[0]]
    prefix = repo if tag is None or tag == split else f"{repo}:{tag}"
    return _pick(splits, split or "train", prefix, "split", repo, or_only=split is None)


def _pick(choices: Mapping, wanted: str, prefix: str, what: str, repo: str, *, or_only: bool = False):
    if wanted in choices:
        return choices[wanted]
    if or_only and len(choices) == 1:
        return next(iter(choices.values()))
    raise UserError(f"{repo}: has no {what} {wanted!r}; choose one of {_choices(prefix, choices)}.")


def _choices(prefix: str, names) -> str:
    return ", ".join(f"{prefix}:{name}" for name in dict.fromkeys(names))


def _of_card(card: Sequence[Mapping], data: Sequence[str]) -> Configs:
    """The configurations of a README.md that have files here."""
    found = {}
    for config in card:
        folder = str(config.get("data_dir") or "").strip("/")
        below = [n for n in data if n.startswith(f"{folder}/")] if folder else list(data)
        entries = config.get("data_files")
        if entries is None:
            splits = _by_split(below)
        else:
            splits = {}
            for entry in entries if isinstance(entries, list) else [entries]:
                split, paths = ("train", entry) if isinstance(entry, str) else _split_of(entry)
                for pattern in paths if isinstance(paths, list) else [paths]:
                    path = f"{folder}/{pattern}" if folder else str(pattern)
                    files = [n for n in data if _matches(path, n) and n not in splits.get(split, ())]
                    if files:
                        splits.setdefault(split, []).extend(files)
        if splits:
            found[str(config.get("config_name", "default"))] = splits
    return found


def _split_of(entry: object) -> tuple[str, object]:
    if not isinstance(entry, Mapping):
        return "train", []
    return str(entry.get("split", "train")), entry.get("path", [])


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a README.md means this file. A star does not cross folders, two do."""
    pattern = pattern.removeprefix("./")
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(meaning.get(part, re.escape(part)) for part in parts)
    return re.fullmatch(f"{expression}|{re.escape(pattern.rstrip('/'))}/.*", name) is not None


def _by_split(names: Sequence[str]) -> Mapping[str, list[str]]:
    """Files by the split that their path names; all are "train" where none names one."""
    found: dict[str, list[str]] = {}
    for split, words in _SPLITS.items():
        word = re.compile(rf"(?<![a-zA-Z0-9])({'|'.join(words)})(?![a-zA-Z])")
        files = [name for name in names if word.search(name)]
        if files:
            found[split] = files
    return found or {"train": list(names)}
