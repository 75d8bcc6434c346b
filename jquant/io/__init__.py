"""Everything that touches files: readers, the writer, importance matrices, tokenizers, the hub."""

from jquant.io.gguf import GgufSource
from jquant.io.gguf_sink import GgufSink
from jquant.io.safetensors import SafetensorsSource
from jquant.io.sources import open_source

__all__ = ["GgufSink", "GgufSource", "SafetensorsSource", "open_source"]
