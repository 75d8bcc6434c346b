"""GgufSource and headers, against files that gguf-py writes and damaged copies of them."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant import io
from jquant.core import TensorSpec, UserError
from jquant.io._gguf_header import encode, parse

TYPES = list(gguf.GGMLQuantizationType)

NUMBERS = {
    "uint8": np.uint8, "int8": np.int8, "uint16": np.uint16, "int16": np.int16, "uint32": np.uint32,
    "int32": np.int32, "uint64": np.uint64, "int64": np.int64, "float32": np.float32, "float64": np.float64,
}  # fmt: skip


def raw_tensor(type: gguf.GGMLQuantizationType, rows: int = 3, blocks: int = 2) -> np.ndarray:
    """Bytes that mean nothing: uint8 [rows, row bytes]."""
    block_bytes = gguf.GGML_QUANT_SIZES[type][1]
    return np.random.default_rng(type.value).integers(0, 256, (rows, blocks * block_bytes), np.uint8)


def write_reference(path: Path, *, alignment: int | None = None, **split: int) -> dict[str, np.ndarray]:
    """A file of gguf-py with one tensor of each type: name → stored bytes."""
    writer = gguf.GGUFWriter(path, "llama", **split)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "déjà vu")
    writer.add_uint32("llama.block_count", 7)
    writer.add_float32("llama.epsilon", 1e-5)
    writer.add_bool("tokenizer.add", True)
    writer.add_array("tokenizer.tokens", ["a", "", "ü", "日本"])
    writer.add_array("tokenizer.types", [1, 2, 3])
    tensors = {f"t.{t.name}": raw_tensor(t) for t in TYPES}
    for t in TYPES:
        writer.add_tensor(f"t.{t.name}", tensors[f"t.{t.name}"], raw_dtype=t)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def header_bytes(*pairs: bytes, tensors: int = 0, version: int = 3, count: int | None = None) -> bytes:
    pair_count = len(pairs) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pair_count) + b"".join(pairs)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor_info(name: bytes, *sizes: int, type: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + dims + struct.pack("<IQ", type, offset)


@pytest.mark.parametrize("alignment", [None, 64, 8])
def test_every_tensor_type_reads_as_it_was_stored(tmp_path, alignment):
    tensors = write_reference(tmp_path / "m.gguf", alignment=alignment)
    source = io.GgufSource(tmp_path / "m.gguf")
    assert list(source.specs) == list(tensors)
    for name, data in tensors.items():
        spec = source.specs[name]
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[spec.type]]
        assert spec.shape == (3, data.shape[1] // size * block)
        np.testing.assert_array_equal(source.read(name), data)
        np.testing.assert_array_equal(source.read(name, 1, 2), data[1:2])
        assert source.read(name, 3).shape == (0, data.shape[1])


def test_metadata_keeps_its_types(tmp_path):
    write_reference(tmp_path / "m.gguf")
    metadata = io.GgufSource(tmp_path / "m.gguf").metadata
    assert metadata["general.name"] == "déjà vu"
    assert metadata["llama.block_count"].dtype == np.uint32
    assert metadata["llama.epsilon"] == np.float32(1e-5)
    assert metadata["llama.epsilon"].dtype == np.float32
    assert metadata["tokenizer.add"] is True
    assert metadata["tokenizer.tokens"] == ["a", "", "ü", "日本"]
    assert metadata["tokenizer.types"].dtype == np.int32


def test_rows_that_a_tensor_has_not_are_refused(tmp_path):
    write_reference(tmp_path / "m.gguf")
    source = io.GgufSource(tmp_path / "m.gguf")
    for start, stop in [(-1, 2), (2, 1), (0, 4)]:
        with pytest.raises(ValueError, match="has 3 rows"):
            source.read("t.F32", start, stop)


def bounds(dtype: type) -> st.SearchStrategy:
    if issubclass(dtype, np.floating):
        return st.floats(width=32, allow_nan=False).map(dtype)
    limits = np.iinfo(dtype)
    return st.integers(int(limits.min), int(limits.max)).map(dtype)


SCALARS = [bounds(t) for t in NUMBERS.values()]
ARRAYS = [st.lists(bounds(t), min_size=1, max_size=5).map(np.array) for t in NUMBERS.values()]
VALUES = st.one_of(st.booleans(), st.text(min_size=1), st.lists(st.text(), min_size=1), *SCALARS, *ARRAYS)
KEYS = st.text(min_size=1).filter(lambda k: k != "general.architecture" and k != "general.alignment")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_headers_are_those_of_gguf_py_and_come_back(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("header") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {t: gguf.GGUFValueType[n.upper()] for n, t in NUMBERS.items()}
    for key, value in metadata.items():
        if isinstance(value, np.ndarray):
            writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, kinds[value.dtype.type])
        elif isinstance(value, np.generic):
            writer.add_key_value(key, value.item(), kinds[type(value)])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    full = {"general.architecture": "llama", **metadata}
    assert encode(full, [])[0] == path.read_bytes()
    back = parse(path).metadata
    assert list(back) == list(full)
    for key, value in full.items():
        np.testing.assert_array_equal(back[key], value)
        assert type(back[key]) is type(value)
        assert getattr(back[key], "dtype", None) == getattr(value, "dtype", None)


def test_strings_that_are_no_utf8_survive_a_copy(tmp_path):
    strings = struct.pack("<IIQ", 9, 8, 2) + text(b"\xff\xfe") + text(b"\xed\xa0\x80")
    data = header_bytes(text(b"k\x80") + struct.pack("<I", 8) + text(b"\xe4"), text(b"tokens") + strings)
    (tmp_path / "m.gguf").write_bytes(data)
    assert encode(parse(tmp_path / "m.gguf").metadata, [])[0].rstrip(b"\0") == data.rstrip(b"\0")


def test_empty_arrays_and_boolean_arrays_keep_their_types(tmp_path):
    metadata = {"s": [], "i": np.array([], np.int64), "b": np.array([True, False])}
    (tmp_path / "m.gguf").write_bytes(encode(metadata, [])[0])
    back = parse(tmp_path / "m.gguf").metadata
    assert back["s"] == []
    assert back["i"].dtype == np.int64
    assert back["b"].tolist() == [True, False]
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["b"].contents() == [True, False]


def test_scalars_and_four_dimensions_have_shapes(tmp_path):
    layout = [TensorSpec("scalar", (), "F32"), TensorSpec("deep", (2, 3, 1, 32), "Q8_0")]
    header, offsets, size = encode({}, layout)
    (tmp_path / "m.gguf").write_bytes(header.ljust(size, b"\0"))
    assert list(parse(tmp_path / "m.gguf").specs.values()) == layout
    assert io.GgufSource(tmp_path / "m.gguf").read("deep", 1, 3).shape == (2, 34)
    assert offsets["deep"] % 32 == 0


def test_version_2_reads_like_version_3(tmp_path):
    write_reference(tmp_path / "3.gguf")
    data = bytearray((tmp_path / "3.gguf").read_bytes())
    data[4] = 2
    (tmp_path / "2.gguf").write_bytes(data)
    assert dict(io.GgufSource(tmp_path / "2.gguf").specs) == dict(io.GgufSource(tmp_path / "3.gguf").specs)


DAMAGED = {
    "another kind of file": (b"PK\x03\x04rest", "not a GGUF file"),
    "an empty file": (b"", "not a GGUF file"),
    "version 1": (header_bytes(version=1), "GGUF version 1"),
    "big endian": (header_bytes(version=3 << 24), "big-endian"),
    "a huge number of tensors": (header_bytes(tensors=1 << 60), "claims"),
    "a huge number of pairs": (header_bytes(count=1 << 63), "claims"),
    "a huge key": (header_bytes(struct.pack("<Q", 1 << 62) + bytes(20)), "a metadata key claims"),
    "a huge array": (header_bytes(text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61)), "'k' claims"),
    "a huge vocabulary": (header_bytes(text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61)), "'k' claims"),
    "a huge token": (
        header_bytes(
            text(b"k") + struct.pack("<IIQ", 9, 8, 2) + text(b"") + struct.pack("<Q", (1 << 64) - 1)
        ),
        "'k' claims",
    ),
    "a huge token before others": (
        header_bytes(text(b"k") + struct.pack("<IIQQ", 9, 8, 2, (1 << 64) - 1) + bytes(20)),
        "'k' claims",
    ),
    "an unknown value type": (header_bytes(text(b"k") + struct.pack("<I", 13) + bytes(9)), "value type 13"),
    "an array of arrays": (
        header_bytes(text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(9)),
        "value type 9",
    ),
    "a key twice": (header_bytes(*2 * [text(b"k") + struct.pack("<IB", 0, 1)] + [b""], count=2), "twice"),
    "an alignment of 24": (
        header_bytes(text(b"general.alignment") + struct.pack("<II", 4, 24)),
        "alignment is .*24.* not a power of two",
    ),
    "an alignment of 0": (
        header_bytes(text(b"general.alignment") + struct.pack("<II", 4, 0)),
        "power of two",
    ),
    "five dimensions": (header_bytes(tensor_info(b"t", 1, 1, 1, 1, 1), tensors=1, count=0), "5 dimensions"),
    "an unknown tensor type": (header_bytes(tensor_info(b"t", 32, type=999), tensors=1, count=0), "type 999"),
    "half a block": (header_bytes(tensor_info(b"t", 48, type=8), tensors=1, count=0), "impossible for Q8_0"),
    "an impossible size": (
        header_bytes(tensor_info(b"t", 1 << 40, 1 << 40), tensors=1, count=0),
        "impossible for F32",
    ),
    "an empty tensor": (header_bytes(tensor_info(b"t", 0, 4), tensors=1, count=0), "impossible for F32"),
    "an offset between": (
        header_bytes(tensor_info(b"t", 1, offset=4), tensors=1, count=0),
        "no multiple of 32",
    ),
    "a tensor past the end": (
        header_bytes(tensor_info(b"t", 99), tensors=1, count=0),
        "ends at byte .* truncated",
    ),
    "a tensor twice": (
        header_bytes(tensor_info(b"t", 1), tensor_info(b"t", 1), tensors=2, count=0),
        "'t' appears twice",
    ),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, data, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        io.GgufSource(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    header, _, _ = encode(
        {"a": "text", "b": ["one", "two"], "c": np.arange(3)}, [TensorSpec("t", (2, 8), "F32")]
    )
    data = header + bytes(64)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    io.GgufSource(path)
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError):
            io.GgufSource(path)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(4, 300), value=st.integers(0, 255))
def test_one_wrong_byte_is_read_or_refused(tmp_path_factory, at, value):
    header, _, size = encode(
        {"a": "text", "b": ["one", "two"], "general.alignment": np.uint32(32)},
        [TensorSpec("t", (2, 8), "F32"), TensorSpec("u", (1, 32), "Q4_0")],
    )
    data = bytearray(header.ljust(size, b"\0"))
    data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "wrong.gguf"
    path.write_bytes(data)
    try:
        source = io.GgufSource(path)
    except UserError:
        return
    for name in source.specs:
        source.read(name)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_reference(tmp_path / "m.gguf")
    source = io.GgufSource(tmp_path / "m.gguf")
    last = list(source.specs)[-1]
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-40])
    with pytest.raises(UserError, match=f"{last} lacks"):
        source.read(last)
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(UserError, match="No such file"):
        source.read(last)


def test_any_shard_opens_the_whole_model(tmp_path):
    tensors = write_reference(tmp_path / "m.gguf", split_max_tensors=10)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) == -(-len(tensors) // 10)
    for shard in shards:
        source = io.GgufSource(shard)
        assert source.files == shards
        assert list(source.specs) == list(tensors)
        assert source.metadata["general.name"] == "déjà vu"
        assert not [key for key in source.metadata if key.startswith("split.")]
        for name, data in tensors.items():
            np.testing.assert_array_equal(source.read(name), data)
    assert list(io.open_source(tmp_path).specs) == list(tensors)


def test_shards_that_are_missing_renamed_or_mixed_are_refused(tmp_path):
    write_reference(tmp_path / "m.gguf", split_max_tensors=12)
    first, second, third = sorted(tmp_path.glob("*.gguf"))
    content = second.read_bytes()

    second.write_bytes(third.read_bytes())
    with pytest.raises(UserError, match=r"shard 2 of 3 .* its name says 1 of 3"):
        io.GgufSource(first)
    second.unlink()
    with pytest.raises(UserError, match=f"1 of 3 shards missing, the first is {second.name}"):
        io.GgufSource(third)
    second.write_bytes(content)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match="its name does not say which"):
        io.GgufSource(tmp_path / "renamed.gguf")


def test_memory_stays_flat_while_a_gigabyte_is_read(tmp_path):
    layout = [TensorSpec(f"blk.{i}.weight", (16384, 16384), "F16") for i in range(2)]
    header, _, size = encode({}, layout)
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(header)
        file.truncate(size)  # sparse
    script = f"""
import resource
from pathlib import Path
from jquant import io
source = io.GgufSource(Path({str(tmp_path / "m.gguf")!r}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in source.specs:
    for start in range(0, 16384, 2048):
        source.read(name, start, start + 2048)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown = int(run.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 3 * (64 << 20)
