"""SafetensorsSource and open_source, against files of the safetensors package and damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jquant import io
from jquant.core import UserError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


def stored(*names: str) -> dict[str, np.ndarray]:
    """Rows as they will lie in the file: uint8 [3, row bytes] for tensors of shape [3, 5]."""
    random = np.random.default_rng(0)
    return {
        name: random.integers(0, 2, (3, 5 * np.dtype(DTYPES[name]).itemsize), np.uint8)
        for name in names or DTYPES
    }


def write(path: Path, rows: dict[str, np.ndarray]) -> None:
    save_file({name: data.view(DTYPES[name]) for name, data in rows.items()}, path, {"format": "pt"})


def write_sharded(folder: Path) -> dict[str, np.ndarray]:
    rows = stored()
    names = list(rows)
    weight_map = {}
    for i, part in enumerate([names[:4], names[4:]]):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        write(folder / shard, {n: rows[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return rows


def assert_holds(source: io.SafetensorsSource, rows: dict[str, np.ndarray]) -> None:
    assert set(source.specs) == set(rows)
    for name, data in rows.items():
        spec = source.specs[name]
        assert (spec.name, spec.shape, spec.type) == (name, (3, 5), name)
        np.testing.assert_array_equal(source.read(name), data)
        np.testing.assert_array_equal(source.read(name, 1, 2), data[1:2])


def damaged(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_of_the_safetensors_package_reads_as_it_was_stored(tmp_path):
    write(tmp_path / "model.safetensors", stored())
    assert_holds(io.SafetensorsSource(tmp_path), stored())
    assert_holds(io.SafetensorsSource(tmp_path / "model.safetensors"), stored())


def test_real_values_equal_those_of_the_safetensors_package(tmp_path):
    write(tmp_path / "any-name.safetensors", stored("F32", "F16", "I64"))
    source = io.SafetensorsSource(tmp_path)
    with safetensors.safe_open(tmp_path / "any-name.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            expected = file.get_tensor(name)
            np.testing.assert_array_equal(source.read(name).view(expected.dtype), expected)


def test_scalars_and_empty_tensors_have_rows(tmp_path):
    header = {"scalar": entry(0, 4, []), "empty": entry(4, 4, [0, 7]), "vector": entry(4, 12, [2])}
    (tmp_path / "model.safetensors").write_bytes(damaged(header, bytes(range(12))))
    source = io.SafetensorsSource(tmp_path)
    assert source.read("scalar").tolist() == [[0, 1, 2, 3]]
    assert source.read("empty").shape == (0, 28)
    assert source.read("vector").shape == (1, 8)


def test_shards_are_joined_from_the_folder_the_index_or_any_shard(tmp_path):
    rows = write_sharded(tmp_path)
    for path in [tmp_path, *tmp_path.iterdir()]:
        source = io.open_source(path)
        assert isinstance(source, io.SafetensorsSource)
        assert_holds(source, rows)


def test_a_file_beside_a_model_opens_alone(tmp_path):
    write_sharded(tmp_path)
    write(tmp_path / "adapter.safetensors", stored("F32"))
    assert set(io.SafetensorsSource(tmp_path / "adapter.safetensors").specs) == {"F32"}


def test_of_a_tensor_in_two_shards_the_index_chooses(tmp_path):
    rows = write_sharded(tmp_path)
    other = {"F32": 1 - rows["F32"], **{n: rows[n] for n in list(rows)[4:]}}
    write(tmp_path / "model-00002-of-00002.safetensors", other)
    assert_holds(io.SafetensorsSource(tmp_path), rows)


def test_what_an_index_promises_must_be_there(tmp_path):
    write_sharded(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    write(second, stored("I8"))
    with pytest.raises(UserError, match=f"says that .* is in {second.name}, but it is not"):
        io.SafetensorsSource(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=f"1 of 2 shards are missing, the first is {second.name}"):
        io.SafetensorsSource(tmp_path)
    for text in ["{", "{}", '{"weight_map": 5}', '{"weight_map": {"a": "../../etc/passwd"}}', "[]"]:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match="weight_map"):
            io.SafetensorsSource(tmp_path)


DAMAGED = {
    "an empty file": (b"", "claims 0 bytes, but the file has 0"),
    "a header longer than the file": (damaged({}, length=1 << 40), "claims 1099511627776 bytes"),
    "a header that is no JSON": (damaged(b"{x"), "not that of safetensors"),
    "a header that is no object": (damaged([1]), "not that of safetensors"),
    "a header that is no text": (damaged(b"\xff\xff"), "not that of safetensors"),
    "a tensor without a shape": (damaged({"t": {"dtype": "F32", "data_offsets": [0, 0]}}), "'shape'"),
    "a tensor twice": (damaged(b'{"t": {}, "t": {}}'), "appears twice"),
    "a truncated file": (damaged({"t": entry(0, 16, [4])}, bytes(15)), "it is truncated"),
    "bytes at the end": (damaged({"t": entry(0, 16, [4])}, bytes(17)), "belong to no tensor"),
    "offsets that overlap": (
        damaged({"t": entry(0, 16, [4]), "u": entry(8, 24, [4])}, bytes(24)),
        "u begins at 8 where 16 was expected",
    ),
    "a gap": (damaged({"t": entry(8, 24, [4])}, bytes(24)), "t begins at 8 where 0"),
    "a size that is not the shape's": (damaged({"t": entry(0, 16, [5])}, bytes(16)), "16 bytes, .* needs 20"),
    "a negative size": (damaged({"t": entry(0, 16, [-4])}, bytes(16)), r"shape \[-4\]"),
    "a negative offset": (damaged({"t": entry(-16, 0, [4])}, bytes(16)), "-16"),
    "an unknown dtype": (damaged({"t": entry(0, 2, [4], "F4_E2M1")}, bytes(2)), "t has dtype 'F4_E2M1'"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        io.SafetensorsSource(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 400), value=st.integers(0, 255))
def test_one_wrong_byte_is_read_or_refused(tmp_path_factory, at, value):
    path = tmp_path_factory.getbasetemp() / "wrong.safetensors"
    write(path, stored("F32", "BF16", "I8"))
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    try:
        source = io.SafetensorsSource(path)
    except UserError:
        return
    for name in source.specs:
        source.read(name)


def test_a_path_that_holds_no_model_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"absent: no such file or folder; give .*safetensors.* or a \.gguf"):
        io.open_source(tmp_path / "absent")
    with pytest.raises(UserError, match=r"expected model\.safetensors, or model\.safetensors\.index\.json"):
        io.open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("some notes")
    with pytest.raises(UserError, match="neither GGUF nor safetensors"):
        io.open_source(tmp_path / "notes.txt")
    (tmp_path / "broken.gguf").write_bytes(b"<html>")
    with pytest.raises(UserError, match="not a GGUF file"):
        io.open_source(tmp_path / "broken.gguf")


def test_torch_checkpoints_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"has pytorch_model\.bin but no safetensors.*safe_serialization"):
        io.open_source(tmp_path)
    with pytest.raises(UserError, match="convert it to safetensors"):
        io.open_source(tmp_path / "pytorch_model.bin")


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", stored("F32"))
    with pytest.raises(UserError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        io.open_source(tmp_path)


def test_a_folder_with_one_gguf_opens_it_and_with_two_is_refused(tmp_path):
    for name in ("a", "b"):
        with io.GgufSink(tmp_path / f"{name}.gguf", {"general.name": name}, []) as sink:
            sink.commit()
        if name == "a":
            assert io.open_source(tmp_path).metadata == {"general.name": "a"}
    with pytest.raises(UserError, match="2 GGUF files; give one of them"):
        io.open_source(tmp_path)
