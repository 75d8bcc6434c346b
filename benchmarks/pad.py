"""A Llama of the same function with wider vectors: every row a whole number of blocks, for small models.

    python benchmarks/pad.py stories15M/ stories512/ --width 512

The channels of the residual stream are spread evenly over blocks of 256, zeros between them; heads of zeros
are added until attention has whole blocks too. RMSNorm stays exact: eps is scaled by old/new width, and each
norm's weight by its square root.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

BLOCK = 256


def slots(old: int, new: int) -> np.ndarray:
    """Where the channels go."""
    real = -(-old // (new // BLOCK))
    channel = np.arange(old)
    return channel // real * BLOCK + channel % real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of a Llama with one safetensors file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, required=True)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    old, head, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    if config["num_key_value_heads"] != heads or config["intermediate_size"] % BLOCK or args.width % BLOCK:
        raise SystemExit("for models whose heads share no keys, and widths of whole blocks")
    more = next(n for n in range(heads, heads + BLOCK) if n * head % BLOCK == 0)
    where = slots(old, args.width)

    def wide(x: np.ndarray, axis: int) -> np.ndarray:
        out = np.zeros([args.width if i == axis % x.ndim else n for i, n in enumerate(x.shape)], np.float32)
        np.moveaxis(out, axis, 0)[where] = np.moveaxis(x, axis, 0)
        return out

    def padded(name: str, x: np.ndarray) -> np.ndarray:
        extra = (more - heads) * head
        if "norm" in name:
            return wide(x * np.float32((old / args.width) ** 0.5), 0)
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            return np.pad(wide(x, -1), ((0, extra), (0, 0)))
        if "o_proj" in name:
            return np.pad(wide(x, 0), ((0, 0), (0, extra)))
        return wide(x, 0 if "down_proj" in name else -1)

    tensors = {name: padded(name, x) for name, x in load_file(args.model / "model.safetensors").items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({name: x.astype(np.float16) for name, x in tensors.items()}, args.out / "model.safetensors")
    config |= {
        "hidden_size": args.width,
        "num_attention_heads": more,
        "num_key_value_heads": more,
        "rms_norm_eps": config["rms_norm_eps"] * old / args.width,
        "torch_dtype": "float16",
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    for file in args.model.glob("token*"):
        shutil.copy(file, args.out)


if __name__ == "__main__":
    main()
