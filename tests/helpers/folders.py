"""Folders of scaled formats: the command that writes them, and what they hold, decoded by NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize

from helpers import commands

FORMATS = {"W8A8": "INT8", "FP8": "FP8", "W4A16": "INT4"}
TYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8, "I32": np.int32,
    "I64": np.int64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


def run(*arguments: object, code: int = 0) -> str:
    """Output of a command that ends with this exit code."""
    arguments = [*map(str, arguments)]
    smooths = {"--alpha", "--no-smooth", "-c"} & {*arguments}
    if "W8A8" in map(str.upper, arguments) and not smooths and code != 2:
        arguments.append("--no-smooth")  # what these tests are about is the folder
    return commands.run("quantize", *arguments, code=code).output


def read(folder: Path) -> dict[str, np.ndarray]:
    """Tensors by name. The safetensors package gives NumPy no float8, but its bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in deserialize(file.read_bytes()):
            found[name] = np.frombuffer(entry["data"], TYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
    return found


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def decoded(folder: Path, format) -> dict[str, np.ndarray]:
    """Weights by their original names, codes multiplied with their scales in NumPy."""
    tensors = read(folder)
    scaled = {name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")}
    out = {name: t for name, t in tensors.items() if not name.endswith(("_scale", "_packed", "_shape"))}
    for name in scaled:
        scale = tensors[f"{name}_scale"].astype(np.float64)
        if format == "INT4":
            words = tensors[f"{name}_packed"].view(np.uint32)
            codes = np.stack([words >> 4 * i & 15 for i in range(8)], axis=-1).astype(np.float64) - 8
            codes = codes.reshape(*scale.shape, -1)
            assert tensors[f"{name}_shape"].tolist() == [len(codes), codes[0].size]
        else:
            codes = tensors[name].astype(np.float64)[:, None]
        out[name] = (codes * scale[..., None]).reshape(len(codes), -1)
    return out
