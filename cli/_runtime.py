"""What a command sets up before it computes: the compilation cache and the number of threads."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh


def start_jax() -> None:
    """Keep compiled code across runs: a format then compiles once per machine, not once per run.

    In JAX_COMPILATION_CACHE_DIR, where the user has one.
    """
    import jax

    from jquant.io import user_cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(user_cache_dir() / "xla"))
    # JAX writes entries in place: one that another process is writing is compiled here instead.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def join(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Join the other processes of this run, and say whether this is the one that reports."""
    from jquant.distributed import mesh

    if coordinator is not None:
        # Libraries in C++ print to descriptor 1 what is no result.
        results = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")
        os.dup2(2, 1)
        sys.stdout = results
    mesh.join(coordinator, processes, process)
    return mesh.is_first()


def mesh(asked: str | None) -> Mesh | None:
    """The mesh to calibrate on, as the user asks for it; None where there is one device and nothing asked."""
    import jax

    from jquant.distributed.mesh import make_mesh, parse_mesh

    sizes = parse_mesh(asked) if asked else None
    return make_mesh(sizes) if sizes or jax.device_count() > 1 else None


def default_threads() -> int:
    """The processors that this process may use."""
    from jquant import core

    return core.default_threads()


def peak_memory() -> int:
    """Peak resident memory of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
