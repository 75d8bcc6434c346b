"""The mesh of devices, and processes that join, agree and fail together.

Processes are started in a tier of their own; in every run other tests (test_hosts) start two, and what they
say to each other is played here.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import jax
import pytest
from helpers.processes import HEAD, JOIN, environment, free_address, run, start, wait

from jquant.core import UserError
from jquant.distributed import mesh


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("data=8,model=4", {"data": 8, "model": 4}), (" model=2 ", {"model": 2}), ("data=1", {"data": 1})],
)
def test_a_mesh_is_read_as_it_is_written(text, sizes):
    assert mesh.parse_mesh(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "data", "data=0", "data=2,data=4", "rows=2", "data=2;model=1", "data=-1"]
)
def test_what_is_no_mesh_is_refused_with_the_form(text):
    with pytest.raises(UserError, match="expected data=N,model=M"):
        mesh.parse_mesh(text)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [(None, (2, 1)), ({"model": 2}, (1, 2)), ({"data": 2}, (2, 1)), ({"data": 1}, (1, 2))],
)
def test_sizes_that_are_not_given_follow_from_the_devices(asked, shape):
    made = mesh.make_mesh(asked)
    assert made.axis_names == ("data", "model")
    assert made.devices.shape == shape
    assert set(made.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("asked", [{"data": 3}, {"model": 3}, {"data": 2, "model": 2}, {"data": 16}])
def test_a_mesh_of_another_number_of_devices_is_refused(asked):
    with pytest.raises(UserError, match="there are 2"):
        mesh.make_mesh(asked)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("10.0.0.1", 2, 0), "expected HOST:PORT"),
        (("10.0.0.1:99", 2, None), "needs --processes N and --process I"),
        (("10.0.0.1:99", 2, 2), "numbered from 0 to 1"),
        ((None, 2, 0), "need --coordinator"),
        (("auto", 2, 0), "need --coordinator HOST:PORT"),
    ],
)
def test_arguments_that_name_no_process_are_refused(arguments, text):
    with pytest.raises(UserError, match=text):
        mesh.join(*arguments)


def test_one_process_needs_nobody():
    mesh.join()
    with mesh.together():
        mesh.agree({"version": "1"})
        assert mesh.exchange("alone") == ["alone"]
    assert mesh.is_first()


@pytest.mark.processes
def test_processes_join_once_and_hear_each_other():
    script = JOIN + (
        "mesh.join(address, processes, process)\n"
        "with mesh.together():\n"
        "    mesh.agree({'version': '1'})\n"
        "    print(mesh.exchange('ü' * process), mesh.is_first(), mesh.make_mesh().devices.shape)\n"
        "try: mesh.join(address, processes, (process + 1) % processes)\n"
        "except ValueError as error: print(error)\n"
    )
    for i, ended in enumerate(run(script, 3, devices=2)):
        said, again = ended.out.splitlines()
        assert said == f"['', 'ü', 'üü'] {i == 0} (6, 1)", ended.err
        assert again.endswith(f"this is already process {i} of 3; start another Python process.")
        assert ended.code == 0


@pytest.mark.processes
def test_devices_along_model_are_of_one_process():
    script = JOIN + (
        "print(mesh.make_mesh({'model': 2}).devices.shape)\n"
        "try: mesh.make_mesh({'model': 4})\n"
        "except ValueError as error: print(error)\n"
    )
    for ended in run(script, 2, devices=2):
        shape, error = ended.out.splitlines()
        assert shape == "(2, 2)"
        assert "must be of one process, which has 2" in error


@pytest.mark.processes
def test_processes_that_differ_are_all_refused():
    script = JOIN + (
        "with mesh.together(): mesh.agree({'jquant': '0.1.0', 'type': 'Q4_K' if process < 2 else 'Q8_0'})\n"
    )
    for ended in run(script, 3):
        assert ended.code == 1
        assert "process 2 has type Q8_0, process 0 has Q4_K: processes of one run need" in ended.err


@pytest.mark.processes
def test_a_failing_process_ends_all_with_its_message():
    # It fails where the others are not: they learn of it at their own next exchange.
    script = JOIN + (
        "with mesh.together():\n"
        "    if process == 1: raise OSError('the disk of host 1 is full')\n"
        "    mesh.exchange('one'); mesh.exchange('two')\n"
    )
    ended = run(script, 3)
    assert [e.code for e in ended] == [1, 1, 1]
    assert "OSError: the disk of host 1 is full" in ended[1].err
    for i in (0, 2):
        assert "SharedError: process 1: the disk of host 1 is full" in ended[i].err


@pytest.mark.processes
def test_a_killed_process_ends_the_others():
    script = JOIN + (
        "import os\n"
        "try:\n"
        "  with mesh.together():\n"
        "    mesh.exchange()\n"
        f"    if process == 1: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "    mesh.exchange()\n"
        "except mesh.LostError as error:\n"
        "    print(error, file=sys.stderr, flush=True); mesh.leave(3)\n"
    )
    first, second = run(script, 2)
    assert second.code == -signal.SIGKILL
    assert first.code == 3
    assert "a process of this run is gone" in first.err


@pytest.mark.processes
@pytest.mark.parametrize("process", [0, 1])
def test_waiting_for_the_others_ends_with_a_clear_message(process):
    script = HEAD + (
        "try: mesh.join(address, processes, process, timeout=3)\n"
        "except ValueError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", script, free_address(), "2", str(process)]
    (ended,) = wait(start([command]), 60)
    assert ended.code == 1
    assert f"process {process} of 2 waited 3 s for the others in vain" in ended.err


@pytest.mark.processes
def test_an_environment_without_processes_is_refused():
    script = HEAD + ("try: mesh.join('auto')\nexcept ValueError as error: sys.exit(str(error))\n")
    (ended,) = wait(start([[sys.executable, "-c", script, "", "0", "0"]]), 60)
    assert ended.code == 1
    assert "the environment does not tell JAX of other processes" in ended.err


@pytest.mark.processes
def test_the_environment_of_slurm_is_joined():
    """Two tasks of a step, as srun describes them to each."""
    port = int(free_address().rpartition(":")[2])
    script = (
        "from jquant.distributed import mesh\n"
        "mesh.join('auto')\nprint(mesh.exchange('here'), mesh.is_first())"
    )
    started = []
    for i in range(2):
        slurm = {
            "SLURM_JOB_ID": "71",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
            "SLURM_STEP_NUM_NODES": "1",
            "JAX_COORDINATOR_PORT": str(port),
        }
        env = environment() | slurm
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
        )
    for i, ended in enumerate(wait(started, 60)):
        assert ended.out.strip() == f"['here', 'here'] {i == 0}", ended.err
