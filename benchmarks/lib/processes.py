"""Runs processes one at a time and measures them: time, CPU, peak resident memory, reads.

Imports next to nothing: what a child's `ru_maxrss` counts from includes the resident set of the
process that started it, so this one must stay small.
"""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Nothing to look up: the models are folders.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
SECONDS_BETWEEN_LOOKS = 0.05


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
    read_calls_bytes: int
    """What read calls returned to it, from page cache or disk."""
    disk_bytes: int
    """What came from disk, by read calls or by page faults."""
    stdout: str
    stderr: str

    def last_words(self) -> str:
        """Return the last line of standard error that says something, without a frame around it."""
        lines = [line.strip(" \t│|") for line in self.stderr.splitlines()]
        telling = [line for line in lines if any(map(str.isalnum, line))]
        return telling[-1] if telling else f"exit status {self.returncode}"

    def report(self) -> dict[str, Any]:
        """Return the JSON object on standard output; raises SystemExit if there is none."""
        try:
            return dict(json.loads(self.stdout))
        except json.JSONDecodeError:
            raise SystemExit(f"no JSON report; standard error says:\n{self.stderr}") from None


def run(
    argv: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[int], object] | None = None,
) -> Finished:
    """Run `argv` to its end and measure it; never raises for a failing process.

    `watch` is called with its id many times a second, on a thread; what it raises ends the process.
    """
    is_over, errors = threading.Event(), []

    def look() -> None:
        try:
            while watch is not None and not is_over.wait(SECONDS_BETWEEN_LOOKS):
                watch(process.pid)
        except BaseException as error:
            errors.append(error)
            os.killpg(process.pid, signal.SIGKILL)

    with (
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | OFFLINE | dict(environment or {}),
            # A group of its own: an interrupt ends the child's children too.
            start_new_session=True,
        )
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            # Not reaped yet, so that its id stays its own and the kernel's figures can be read.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            wall_s = time.perf_counter() - started
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            is_over.set()
            watcher.join()
            lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if errors:
            raise errors[0]
        counts = dict(line.split(": ") for line in lines)
        for stream in (stdout, stderr):
            stream.seek(0)
        return Finished(
            returncode=process.returncode,
            wall_s=round(wall_s, 4),
            user_s=round(usage.ru_utime, 3),
            system_s=round(usage.ru_stime, 3),
            peak_bytes=usage.ru_maxrss * 1024,
            read_calls_bytes=int(counts["rchar"]),
            disk_bytes=int(counts["read_bytes"]),
            stdout=stdout.read(),
            stderr=stderr.read(),
        )


def run_or_exit(argv: Sequence[str | Path], **options: Any) -> Finished:
    """Run `argv`; a failing process ends the benchmark with what it said."""
    finished = run(argv, **options)
    if finished.returncode:
        command = " ".join(map(str, argv))
        raise SystemExit(f"{finished.stderr}\nfailed ({finished.returncode}): {command}")
    return finished


def tree_resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, its children and theirs; 0 once it is gone.

    Pages shared by several of them count for each, as in `ru_maxrss`; so do mapped files.
    """
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(each.memory_info().rss for each in family)
    except psutil.NoSuchProcess:
        return 0
