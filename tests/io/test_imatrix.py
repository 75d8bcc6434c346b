"""Importance matrices: llama-imatrix's own file, synthesised ones of both forms, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from jquant.core import TensorSpec, UserError
from jquant.io import imatrix

DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, "", use_temp_file=False)
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["one.txt", "two.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums() -> dict[str, np.ndarray]:
    """One matrix, and a stack of three whose second no token reached."""
    random = np.random.default_rng(0)
    return {
        f"{DENSE}.in_sum2": random.chisquare(1, (1, 8)).astype(np.float32),
        f"{DENSE}.counts": np.array([[2048]], np.float32),
        f"{EXPERTS}.in_sum2": random.chisquare(1, (3, 8)).astype(np.float32),
        f"{EXPERTS}.counts": np.array([[100], [0], [50]], np.float32),
    }


def dat(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (ncall, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", ncall, values.size)]
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts) + tail


def test_the_file_of_llama_imatrix_reads_as_gguf_py_reads_it(shared):
    reference = shared("data/reference/smol768-imatrix-60x512.gguf")
    found = imatrix.read(reference)
    tensors = {t.name: t.data for t in gguf.GGUFReader(reference).tensors}
    assert (found.chunk_count, found.chunk_size) == (60, 512)
    assert found.datasets == ["wikitext2-train-1MB.txt"]
    assert {f"{name}.in_sum2" for name in found.entries} == {n for n in tensors if n.endswith(".in_sum2")}
    for name, entry in found.entries.items():
        mean = tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"]
        np.testing.assert_array_equal(entry, mean.reshape(1, -1))
        assert entry.dtype == np.float32


def test_a_mean_is_its_sum_by_its_count_and_one_where_nothing_was_counted(tmp_path):
    tensors = sums()
    found = imatrix.read(write_gguf(tmp_path / "im.gguf", tensors))
    np.testing.assert_array_equal(found.entries[DENSE], tensors[f"{DENSE}.in_sum2"] / np.float32(2048))
    stack = tensors[f"{EXPERTS}.in_sum2"]
    expected = np.stack([stack[0] / np.float32(100), np.ones(8, np.float32), stack[2] / np.float32(50)])
    np.testing.assert_array_equal(found.entries[EXPERTS], expected)
    np.testing.assert_array_equal(found.counts[EXPERTS], np.array([100, 0, 50], np.float32))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (["one.txt", "two.txt"], 4, 512)


def test_the_dat_form_reads_with_and_without_its_tail(tmp_path):
    values = np.arange(8, dtype=np.float32)
    entries = {DENSE: (4, 4 * values), EXPERTS: (0, values)}
    (tmp_path / "old.dat").write_bytes(dat(entries))
    (tmp_path / "new.dat").write_bytes(dat(entries, struct.pack("<ii", 60, 8) + b"wiki.txt"))
    for name, about in [("old.dat", (0, [])), ("new.dat", (60, ["wiki.txt"]))]:
        found = imatrix.read(tmp_path / name)
        np.testing.assert_array_equal(found.entries[DENSE], values[None])
        np.testing.assert_array_equal(found.entries[EXPERTS], values[None])  # llama.cpp: not divided by 0
        assert (found.chunk_count, found.datasets) == about


def test_an_entry_fits_its_tensor_or_the_imatrix_is_of_another_model(tmp_path):
    found = imatrix.read(write_gguf(tmp_path / "im.gguf", sums()))
    assert found.importance(TensorSpec(DENSE, (5, 8), "F16")).shape == (1, 8)
    assert found.importance(TensorSpec(EXPERTS, (3, 5, 8), "F16")).shape == (3, 8)
    assert found.importance(TensorSpec("blk.9.attn_q.weight", (5, 8), "F16")) is None
    with pytest.raises(UserError, match=rf"{DENSE}.* 8 values.* needs 16; .*another model"):
        found.importance(TensorSpec(DENSE, (5, 16), "F16"))


def test_a_stack_in_the_dat_form_is_taken_apart(tmp_path):
    values = np.arange(24, dtype=np.float32)
    (tmp_path / "im.dat").write_bytes(dat({EXPERTS: (1, values)}))
    found = imatrix.read(tmp_path / "im.dat").importance(TensorSpec(EXPERTS, (3, 5, 8), "F16"))
    np.testing.assert_array_equal(found, values.reshape(3, 8))


def test_what_is_written_reads_back(tmp_path):
    first = imatrix.read(write_gguf(tmp_path / "im.gguf", sums()))
    imatrix.write_gguf(tmp_path / "again.gguf", first)
    again = imatrix.read(tmp_path / "again.gguf")
    for name in first.entries:
        np.testing.assert_allclose(again.entries[name], first.entries[name], rtol=2e-7)
        np.testing.assert_array_equal(again.counts[name], first.counts[name])
    assert (again.datasets, again.chunk_count, again.chunk_size) == (first.datasets, 4, 512)
    reader = gguf.GGUFReader(tmp_path / "again.gguf")
    assert {t.name: t.shape.tolist() for t in reader.tensors} == {
        f"{DENSE}.in_sum2": [8, 1],
        f"{DENSE}.counts": [1, 1],
        f"{EXPERTS}.in_sum2": [8, 3],
        f"{EXPERTS}.counts": [1, 3],
    }

    imatrix.write_dat(tmp_path / "im.dat", first)
    old = imatrix.read(tmp_path / "im.dat")
    assert (old.datasets, old.chunk_count) == (["two.txt"], 4)
    assert old.counts[DENSE] == 4  # 2048 tokens in chunks of 512
    for name in first.entries:
        np.testing.assert_allclose(old.entries[name].ravel(), first.entries[name].ravel(), rtol=2e-7)


def changed(name: str, value: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = sums() | ({} if value is None else {name: value})
    return tensors if value is not None else {n: t for n, t in tensors.items() if n != name}


BAD = np.array([[1, np.nan, 1, np.inf, 1, 1, 1, 1]], np.float32)
UNSOUND = {
    "not a number": (changed(f"{DENSE}.in_sum2", BAD), rf"{DENSE}\.in_sum2 has nan at \[0, 1\]"),
    "infinite": (changed(f"{DENSE}.in_sum2", np.nan_to_num(BAD, posinf=np.inf)), r"has inf at \[0, 3\]"),
    "negative": (changed(f"{DENSE}.in_sum2", -np.ones((1, 8), np.float32)), r"has -1\.0 at \[0, 0\]"),
    "a count that is none": (changed(f"{DENSE}.counts", BAD[:, 1:2]), rf"{DENSE}\.counts has nan"),
    "no counts": (changed(f"{DENSE}.counts", None), f"{DENSE} has sums but no counts"),
    "too few counts": (changed(f"{EXPERTS}.counts", np.ones((2, 1), np.float32)), "2 counts for 3 matrices"),
    "half precision": (changed(f"{DENSE}.in_sum2", np.ones((1, 8), np.float16)), "type F16, expected F32"),
    "no imatrix": ({"token_embd.weight": np.ones((2, 2), np.float32)}, "not an imatrix but .* type imatrix"),
}


@pytest.mark.parametrize(("tensors", "message"), UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_imatrix_is_refused_by_name(tmp_path, tensors, message):
    path = write_gguf(tmp_path / "im.gguf", tensors)
    with pytest.raises(UserError, match=message) as error:
        imatrix.read(path)
    assert str(path) in str(error.value)


def test_a_dat_file_cut_anywhere_is_refused(tmp_path):
    data = dat({DENSE: (1, np.ones(8))}, struct.pack("<ii", 60, 8) + b"wiki.txt")
    tail = len(data) - 16  # a file without its tail is the form of older writers
    for cut in set(range(len(data))) - {tail}:
        (tmp_path / "im.dat").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"truncated|not an imatrix"):
            imatrix.read(tmp_path / "im.dat")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an imatrix.* give what jquant analyze or llama-imatrix wrote"),
        (b"PK\x03\x04 any other file", "not an imatrix"),
        (b"Text, for instance a calibration file.", "not an imatrix"),
        (dat({DENSE: (1, np.array([1.0, np.inf]))}), rf"{DENSE} has inf at \[0, 1\]"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -5), "truncated"),
    ],
)  # fmt: skip
def test_what_is_no_imatrix_is_refused(tmp_path, data, message):
    (tmp_path / "im.dat").write_bytes(data)
    with pytest.raises(UserError, match=message):
        imatrix.read(tmp_path / "im.dat")
    with pytest.raises(UserError, match="cannot be opened: No such file"):
        imatrix.read(tmp_path / "absent.dat")


def test_matrices_that_only_one_has_are_merged_as_they_are_and_the_model_judges_them():
    a, b = (
        imatrix.Imatrix({name: np.ones((1, 8), np.float32)}, {name: np.ones(1, np.float32)}, [], 1, 4)
        for name in (DENSE, "blk.9.attn_q.weight")
    )
    merged = imatrix.merge([a, b])
    assert set(merged.entries) == {DENSE, "blk.9.attn_q.weight"}
    specs = {DENSE: TensorSpec(DENSE, (5, 8), "F16")}
    imatrix.check_model(Path("a.gguf"), a, specs)
    with pytest.raises(UserError, match=r"m\.gguf: has an entry for blk\.9\.attn_q\.weight, which the model"):
        imatrix.check_model(Path("m.gguf"), merged, specs)
    wide = {DENSE: TensorSpec(DENSE, (5, 16), "F16")}
    with pytest.raises(UserError, match=rf"a\.gguf: {DENSE}: .* 8 values.* needs 16"):
        imatrix.check_model(Path("a.gguf"), a, wide)
