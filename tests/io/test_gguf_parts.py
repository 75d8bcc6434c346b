"""GgufPart: several writers of one output, killed and continued by another number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.gguf_layout import LAYOUT, METADATA, ROWS, put, write

from jquant import io
from jquant.core import OutputError
from jquant.io import _journal

NAMES = [spec.name for spec in LAYOUT]
SHARDED = [None, 4000]


def part(path: Path, process: int, **options) -> io.GgufPart:
    return io.GgufPart(path, METADATA, LAYOUT, process, **options)


def data(sink: io.GgufSink) -> list[bytes]:
    return [path.read_bytes() for path in sink.paths]


@pytest.mark.parametrize("limit", SHARDED)
def test_parts_and_sink_make_the_file_of_one_writer(tmp_path, limit):
    path = tmp_path / "m.gguf"
    (tmp_path / "alone").mkdir()
    alone = write(tmp_path / "alone" / "m.gguf", max_shard_bytes=limit)
    with io.GgufSink(path, METADATA, LAYOUT, max_shard_bytes=limit) as sink:
        with part(path, 1, max_shard_bytes=limit) as one, part(path, 2, max_shard_bytes=limit) as two:
            put(two, "experts")
            put(sink, "embedding")
            put(one, "norm", "output")
        sink.adopt_parts()
        assert set(sink.finished()) == set(NAMES)
        sink.commit()
    assert data(sink) == data(alone)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "alone", *sink.paths])


@pytest.mark.parametrize("limit", SHARDED)
def test_parts_and_sink_write_rows_of_one_tensor(tmp_path, limit):
    path = tmp_path / "m.gguf"
    (tmp_path / "alone").mkdir()
    alone = write(tmp_path / "alone" / "m.gguf", max_shard_bytes=limit)

    def put_rows(writer, name: str, start: int, stop: int) -> None:
        writer.write(name, start, ROWS[name][start:stop])
        writer.finish(name, start, stop)

    with io.GgufSink(path, METADATA, LAYOUT, max_shard_bytes=limit) as sink:
        with part(path, 1, max_shard_bytes=limit) as one:
            put_rows(one, "experts", 9, 15)
            put_rows(one, "output", 0, 7)
            with pytest.raises(ValueError, match="output: 2 rows are still to be written"):
                one.finish("output", 7, 9)
        put_rows(sink, "experts", 2, 4)
    with io.GgufSink(path, METADATA, LAYOUT, max_shard_bytes=limit, resume=True) as sink:
        assert sink.finished() == ()
        assert sink.left() == [
            ("embedding", 0, 40),
            ("norm", 0, 1),
            ("experts", 0, 2),
            ("experts", 4, 9),
            ("output", 7, 40),
        ]
        with part(path, 1, max_shard_bytes=limit) as one:
            put_rows(one, "output", 7, 40)
            put(one, "embedding", "norm")
        for start, stop in [(4, 9), (0, 2)]:
            put_rows(sink, "experts", start, stop)
        assert sink.finished() == ("experts",)
        with pytest.raises(ValueError, match="3 tensors are not finished, the first is embedding"):
            sink.commit()
        sink.adopt_parts()
        assert sink.left() == []
        sink.commit()
    assert data(sink) == data(alone)


def test_a_tensor_that_no_part_wrote_is_missing_at_the_end(tmp_path):
    path = tmp_path / "m.gguf"
    with io.GgufSink(path, METADATA, LAYOUT) as sink:
        with part(path, 1) as one:
            put(one, "norm", "output")
        put(sink, "embedding")
        sink.adopt_parts()
        with pytest.raises(ValueError, match="1 tensors are not finished, the first is experts"):
            sink.commit()
    assert not path.exists()


@pytest.mark.parametrize("again", [1, 2, 3])
def test_what_parts_had_finished_is_continued_by_another_number_of_them(tmp_path, again):
    path = tmp_path / "m.gguf"
    (tmp_path / "alone").mkdir()
    alone = write(tmp_path / "alone" / "m.gguf")
    with io.GgufSink(path, METADATA, LAYOUT, fingerprint="f"):  # it wrote nothing itself
        with part(path, 4, fingerprint="f") as four:
            put(four, "experts")
        with part(path, 1, fingerprint="f") as one:
            put(one, "norm")
    assert not path.exists()
    with io.GgufSink(path, METADATA, LAYOUT, resume=True, fingerprint="f") as sink:
        assert set(sink.finished()) == {"experts", "norm"}
        parts = [part(path, i, fingerprint="f") for i in range(1, again)]
        writers = [sink, *parts]
        for i, name in enumerate(["embedding", "output"]):
            put(writers[i % len(writers)], name)
        for one in parts:
            one.close()
        sink.adopt_parts()
        sink.commit()
    assert data(sink) == data(alone)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "alone", path]


def test_what_a_part_on_another_machine_had_not_synced_does_not_count(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    sink = io.GgufSink(path, METADATA, LAYOUT)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(_journal, "_boot", lambda: "of another machine")
        one, two = part(path, 1), part(path, 2)
        put(one, "norm")
        one.close()
        put(two, "output")
        two._journal.close(remove=False)  # killed
    with pytest.raises(OutputError, match="another run is writing"):
        io.GgufSink(path, METADATA, LAYOUT, resume=True)
    sink.close()
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ("norm",)


def test_a_part_that_is_still_at_work_keeps_others_out(tmp_path):
    path = tmp_path / "m.gguf"
    sink = io.GgufSink(path, METADATA, LAYOUT)
    with part(path, 1) as one:
        put(one, "norm")
        sink.close()
        for resume in (True, False):
            with pytest.raises(OutputError, match=r"partial\.1\.jsonl: another run is writing this output"):
                io.GgufSink(path, METADATA, LAYOUT, resume=resume)
    with io.GgufSink(path, METADATA, LAYOUT, resume=True) as sink:
        assert sink.finished() == ("norm",)


def test_parts_of_other_settings_are_forgotten(tmp_path):
    path = tmp_path / "m.gguf"
    with io.GgufSink(path, METADATA, LAYOUT, fingerprint="old"), part(path, 1, fingerprint="old") as one:
        put(one, "norm")
    with io.GgufSink(path, METADATA, LAYOUT, fingerprint="new") as sink:
        assert sink.finished() == ()
        sink.adopt_parts()
        assert sink.finished() == ()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_told(tmp_path):
    with pytest.raises(OutputError, match="write to a folder that all processes share"):
        part(tmp_path / "m.gguf", 1)
    assert not list(tmp_path.iterdir())
