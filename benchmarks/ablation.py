"""What each part of error feedback earns: files of one type and size, each made without one part of it,
or with one more.

    python benchmarks/ablation.py smol768-f16.gguf wikitext2-test-120kB.txt --imatrix imatrix.gguf \
        --calibration wikitext2-train-1MB.txt --type IQ2_XXS --folder files --chunks 16

Files that are in the folder already are not made again. Each is made by a process of its own, in which the
part is replaced before anything is compiled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from scores import score

FLAG = "--without"


def _settings(**changes: object) -> None:
    from jquant.ldlq import sequential

    usual = sequential.feed_back

    def changed(*arguments, settings, **options):
        return usual(*arguments, settings=replace(settings, **changes), **options)

    sequential.feed_back = changed


def _correction(alpha: float) -> None:
    from jquant.ldlq.correction import Strength

    _settings(correction=Strength(alpha, 0.05))


def _trusting() -> None:
    from jquant.ldlq import sequential

    sequential.TRUST = 1.0


def _nearest() -> None:
    """Scales and codes by the diagonal of the same Hessian, one after the other, nothing fed on."""
    import jax.numpy as jnp

    from jquant.ldlq import sequential
    from jquant.ldlq.ldlq import Factor

    def diagonal(H, group_size, damping):
        groups = jnp.diagonal(H).reshape(-1, group_size)
        return Factor(jnp.zeros_like(H), jnp.eye(group_size) * groups[:, None])

    sequential.factor = diagonal
    _correction(0.0)


def _without_importance() -> None:
    """Scales that fit the weights alone and the nearest codes, as GPTQ has them, with the same feedback."""
    import jax.numpy as jnp

    from jquant.ldlq import sequential

    usual = sequential.feed_back

    @cache
    def blind(format):
        return replace(
            format,
            fit=lambda x, w: format.fit(x, jnp.ones_like(x)),
            assign=lambda x, w, scales: format.assign(x, jnp.ones_like(x), scales),
        )

    def changed(model, tokens, formats, **options):
        return usual(model, tokens, {name: blind(format) for name, format in formats.items()}, **options)

    sequential.feed_back = changed
    _correction(0.0)
    _one_round()


def _without_output() -> None:
    from jquant.writers import gguf_feedback as fitting

    usual = fitting.fed_entries
    fitting.fed_entries = lambda *given: [entry for entry in usual(*given) if entry.name.startswith("blk.")]


def _ordered() -> None:
    """Superblocks of columns with the largest inputs are coded first, so that the others make up for them."""
    import jax.numpy as jnp
    import numpy as np

    from jquant.ldlq import sequential

    factor, coded, superblock = sequential.factor, sequential.Fitter.rows, 256
    order = np.zeros(1, int)  # of the columns that were factored last

    def sorted_factor(H, group_size, damping):
        nonlocal order
        size = superblock if len(H) % superblock == 0 else len(H)
        order = np.argsort(-np.asarray(jnp.diagonal(H)).reshape(-1, size).sum(axis=1), kind="stable")
        columns = (order[:, None] * size + np.arange(size)).reshape(-1)
        return factor(H[columns][:, columns], group_size, damping)

    def rows(self, W, factors, format):
        parts = W.reshape(len(W), len(order), -1)[:, order]
        data = coded(self, parts.reshape(W.shape), factors, format).reshape(len(W), len(order), -1)
        return np.ascontiguousarray(data[:, np.argsort(order)]).reshape(len(W), -1)

    sequential.factor, sequential.Fitter.rows = sorted_factor, rows


def _one_round() -> None:
    from jquant.ldlq import ldlq as feedback

    feedback.ROUNDS = 1


def _uncapped() -> None:
    from jquant.ldlq import streams

    streams.CAP = float("inf")


def _not_sequential() -> None:
    """Hessians of the original model's own activations; so nothing to correct either."""
    from jquant.ldlq.streams import Streams

    def shown(self, part, names, usual=Streams._shown_in):
        return usual(self, 0, part, names), usual(self, 0, part, names)

    Streams._shown = shown
    _correction(0.0)


def _outputs() -> None:
    """The error of rows too is carried on: tr H_O Δ H Δᵀ, H_O = E[δ δᵀ] of the gradients of the KL divergence
    with respect to outputs (YAQA), is minimised 64 rows after the other, with what those before lost. Of
    models without experts."""
    import jax.numpy as jnp
    import numpy as np

    from jquant.calibration.gradients import OUTPUT_PRODUCTS, collect_gradients, sampled_labels
    from jquant.core import QuantizedTensor, dequantize
    from jquant.ldlq import sequential
    from jquant.ldlq.ldlq import PRECISION, factor, feedback_rows
    from jquant.ldlq.streams import Streams

    rows, damping = 64, 0.1
    products: dict[str, np.ndarray] = {}
    waiting: list[str] = []  # matrices in the order in which they are coded
    usual, gather, usually_coded = sequential.feed_back, Streams.gather, sequential.Fitter.rows

    def measured(model, tokens, formats, *, lengths, **options):
        stats = collect_gradients(model, tokens, OUTPUT_PRODUCTS, sampled_labels(0), lengths=lengths)
        products.update({name: np.asarray(s["ggt"]) for name, s in stats.items()})
        return usual(model, tokens, formats, lengths=lengths, **options)

    def noted(self, members):
        waiting[:] = [f"blk.{self.i}.{name}.weight" for name in members]
        return gather(self, members)

    def coded(self, W, factors, format):
        if not waiting:  # the output matrix
            return usually_coded(self, W, factors, format)
        outputs = factor(jnp.asarray(products[waiting.pop(0)]), rows, damping)
        lost, made = jnp.zeros_like(W), []
        for start in range(0, len(W), rows):
            here = slice(start, start + rows)
            target = W[here] + jnp.matmul(outputs.U[:, here].T, lost, precision=PRECISION)
            made.append(feedback_rows(target, factors, format))
            decoded = dequantize(QuantizedTensor({"blocks": made[-1]}, format))
            lost = lost.at[here].set(W[here] - decoded)
        return np.concatenate([np.asarray(part) for part in made])

    sequential.feed_back, Streams.gather, sequential.Fitter.rows = measured, noted, coded


PARTS: dict[str, tuple[str, Callable[[], None]]] = {
    "all": ("feedback, whole", lambda: None),
    "nearest": ("nearest codes, scales by the same Hessian's diagonal", _nearest),
    "gptq": ("feedback, scales without importance (GPTQ)", _without_importance),
    "head": ("without feedback for the output matrix", _without_output),
    "order": ("superblocks of columns with the largest inputs first", _ordered),
    "refit": ("feedback without the second search for scales", _one_round),
    "sequential": ("feedback on the original's activations", _not_sequential),
    "correction": ("feedback without target correction", lambda: _correction(0.0)),
    "trust": ("the target correction as cross-validated, not lessened", _trusting),
    "half": ("half of the target correction, not cross-validated", lambda: _correction(0.5)),
    "whole": ("the whole target correction, not cross-validated", lambda: _correction(1.0)),
    "cap": ("feedback without the cap on attention sinks", _uncapped),
    "outputs": ("and the output's side of a Kronecker-factored Hessian", _outputs),
    "damping/10": ("damping 0.001", lambda: _settings(damping=0.001)),
    "damping*10": ("damping 0.1", lambda: _settings(damping=0.1)),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="16-bit GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--calibration", nargs="+", required=True, help="texts, in equal shares")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--type", default="IQ2_XXS")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--chunks", type=int, help="only the first so many chunks of the text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {args.model: "original"}
    for part in args.parts:
        file = args.folder / f"{args.type}-{part.replace('/', '_').replace('*', 'x')}.gguf"
        if not file.exists():
            start = time.monotonic()
            subprocess.run([sys.executable, __file__, FLAG, part, str(file), *sys.argv[1:]], check=True)
            print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
        files[file] = PARTS[part][0]
    score(args, files)


def make(part: str, file: Path) -> None:
    """The file by this process, without the part."""
    args = arguments()
    PARTS[part][1]()
    from jquant.calibration import Texts
    from jquant.writers import to_gguf

    texts = Texts(args.calibration, args.samples)
    to_gguf(
        args.model,
        file,
        type=args.type,
        imatrix=args.imatrix,
        feedback=True,
        samples=texts,
        threads=args.threads,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == [FLAG]:
        (_, part, file), sys.argv[1:] = sys.argv[1:4], sys.argv[4:]
        make(part, Path(file))
    else:
        main()
