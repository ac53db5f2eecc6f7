"""Runs processes one at a time and measures them: time, CPU, peak resident memory; prints tables.

Knows no tool and imports nothing outside the standard library: what a child's `ru_maxrss` counts
from includes the resident set of the process that started it, so this one must stay small.
"""

import argparse
import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent

# Nothing to look up: the models are folders.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Finished:
    """What one process did and took, start-up included."""

    returncode: int
    """Exit status; negative, the signal that ended it."""
    wall_s: float
    user_s: float
    system_s: float
    peak_bytes: int
    """Peak resident set of the process, or of its largest waited-for child."""
    stdout: str
    stderr: str

    def last_words(self) -> str:
        """The last line of standard error that says something; a frame around it is left out."""
        lines = [line.strip(" \t│|") for line in self.stderr.splitlines()]
        telling = [line for line in lines if any(map(str.isalnum, line))]
        return telling[-1] if telling else f"exit status {self.returncode}"


SECONDS_BETWEEN_LOOKS = 0.05


def run(
    argv: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    on_start: Callable[[int], object] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Finished:
    """Run `argv` to its end and measure it; never raises for a failing process.

    `on_start` is given the process's id as soon as there is one. `watch` is called with it many
    times a second, which costs some of the time measured; what it raises ends the process.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | dict(environment or {}),
            # A group of its own: an interrupt ends the child's children too.
            start_new_session=True,
        )
        try:
            if on_start is not None:
                on_start(process.pid)
            ended, status, usage = os.wait4(process.pid, 0 if watch is None else os.WNOHANG)
            while watch is not None and not ended:
                watch(process.pid)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return Finished(
        returncode=process.returncode,
        wall_s=wall_s,
        user_s=usage.ru_utime,
        system_s=usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        stdout=texts[0],
        stderr=texts[1],
    )


def run_or_exit(argv: Sequence[str | Path], **options: Any) -> Finished:
    """`run`, but a failing process ends the benchmark with what it said."""
    finished = run(argv, **options)
    if finished.returncode:
        command = " ".join(map(str, argv))
        raise SystemExit(f"{finished.stderr}\nfailed ({finished.returncode}): {command}")
    return finished


def wait_until_idle(*, limit_s: float = 20.0, busy_share: float = 0.2) -> float:
    """Wait for other processes to calm down; the share of all cores still busy at the end."""
    deadline = time.monotonic() + limit_s
    while True:
        before = _cpu_ticks()
        time.sleep(0.3)
        after = _cpu_ticks()
        busy = 1 - (after[0] - before[0]) / max(1, after[1] - before[1])
        if busy <= busy_share or time.monotonic() >= deadline:
            return round(busy, 3)


def _cpu_ticks() -> tuple[int, int]:
    """(idle, all) ticks since the machine started; what waits for the disk counts as idle."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)


class Workspace:
    """A folder for a benchmark's data, which is gone at the end unless it is to be kept.

    Checkpoints found there from an earlier run are used as they are, and stay.
    """

    def __init__(self, root: Path, *, keep: bool) -> None:
        self.root = root
        self._keep = keep
        self._scratch: list[Path] = []
        self._made: list[Path] = []
        self._is_new = not root.exists()

    def __enter__(self) -> "Workspace":
        # So that `kill` and `timeout` end the measured process and clear up, as an interrupt does.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_exception: object) -> None:
        for path in self._scratch if self._keep else (*self._scratch, *self._made):
            remove(path)
        if self._is_new and not any(self.root.iterdir()):
            self.root.rmdir()

    def scratch(self, name: str) -> Path:
        """A path for outputs: not there now, and gone at the end."""
        path = self.root / name
        remove(path)
        self._scratch.append(path)
        return path

    def lasting(self, name: str) -> Path:
        """A path for what another run can use again; gone at the end if this run made it."""
        path = self.root / name
        if not path.exists():
            self._made.append(path)
        return path

    def checkpoint(self, name: str, kind: str, *options: str) -> Path:
        """The checkpoint `name`, written by checkpoints.py where it isn't there yet."""
        folder = self.lasting(name)
        # The generator writes config.json last: without it the checkpoint is half done.
        if not (folder / "config.json").exists():
            print(f"writing {name} ...", file=sys.stderr)
            script = BENCHMARKS / "checkpoints.py"
            run_or_exit([sys.executable, script, kind, folder, *options])
        return folder

    def environment(self, name: str, requirements: Sequence[str]) -> str:
        """The python of a virtual environment with these packages, made if it isn't there."""
        folder = self.lasting(name)
        python = folder / "bin" / "python"
        if not python.exists():
            print(f"installing {' '.join(requirements)} ...", file=sys.stderr)
            run_or_exit([sys.executable, "-m", "venv", folder])
            run_or_exit([python, "-m", "pip", "install", "--quiet", *requirements])
        return str(python)

    def linked_copy(self, folder: Path, name: str) -> Path:
        """A folder of hard links to the files of `folder`: another checkpoint of the same bytes."""
        copy = self.scratch(name)
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).hardlink_to(path)
        return copy


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def workspace_arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: where its data goes and what python to run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="data go here; local disk")
    parser.add_argument("--keep", action="store_true", help="leave the data for the next run")
    parser.add_argument("--python", default=sys.executable, help="python that has shardmix")
    return parser


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, the first to the left and the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([first, *rest]).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the raw figures; the columns are those of the first row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nraw figures: {path}")


def spread(values: Sequence[float]) -> str:
    """`"2.31 (2.20-3.05)"`: the median and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def mib(nbytes: float) -> str:
    """Bytes as whole MiB, for a table's cell."""
    return f"{nbytes / 1024**2:.0f}"
