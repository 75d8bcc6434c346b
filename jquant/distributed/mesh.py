"""Devices and processes: the mesh of devices, and what processes of one run say to each other.

A run of several processes is JAX's own: `join` wraps `jax.distributed.initialize`, and messages are its
collectives. Every message says either what was asked or that its sender has failed, so a process that fails
anywhere ends all others, with its words, at their next message (`together`). A process that was killed ends
the others with the collective that it does not answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from jquant.core import UserError

AXES = ("data", "model")  # samples are spread over the first, the weights of a block over the second
AUTO = "auto"  # for --coordinator: Cloud TPU, SLURM, Open MPI, Kubernetes, as JAX detects them
JOIN_SECONDS = 300.0
LEAVE_SECONDS = 5.0

# JAX ends the whole process, in C++, where its own time-out passes: ours has to pass first.
_NEVER = 7 * 24 * 3600


@runtime_checkable
class Device(Protocol):
    """A device at hand, or of a topology that code is compiled for."""

    id: int
    process_index: int
    device_kind: str


class SharedError(UserError):
    """An error that all processes of this run raise: none has to be told of it."""


class LostError(SharedError):
    """A process is gone without a word. JAX's own shutdown, at exit, waits for it: `leave` does not."""


def parse_mesh(text: str) -> dict[str, int]:
    """'data=8,model=4' → {"data": 8, "model": 4}; one of the two may be left to follow from the devices."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if match is None or match[1] not in AXES or match[1] in found:
            raise UserError(
                f"--mesh {text}: expected data=N,model=M, or one of the two; got {part.strip()!r}."
            )
        found[match[1]] = int(match[2])
    return found


def make_mesh(asked: Mapping[str, int] | None = None, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh over the axes (data, model) of all devices.

    asked: sizes as `parse_mesh` gives them; default: all devices along data. devices: of all processes,
    default: those that JAX has. The devices along model are of one process, so that each process holds whole
    samples.
    Raises UserError where the sizes do not make up the devices.
    """
    # By process, not by the place in the topology, which may go through the hosts.
    every = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    sizes, count = dict(asked or {}), len(every)
    model = sizes.get("model") or (max(count // sizes["data"], 1) if "data" in sizes else 1)
    data = sizes.get("data") or max(count // model, 1)
    if data * model != count:
        raise UserError(
            f"--mesh data={data},model={model}: makes {data * model} devices, but there are {count} "
            f"({every[0].device_kind}); choose sizes whose product is {count}."
        )
    rows = np.asarray(every).reshape(data, model)
    if any(len({device.process_index for device in row}) > 1 for row in rows):
        of_one = sum(device.process_index == every[0].process_index for device in every)
        raise UserError(
            f"--mesh data={data},model={model}: the devices along model must be of one process, which has "
            f"{of_one}; choose a model size that divides this."
        )
    return Mesh(rows, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def local_devices() -> Mesh | None:
    """This process's devices along one axis, "rows"; None where it has one."""
    found = np.asarray(jax.local_devices())
    return Mesh(found, ("rows",), axis_types=(AxisType.Auto,)) if found.size > 1 else None


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = JOIN_SECONDS,
) -> None:
    """Make this process one of a run of several, before anything is computed; without arguments: of one.

    coordinator: HOST:PORT where process 0 listens, with the number of processes and which of them this is,
    from 0; or AUTO, for what JAX finds in the environment. timeout: seconds until all have come. Once joined,
    joining as the same process again does nothing.
    Raises UserError for arguments that make no sense or differ from what was joined, where the environment
    says nothing, and where the others do not come in time.
    """
    explicit = _explicit(coordinator, processes, process)
    if coordinator is None:
        return
    if jax.distributed.is_initialized():
        joined = (jax.process_count(), jax.process_index())
        if explicit is not None and explicit != joined:
            raise UserError(
                f"--processes {explicit[0]} --process {explicit[1]}: this is already process {joined[1]} "
                f"of {joined[0]}; start another Python process."
            )
        return
    failed: list[Exception] = []

    def initialize() -> None:
        try:
            if explicit is None:
                jax.distributed.initialize(initialization_timeout=_NEVER)
            else:
                jax.distributed.initialize(coordinator, *explicit, initialization_timeout=_NEVER)
        except Exception as error:
            failed.append(error)

    # A thread of its own, for nothing else stops a wait in C++.
    waiting = threading.Thread(target=initialize, name="jquant-join", daemon=True)
    waiting.start()
    waiting.join(timeout)
    if waiting.is_alive():
        raise UserError(
            f"--coordinator {coordinator}: {_who(explicit)} waited {timeout:.0f} s for the others in vain; "
            "start all with the same HOST:PORT, process 0 on that host, and let nothing block the port."
        )
    if failed:
        advice = (
            "the environment does not tell JAX of other processes; give HOST:PORT, --processes, --process"
            if explicit is None
            else "join before anything else uses JAX, and choose a free port"
        )
        raise UserError(f"--coordinator {coordinator}: {_first_line(failed[0])}: {advice}.") from failed[0]


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> tuple[int, int] | None:
    """(processes, process) as given, None where the environment is to tell."""
    if coordinator is None or coordinator == AUTO:
        if processes is not None or process is not None:
            raise UserError(f"--processes, --process: need --coordinator HOST:PORT; got {coordinator}.")
        return None
    if re.fullmatch(r"\S+:\d{1,5}", coordinator) is None:
        raise UserError(f"--coordinator {coordinator}: expected HOST:PORT, such as 10.0.0.1:8476, or {AUTO}.")
    if processes is None or process is None:
        raise UserError(f"--coordinator {coordinator}: needs --processes N and --process I as well.")
    if not 0 <= process < processes:
        raise UserError(f"--process {process}: {processes} processes are numbered from 0 to {processes - 1}.")
    return processes, process


def _who(explicit: tuple[int, int] | None) -> str:
    if explicit is None:
        return "this process"
    processes, process = explicit
    return f"process {process} of {processes}"


def several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1  # the second asks for all devices


def is_first() -> bool:
    """Whether this process is the one that reports, and writes what there is one of."""
    return not several() or jax.process_index() == 0


def exchange(text: str = "") -> list[str]:
    """The text of every process, in their order. All have to call it, and each waits for all.

    Raises SharedError where another process fails before it comes here, LostError where it is gone.
    """
    return _exchange({"said": text})


def agree(facts: Mapping[str, str]) -> None:
    """Raise UserError where processes differ in one of these facts, by name.

    Facts of many letters belong here as digests. All processes have to call it.
    """
    told = [json.loads(text) for text in exchange(json.dumps(dict(facts)))]
    for process, found in enumerate(told):
        for name in told[0] | found:
            ours, theirs = told[0].get(name), found.get(name)
            if ours != theirs:
                raise SharedError(
                    f"process {process} has {name} {theirs}, process 0 has {ours}: processes of one run need "
                    "the same version, model and options."
                )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around all that the processes of a run do after `join`: where one fails, all raise.

    The one that fails raises its own error, the others SharedError with its text. With one process: nothing.
    """
    try:
        yield
    except SharedError:
        raise
    except BaseException as error:
        with contextlib.suppress(SharedError):
            _exchange({"failed": _first_line(error)})
        raise
    exchange()


def leave(code: int) -> NoReturn:
    """End this process after a LostError.

    Process 0 gives the others LEAVE_SECONDS to see the loss too: JAX aborts those whose coordinator is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(LEAVE_SECONDS)
    os._exit(code)


def _exchange(message: dict[str, object]) -> list[str]:
    if not several():
        return [str(message.get("said", ""))]
    data = np.frombuffer(json.dumps(message).encode(), np.uint8)
    with collective():
        sizes = multihost_utils.process_allgather(np.asarray(data.size, np.int32))
        padded = np.pad(data, (0, int(sizes.max()) - data.size))
        rows = multihost_utils.process_allgather(padded)
    told = [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
    for process, found in enumerate(told):
        if "failed" in found and process != jax.process_index():
            raise SharedError(f"process {process}: {found['failed']}")
    return [str(found.get("said", "")) for found in told]


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Around a collective: raises LostError where a process does not answer."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise LostError(
            f"a process of this run is gone ({_first_line(error)}); its own messages may say why."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
