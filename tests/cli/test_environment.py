"""What a user can mend in the environment ends with one line and the documented code, with no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from helpers.tiny_models import write_tiny

COMMAND = [sys.executable, "-c", "from jquant_cli.main import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model") / "m", "LlamaForCausalLM")


@pytest.mark.processes
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_named(platform, model, tmp_path):
    command = [*COMMAND, "quantize", str(model), str(tmp_path / "o.gguf"), "--type", "Q8_0", "--quiet"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": platform}
    )
    assert ended.returncode == 3
    assert f"JAX_PLATFORMS={platform}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.processes
def test_a_reader_that_has_read_enough_sees_no_traceback(model):
    with subprocess.Popen(
        [*COMMAND, "inspect", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode in (0, 4)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
@pytest.mark.processes
def test_a_full_standard_output_is_said(model):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run(
            [*COMMAND, "inspect", str(model)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 4
    assert ended.stderr.count("\n") == 1
    assert "standard output" in ended.stderr


@pytest.mark.processes
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
def test_sigterm_ends_as_ctrl_c_does(model, tmp_path):
    out = tmp_path / "o.gguf"
    options = ["--type", "Q8_0", "--analyze", "-c", "python", "--sequence-length", "512"]
    with subprocess.Popen(
        [*COMMAND, "quantize", str(model), str(out), *options], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = [next(line for line in process.stderr if line.startswith("block 1 of 2"))]
        process.send_signal(signal.SIGTERM)
        said += process.stderr
    assert process.returncode == 130
    assert "interrupted" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert not out.exists()


def test_without_a_home_the_cache_lies_in_the_folder_for_temporary_files(monkeypatch, tmp_path):
    from jquant.io import user_cache_dir

    for name in ("JQUANT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert "jquant" in str(user_cache_dir())
