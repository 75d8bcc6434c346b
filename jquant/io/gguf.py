"""GgufSource: a GGUF model to read, in one file or in shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

from jquant.core import Metadata, MetadataValue, TensorSpec, UserError
from jquant.io._gguf_header import Header, parse
from jquant.io._rows import read_rows
from jquant.io._shards import shard_name
from jquant.io.paths import AnyPath

_SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GgufSource:
    """A GGUF file of any architecture; of a split model, any shard opens the whole.

    `specs` and `metadata` keep the order of the file. The keys `split.*` are not part of the model and are
    left out. `read` may be called from several threads.
    """

    def __init__(self, path: AnyPath) -> None:
        """Reads headers only. Raises UserError where a header is not sound or a shard is missing."""
        self.path = path
        opened = parse(path)
        self.files = _shard_paths(path, opened)
        headers = [opened if file == path else parse(file) for file in self.files]
        self._check_split(headers)
        self._specs: dict[str, TensorSpec] = {}
        self._where: dict[str, tuple[AnyPath, int]] = {}
        for file, header in zip(self.files, headers, strict=True):
            for name, spec in header.specs.items():
                if name in self._specs:
                    raise UserError(
                        f"{file}: tensor {name!r} is also in {self._where[name][0].name}; convert again."
                    )
                self._specs[name] = spec
                self._where[name] = file, header.offsets[name]
        self._metadata = {k: v for k, v in headers[0].metadata.items() if not k.startswith("split.")}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return MappingProxyType(self._specs)

    @property
    def metadata(self) -> Metadata:
        return MappingProxyType(self._metadata)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "k b"]:
        """Rows [start, stop) of a tensor as stored bytes. A KeyError: no such tensor."""
        return read_rows(*self._where[name], self._specs[name], start, stop)

    def _check_split(self, headers: list[Header]) -> None:
        if len(headers) == 1:
            return
        for i, (file, header) in enumerate(zip(self.files, headers, strict=True)):
            number, count = _number(header.metadata, "split.no"), _number(header.metadata, "split.count")
            if (number, count) != (i, len(headers)):
                raise UserError(
                    f"{file}: says that it is shard {number} of {count} (from 0), but its name says {i} of "
                    f"{len(headers)}: shards of different models are mixed; download them again."
                )
        expected = _number(headers[0].metadata, "split.tensors.count")
        found = sum(len(header.specs) for header in headers)
        if expected not in (None, found):
            raise UserError(
                f"{self.path}: the shards have {found} tensors, but should have {expected}; download again."
            )


def _number(metadata: Metadata | dict[str, MetadataValue], key: str) -> int | None:
    value = metadata.get(key)
    return int(value) if isinstance(value, np.integer) else None


def _shard_paths(path: AnyPath, header: Header) -> list[AnyPath]:
    """Files of the model that `path` belongs to, in order."""
    count = _number(header.metadata, "split.count") or 1
    if count == 1:
        return [path]
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise UserError(
            f"{path}: one of {count} shards, but its name does not say which; "
            f"rename the shards to NAME-00001-of-{count:05d}.gguf and so on."
        )
    paths: list[AnyPath] = [path.with_name(shard_name(match["stem"], i, count)) for i in range(count)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {count} shards missing, the first is {missing[0]}; download it."
        )
    return paths
