"""Which reader a path needs, told by what lies there."""

from __future__ import annotations

from jquant.core import UserError
from jquant.io._gguf_header import MAGIC
from jquant.io.gguf import GgufSource
from jquant.io.paths import AnyPath
from jquant.io.safetensors import SafetensorsSource

_EXPECTED = "give a Hugging Face folder (config.json, *.safetensors) or a .gguf file"


def open_source(path: AnyPath) -> GgufSource | SafetensorsSource:
    """The model at `path`: a folder with safetensors or one GGUF model, or a file of either kind.

    Raises UserError where there is nothing, or nothing that can be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {_EXPECTED}.")
    if path.is_dir():
        return _open_folder(path)
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == MAGIC or path.suffix == ".gguf":
        return GgufSource(path)
    # A safetensors file: the length of the header, then its first brace.
    if path.suffix == ".safetensors" or path.name.endswith(".index.json") or head[8:] == b"{":
        return SafetensorsSource(path)
    if head[:2] == b"PK" or path.suffix in {".bin", ".pt", ".pth"}:
        raise UserError(
            f"{path}: a Torch checkpoint; jquant runs no pickles, so convert it to safetensors first."
        )
    raise UserError(f"{path}: neither GGUF nor safetensors (it begins with {head[:8]!r}); {_EXPECTED}.")


def _open_folder(path: AnyPath) -> GgufSource | SafetensorsSource:
    ggufs = sorted(path.glob("*.gguf"))
    if not ggufs or any(path.glob("*.safetensors*")):
        return SafetensorsSource(path)
    source = GgufSource(ggufs[0])
    if set(ggufs) != set(source.files):
        raise UserError(f"{path}: has {len(ggufs)} GGUF files; give one of them, such as {ggufs[0].name}.")
    return source
