"""The nouns that all else is built from, and `quantize` and `dequantize`."""

from jquant.core._effort import Effort, at_effort
from jquant.core._encode import chunk_blocks, decode_chunk, dequantize, encode_chunk, quantize
from jquant.core._errors import OutputError, UserError
from jquant.core._files import (
    FLOAT_DTYPES,
    GGML_TYPES,
    TRAINED,
    Metadata,
    MetadataValue,
    Rows,
    Sink,
    Source,
    TensorSpec,
    Writer,
    bits_per_weight,
    block_and_bytes,
)
from jquant.core._format import Format, QuantizedTensor, ScaledFormat
from jquant.core._gpu import on_cuda, result_like
from jquant.core._grain import ACCELERATOR_GRAIN, CPU_GRAIN, Grain, grain
from jquant.core._json import parse_json
from jquant.core._kl import kl_divergence, kl_gradient
from jquant.core._models import Block, BlockwiseModel, Head, block_parameters, output_name
from jquant.core._reporter import SILENT, Progress, Reporter
from jquant.core._threads import default_threads
from jquant.core._versions import VERSION, versions

__all__ = [
    "ACCELERATOR_GRAIN",
    "CPU_GRAIN",
    "FLOAT_DTYPES",
    "GGML_TYPES",
    "SILENT",
    "TRAINED",
    "VERSION",
    "Block",
    "BlockwiseModel",
    "Effort",
    "Format",
    "Grain",
    "Head",
    "Metadata",
    "MetadataValue",
    "OutputError",
    "Progress",
    "QuantizedTensor",
    "Reporter",
    "Rows",
    "ScaledFormat",
    "Sink",
    "Source",
    "TensorSpec",
    "UserError",
    "Writer",
    "at_effort",
    "bits_per_weight",
    "block_and_bytes",
    "block_parameters",
    "chunk_blocks",
    "decode_chunk",
    "default_threads",
    "dequantize",
    "encode_chunk",
    "grain",
    "kl_divergence",
    "kl_gradient",
    "on_cuda",
    "output_name",
    "parse_json",
    "quantize",
    "result_like",
    "versions",
]
