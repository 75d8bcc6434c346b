"""A fixed set of outputs and their digests: a change that moves code, and not results, is held against it.

    python benchmarks/same_bytes.py model/ text.txt --folder outputs --write before.json
    python benchmarks/same_bytes.py model/ text.txt --folder outputs --against before.json

Each command runs in the folder, so that no path of a machine gets into a file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

TEXT = ["-c", "text.txt", "--samples", "4", "--sequence-length", "64"]
BY_GRADIENTS = ["--weights", "gradients", *TEXT]
GIVEN = ["--imatrix", "importance.gguf"]
SCORED = ["--chunks", "2", "--context", "128", "--no-cache", "--json", "--threads", "1"]
COMMAND = "from jquant_cli.main import main; main()"
NEVER_THE_SAME = ("seconds", "peak_memory_bytes", "versions", "threads")

RUNS: dict[str, list[str]] = {
    "f16.gguf": ["quantize", "model", "f16.gguf", "-t", "F16"],
    "importance.gguf": ["analyze", "model", "-o", "importance.gguf", *TEXT],
    "fisher.gguf": ["analyze", "model", "-o", "fisher.gguf", "--method", "fisher", *TEXT],
    "hessian.safetensors": ["analyze", "model", "-o", "hessian.safetensors", "--method", "hessian", *TEXT],
    "plain.gguf": ["quantize", "model", "plain.gguf", "-t", "Q4_0"],
    "imatrix.gguf": ["quantize", "model", "imatrix.gguf", "-t", "IQ4_NL", *GIVEN],
    "target.gguf": ["quantize", "model", "target.gguf", "--target-bpw", "5.5", *GIVEN],
    "gradients.gguf": ["quantize", "model", "gradients.gguf", "--target-bpw", "6", *BY_GRADIENTS],
    "feedback.gguf": ["quantize", "model", "feedback.gguf", "-t", "Q4_0", "--feedback", *TEXT],
    "tuned.gguf": ["quantize", "model", "tuned.gguf", "-t", "Q4_0", "--feedback", "--effort", "best", *TEXT],
    "balanced.gguf": ["quantize", "model", "balanced.gguf", "-t", "Q4_0", "--balance-inputs", *TEXT],
    "protected.gguf": ["quantize", "model", "protected.gguf", "-t", "Q4_0", "--protect-super-weights", *TEXT],
    "w8a8": ["quantize", "model", "w8a8", "-t", "W8A8", *TEXT],
    "fp8": ["quantize", "model", "fp8", "-t", "FP8"],
    "w4a16": ["quantize", "model", "w4a16", "-t", "W4A16", "--feedback", *TEXT],
    "gptq": ["quantize", "model", "gptq", "-t", "GPTQ", *GIVEN],
    "awq": ["quantize", "model", "awq", "-t", "AWQ"],
    "evaluate.gguf.json": [
        "evaluate",
        "f16.gguf",
        "plain.gguf",
        "imatrix.gguf",
        "--text",
        "text.txt",
        *SCORED,
    ],
    "evaluate.folders.json": ["evaluate", "model", "w8a8", "awq", "--text", "text.txt", *SCORED],
}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="for the outputs; it must not exist")
    parser.add_argument("--write", type=Path, help="file for the digests, as JSON")
    parser.add_argument("--against", type=Path, help="such a file; ends with 1 where a digest differs")
    parser.add_argument("--only", nargs="*", choices=RUNS, help="of the outputs, and what they need")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    (args.folder / "model").symlink_to(args.model.resolve())
    (args.folder / "text.txt").write_bytes(args.text.read_bytes()[:40_000])
    expected = json.loads(args.against.read_text()) if args.against else {}
    found = {}
    for name, command in RUNS.items():
        if args.only and name not in args.only:
            continue
        ended = subprocess.run(
            [sys.executable, "-c", COMMAND, *command, "--quiet"],
            cwd=args.folder,
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            sys.exit(f"{name}: {' '.join(command)}\n{ended.stderr}")
        if name.endswith(".json"):
            told = {k: v for k, v in json.loads(ended.stdout).items() if k not in NEVER_THE_SAME}
            (args.folder / name).write_text(json.dumps(told, sort_keys=True))
        found[name] = digest(args.folder / name)
        same = {None: "", found[name]: "  the same"}.get(expected.get(name), "  DIFFERS")
        print(f"{name:<22} {found[name][:16]}{same}", flush=True)
    if args.write:
        args.write.write_text(json.dumps(found, indent=1))
    if any(expected.get(name, value) != value for name, value in found.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
