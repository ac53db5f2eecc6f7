import os

import pytest

from shardmix.errors import OutputError, SourceError
from shardmix.output import file_writer as writer_module
from shardmix.output.file_writer import ShardWriter
from shardmix.sources import readers as reader_module
from shardmix.sources.identity import SourceFile
from shardmix.sources.readers import open_reader
from shardmix.system.held_folder import open_folder


@pytest.fixture(params=["mmap", "pread"])
def io(request):
    return request.param


def source_files(tmp_path, count=1, size=100_003):
    contents = [os.urandom(size) for _ in range(count)]
    paths = [tmp_path / f"f{number}" for number in range(count)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return contents, [SourceFile(str(path), size) for path in paths]


@pytest.fixture
def held(tmp_path):
    """The folder that shards are written into."""
    with open_folder(tmp_path) as folder:
        yield folder


def read(reader, file, offset, nbytes):
    view = reader.view(file, offset, memoryview(bytearray(nbytes)))
    content = bytes(view)
    view = None
    reader.release()
    return content


def test_any_range_is_read_as_it_is(tmp_path, io):
    (content,), files = source_files(tmp_path)
    reader = open_reader(io, files)
    for offset, nbytes in [(0, 8), (1, 7), (4096, 4096), (99_990, 13), (17, 90_000)]:
        assert read(reader, 0, offset, nbytes) == content[offset : offset + nbytes]
    reader.close()


def test_many_files_are_read_in_any_order(tmp_path, io, monkeypatch):
    """More files than may be open are read in any order."""
    monkeypatch.setattr("shardmix.sources.open_files.MAX_OPEN_FILES", 3)
    contents, files = source_files(tmp_path, count=10, size=500)
    before = len(os.listdir("/proc/self/fd"))
    reader = open_reader(io, files)
    for file in [*range(10), *reversed(range(10)), 4, 9, 4]:
        assert read(reader, file, 8, 300) == contents[file][8:308]
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 4
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_ranges_of_many_files_coexist(tmp_path, io, monkeypatch):
    """Ranges of many files are there at once."""
    monkeypatch.setattr("shardmix.sources.open_files.MAX_OPEN_FILES", 2)
    contents, files = source_files(tmp_path, count=7)
    reader = open_reader(io, files)
    for offset in (0, 8, 50_000):
        views = [reader.view(file, offset, memoryview(bytearray(40_000))) for file in range(7)]
        assert [bytes(view) for view in views] == [
            content[offset : offset + 40_000] for content in contents
        ]
        reader.release()
    reader.close()


def test_partial_reads_are_continued(tmp_path, monkeypatch):
    """A read takes as many calls as it needs."""
    (content,), files = source_files(tmp_path)
    monkeypatch.setattr(reader_module, "MAX_IO_NBYTES", 1000)
    reader = open_reader("pread", files)
    assert read(reader, 0, 3, 90_001) == content[3:90_004]
    reader.close()


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    (content,), files = source_files(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: real(fd, [bufs[0][:777]], at))
    reader = open_reader("pread", files)
    assert read(reader, 0, 0, 50_000) == content[:50_000]
    reader.close()


def test_resized_source_is_refused(tmp_path, io):
    """A source that changed size is refused."""
    _, files = source_files(tmp_path)
    os.truncate(files[0].path, 5)
    with pytest.raises(SourceError, match="has changed since"):
        open_reader(io, files).view(0, 0, memoryview(bytearray(4)))


def test_source_cut_once_open_is_refused(tmp_path):
    """A source cut short after it was opened is refused."""
    _, files = source_files(tmp_path)
    reader = open_reader("pread", files)
    read(reader, 0, 0, 10)
    os.truncate(files[0].path, 50)
    with pytest.raises(SourceError, match="ends at byte 50"):
        reader.view(0, 40, memoryview(bytearray(20)))
    reader.close()


def test_a_source_that_vanished_is_refused(tmp_path, io):
    _, files = source_files(tmp_path)
    os.unlink(files[0].path)
    with pytest.raises(SourceError, match="cannot be opened"):
        open_reader(io, files).view(0, 0, memoryview(bytearray(4)))


def test_chunks_land_at_their_offsets(tmp_path, held):
    """Chunks land at their offsets, in any order."""
    path = tmp_path / "shard"
    writer = ShardWriter(held, "shard", file_nbytes=8 + 6 + 8)
    writer.write(18, memoryview(b"4444"))
    writer.write(14, memoryview(b"3333"))
    assert path.read_bytes()[:14] == bytes(14)  # no header yet: not valid safetensors
    writer.finish([(6).to_bytes(8, "little"), b"{    }"], fsync=True)
    assert path.read_bytes() == (6).to_bytes(8, "little") + b"{    }" + b"33334444"


def test_partial_writes_are_continued(tmp_path, held, monkeypatch):
    """A write takes as many calls as it needs."""
    monkeypatch.setattr(writer_module, "MAX_IO_NBYTES", 7)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:5], at))
    content = os.urandom(100)
    writer = ShardWriter(held, "shard", file_nbytes=110)
    writer.write(10, memoryview(content))
    writer.close()
    assert (tmp_path / "shard").read_bytes()[10:] == content


def test_begun_file_is_gone_on_with(tmp_path, held):
    """A file that an earlier run began is gone on with."""
    (tmp_path / "shard").write_bytes(b"done")
    writer = ShardWriter(held, "shard", file_nbytes=8)
    pieces = [bytes(piece) for piece in writer.read(0, 8, memoryview(bytearray(3)))]
    assert pieces == [b"don", b"e\0\0", b"\0\0"]
    writer.close()


def test_a_link_is_not_written_through(tmp_path, held):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "shard").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError):
        ShardWriter(held, "shard", file_nbytes=10)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_full_disk_is_named_as_such(tmp_path, held, monkeypatch):
    writer = ShardWriter(held, "shard", file_nbytes=100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="the disk is full"):
        writer.write(0, memoryview(b"x"))
    writer.close()


def test_file_larger_than_memory_is_mapped(tmp_path):
    """A file larger than memory can be mapped."""
    size = 1 << 42
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, size)  # sparse
    reader = open_reader("mmap", [SourceFile(str(path), size)])
    assert read(reader, 0, size - 100_000, 1000) == bytes(1000)
    reader.close()


def test_closing_hides_no_error_of_a_view(tmp_path):
    """An error while a view is held is not hidden by closing."""
    _, files = source_files(tmp_path)
    reader = open_reader("mmap", files)
    view = reader.view(0, 0, memoryview(bytearray(8)))
    held = memoryview(view)
    reader.close()
    assert len(held) == 8
