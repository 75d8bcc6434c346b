"""Everything that touches files: readers, the writer, importance matrices, tokenizers, the hub."""

from jquant.io._inputs import check_no_input
from jquant.io._shards import file_bytes
from jquant.io.gguf import GgufSource
from jquant.io.gguf_sink import GgufPart, GgufSink, check_target, headers_digest
from jquant.io.imatrix import Imatrix
from jquant.io.model_folder import FolderPart, ModelFolder, check_folder
from jquant.io.paths import user_cache_dir
from jquant.io.safetensors import SafetensorsSource
from jquant.io.sources import open_source

__all__ = [
    "FolderPart",
    "GgufPart",
    "GgufSink",
    "GgufSource",
    "Imatrix",
    "ModelFolder",
    "SafetensorsSource",
    "check_folder",
    "check_no_input",
    "check_target",
    "file_bytes",
    "headers_digest",
    "open_source",
    "user_cache_dir",
]
