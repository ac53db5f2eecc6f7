"""A shardmix command line that is harmed on purpose: what runs in the process that comes to harm.

`python -m tests.faults.faulty_cli merge ...` is `shardmix merge ...` with the fault that the
environment variable SHARDMIX_FAULT names (JSON of `Fault`). `... --serve 0` loads all that a merge
needs, once, and forks such a command line for each request. The library itself knows nothing of
faults.
"""

import builtins
import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

FAULT_VARIABLE = "SHARDMIX_FAULT"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong, and when: at the n-th call that counts."""

    root: str = ""
    """Only calls about files below this folder count."""
    at: int = 0
    """The number of the call, from 1; 0: none."""
    action: str = "none"
    """kill, error, short, or signal: what happens then."""
    number: int = 0
    """The errno of an error; the number of a signal."""
    is_after: bool = False
    """Whether the call is made, and then it happens."""
    is_lasting: bool = False
    """Whether later calls of the same kind fail as well, as on a disk that is full."""
    operations: tuple[str, ...] = ()
    """Only these calls count; empty: all."""
    seconds_after_signal: float = 0.0
    """How long the call that a signal comes with takes after it."""
    log: str = ""
    """A file to write each call that counts into."""
    seconds_per_call: float = 0.0
    """How much longer than it needs each call takes that counts."""
    wait_for: str = ""
    """A file that each chunk's writing waits for."""
    reached: str = ""
    """A pipe that is opened, and closed, when that waiting begins."""
    alarm_seconds: float = 0.0
    """A signal that nobody minds comes as often as this, and interrupts what the system is at."""
    is_blind: bool = False
    """Whether the disk seems to have room without end when it is looked at beforehand."""
    has_no_exchange: bool = False
    """Whether the system cannot exchange two folders in one step."""
    chunk_nbytes: int = 64 * 1024
    """How large a chunk is; 0: as large as the merge would have it."""


class _Harm:
    """Counts calls, and does at the chosen one what was asked for."""

    def __init__(self, fault):
        self.fault = fault
        self.paths = {}  # of open files, by descriptor
        self.lock = threading.Lock()
        self.count = 0
        self.harmed = ""  # the kind of call that the error was at
        self.log = os.open(fault.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if fault.log else -1

    def path_of(self, target, dir_fd=None):
        if isinstance(target, int):
            return self.paths.get(target, "")
        path = os.fsdecode(target)
        if dir_fd is not None:
            return os.path.normpath(os.path.join(self.paths.get(dir_fd, ""), path))
        return os.path.abspath(path)

    def is_below_root(self, path):
        return path == self.fault.root or path.startswith(self.fault.root + "/")

    def counts(self, operation, path):
        if not self.is_below_root(path):
            return False
        return not self.fault.operations or operation in self.fault.operations

    def call(self, operation, path, function, *, short=None):
        """Make a call, unless it is the one to be harmed; `short` makes it do a part only."""
        fault = self.fault
        if not self.counts(operation, path):
            return function()
        time.sleep(fault.seconds_per_call)
        with self.lock:
            self.count += 1
            is_it = self.count == fault.at
            if is_it:
                self.harmed = operation
            is_it = is_it or (fault.is_lasting and self.harmed == operation)
            self.note(operation, path)
        if fault.action == "short" and short is not None and fault.at in (0, self.count):
            return short()
        if not is_it:
            return function()
        if fault.action == "signal":
            os.kill(os.getpid(), fault.number)
            time.sleep(fault.seconds_after_signal)
            result = function()
            self.note(f"{operation}, ended", path)
            return result
        if not fault.is_after and operation != "close":
            self.strike(operation, path)
        result = function()
        self.strike(operation, path)
        return result

    def note(self, operation, path):
        if self.log >= 0:
            line = json.dumps([operation, os.path.relpath(path, self.fault.root), os.getpid()])
            REAL["write"](self.log, line.encode() + b"\n")

    def strike(self, operation, path):
        if self.fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.action == "error":
            named = (path,) if operation in NAMING else ()
            raise OSError(self.fault.number, os.strerror(self.fault.number), *named)


REAL = {
    name: getattr(os, name)
    for name in (
        *("open", "close", "read", "write", "pread", "preadv", "pwrite", "fsync", "truncate"),
        *("ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir", "sendfile", "stat"),
        *("lstat", "scandir", "listdir", "statvfs"),
    )
}

NAMING = ("open", "mkdir", "rename", "unlink", "rmdir", "stat", "lstat", "scandir", "listdir")
"""Calls whose errors tell the path."""


def install(fault):
    """Put the fault into this process."""
    harm = _Harm(fault)
    _watch_paths(harm)
    _watch_descriptors(harm)
    _watch_file_objects(harm)
    _watch_exchange(harm)
    _wait(harm)
    if fault.alarm_seconds:
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, fault.alarm_seconds, fault.alarm_seconds)
    from shardmix.execute import read_ahead
    from shardmix.sources import readers

    # A thread of its own, whose calls would come between those that are counted.
    read_ahead.MOST_NBYTES = 0
    # Kernels read past `os`, and leave what goes wrong to these readers.
    readers.PreadReader.descriptors = lambda *_: None
    if fault.chunk_nbytes:
        from shardmix.plan.memory_budget import BEST_CHUNK_NBYTES

        BEST_CHUNK_NBYTES.update(dict.fromkeys(BEST_CHUNK_NBYTES, fault.chunk_nbytes))
    if fault.is_blind:
        import shutil

        roomy = shutil.disk_usage("/")._replace(free=1 << 60)
        shutil.disk_usage = lambda _: roomy


def _watch_paths(harm):
    def watched(name):
        real = REAL[name]

        def call(target=".", *args, dir_fd=None, **options):
            if dir_fd is not None:
                options["dir_fd"] = dir_fd
            return harm.call(
                name, harm.path_of(target, dir_fd), lambda: real(target, *args, **options)
            )

        return call

    for name in ("unlink", "rmdir", "mkdir", "truncate"):
        setattr(os, name, watched(name))

    def moved(name):
        real = REAL[name]

        def call(source, target, *, src_dir_fd=None, dst_dir_fd=None):
            return harm.call(
                name,
                harm.path_of(source, src_dir_fd),
                lambda: real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd),
            )

        return call

    for name in ("rename", "replace"):
        setattr(os, name, moved(name))
    for name in ("stat", "lstat", "scandir", "listdir", "statvfs"):
        setattr(os, name, watched(name))

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        where = harm.path_of(path, dir_fd)
        descriptor = harm.call(
            "open", where, lambda: REAL["open"](path, flags, mode, dir_fd=dir_fd)
        )
        harm.paths[descriptor] = where
        return descriptor

    os.open = opened


def _watch_descriptors(harm):
    def watched(name, shorten=None):
        real = REAL[name]

        def call(descriptor, *args):
            short = None if shorten is None else lambda: real(descriptor, *shorten(*args))
            path = harm.path_of(descriptor)
            if name == "close":
                harm.paths.pop(descriptor, None)
            return harm.call(name, path, lambda: real(descriptor, *args), short=short)

        return call

    def less(data):
        return data[: max(1, len(data) // 3)]

    os.fsync = watched("fsync")
    os.ftruncate = watched("ftruncate")
    os.close = watched("close")
    os.write = watched("write", lambda data: (less(data),))
    os.pwrite = watched("pwrite", lambda data, offset: (less(data), offset))
    os.pread = watched("pread", lambda count, offset: (max(1, count // 3), offset))
    os.preadv = watched("preadv", lambda buffers, offset: ([less(buffers[0])], offset))
    real_flock = fcntl.flock
    fcntl.flock = lambda descriptor, how: harm.call(
        "flock", harm.path_of(descriptor), lambda: real_flock(descriptor, how)
    )
    os.sendfile = lambda out, source, offset, count: harm.call(
        "sendfile",
        harm.path_of(out),
        lambda: REAL["sendfile"](out, source, offset, count),
        short=lambda: REAL["sendfile"](out, source, offset, max(1, min(count, 64) // 3)),
    )


def _watch_file_objects(harm):
    class File(io.FileIO):
        def __init__(self, path, mode):
            self.where = harm.path_of(path)
            if isinstance(path, int):  # opened, and counted, by os.open
                super().__init__(path, mode)
                return
            harm.call("open", self.where, lambda: super(File, self).__init__(path, mode))
            harm.paths[self.fileno()] = self.where

        def write(self, data):
            whole = memoryview(data)
            return harm.call(
                "write",
                self.where,
                lambda: super(File, self).write(whole),
                short=lambda: super(File, self).write(whole[: max(1, len(whole) // 3)]),
            )

        def readinto(self, buffer):
            whole = memoryview(buffer)
            return harm.call(
                "read",
                self.where,
                lambda: super(File, self).readinto(whole),
                short=lambda: super(File, self).readinto(whole[: max(1, len(whole) // 3)]),
            )

        def readall(self):
            return harm.call("read", self.where, super().readall)

        def close(self):
            if self.closed:
                return
            harm.paths.pop(self.fileno(), None)
            harm.call("close", self.where, super().close)

    real_open = io.open

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **rest):
        if rest or not harm.is_below_root(harm.path_of(file)):
            return real_open(file, mode, buffering, encoding, errors, newline, **rest)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedReader(raw) if mode.strip("bt") == "r" else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline)

    io.open = opened
    builtins.open = opened


def _watch_exchange(harm):
    """The one call that goes past Python's own: renameat2, through ctypes."""

    class Library(ctypes.CDLL):
        def __getattr__(self, name):
            if name == "renameat2" and harm.fault.has_no_exchange:
                raise AttributeError(name)
            function = super().__getattr__(name)
            if name != "renameat2":
                return function

            def exchange(old_folder, old, new_folder, new, flags):
                try:
                    return harm.call(
                        "renameat2",
                        harm.path_of(old, old_folder),
                        lambda: function(old_folder, old, new_folder, new, flags),
                    )
                except OSError as error:
                    ctypes.set_errno(error.errno)
                    return -1

            self.renameat2 = exchange
            return exchange

    ctypes.CDLL = Library


def _wait(harm):
    fault = harm.fault
    if not fault.wait_for:
        return
    pwrite, told = os.pwrite, []

    def patiently(descriptor, data, offset):
        while harm.path_of(descriptor).endswith(".safetensors"):
            if fault.reached and not told:
                told.append(fault.reached)
                REAL["close"](REAL["open"](fault.reached, os.O_WRONLY))
            with contextlib.suppress(FileNotFoundError):
                REAL["stat"](fault.wait_for)
                break
            time.sleep(0.001)
        return pwrite(descriptor, data, offset)

    os.pwrite = patiently


def run(words, fault):
    """Be the command line, with the fault."""
    install(fault)
    sys.argv = ["shardmix", *words]
    from shardmix.cli import main

    main()


def serve(leaf_nbytes):
    """Fork a command line for each request on standard input, and tell how each has ended.

    With smaller leaves a small model has as many of them as a large one has of the usual.
    """
    import torch

    from shardmix.system import hashing

    if leaf_nbytes:
        hashing.LEAF_NBYTES = leaf_nbytes  # before any module takes the figure from there
    # What a command loads late: who is not root may not be able to.
    import blake3  # noqa: F401
    import rich.console
    import rich.markup
    import rich.table  # noqa: F401

    from shardmix.cli.commands import app
    from tests.support.models import random_model, save_model

    # A merge by each backend loads whatever a merge needs; what is forked has it then.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        models = [save_model(place / name, random_model(1, torch.bfloat16)) for name in "ab"]
        words = ["merge", *(f"{model}=0.5" for model in models), "--quiet", "--device", "cpu"]
        for backend in ("torch", "llvm"):
            sys.argv = ["shardmix", *words, "--backend", backend, "-o", str(place / backend)]
            with contextlib.suppress(SystemExit):
                app()  # `main` would leave the process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what is shared with what is forked stays shared
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        process = os.fork()
        if process == 0:
            _be(request)
        print(process, flush=True)


def _be(request):
    for number, path in enumerate([os.devnull, request["stdout"], request["stderr"]]):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags, 0o666), number)
    if request["user"]:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    status = 1
    try:
        run(request["words"], Fault(**request["fault"]))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    else:
        run(sys.argv[1:], Fault(**json.loads(os.environ.get(FAULT_VARIABLE, "{}"))))
