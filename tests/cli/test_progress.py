"""What is shown of progress: never more than is true."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from shardmix.cli.progress import _fraction, _LinePrinter
from shardmix.execute.progress import ProgressEvent

BEGIN = ProgressEvent(
    num_bytes_done=0,
    num_bytes_kept=0,
    num_bytes_total=1000,
    num_shards_done=0,
    num_shards_total=2,
    seconds=0.0,
    resident_nbytes=1,
)
READ = replace(BEGIN, num_bytes_done=1000, seconds=1.0)
END = replace(READ, num_shards_done=2, seconds=2.0, is_end=True)


def lines_of(*events):
    stream = StringIO()
    printer = _LinePrinter(Console(file=stream, width=200), "merging")
    for event in events:
        printer(event)
    return stream.getvalue().splitlines()


def test_all_is_said_of_what_is_finished():
    """Files are forced to disk after their last byte is there."""
    lines = lines_of(BEGIN, READ, replace(READ, num_shards_done=1, seconds=1.5), END)
    assert [line[:13] for line in lines] == ["merging:   0%", "merging:  99%", "merging: 100%"]
    assert "shards 2/2" in lines[-1]
    assert [_fraction(event) for event in (BEGIN, READ, END)] == [0.0, 0.99, 1.0]


def test_nothing_to_read_ends_too():
    empty = replace(END, num_bytes_done=0, num_bytes_total=0)
    assert lines_of(replace(empty, is_end=False), empty)[-1].startswith("merging: 100%")


def test_a_second_part_begins_anew():
    """`verify --recompute` reads twice."""
    lines = lines_of(BEGIN, READ, BEGIN, replace(READ, num_shards_done=2), END)
    percents = [line[9:13].strip() for line in lines]
    assert percents == ["0%", "99%", "0%", "99%", "100%"]
