"""What somebody may have put where a merge writes, and the precious things that it leads to."""

import os
import signal
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

SOMEBODY = 12345
"""A user that no test runs as."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


class Precious:
    """A tree of somebody's work, and what it was like."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "thesis.txt"
        (folder / "chapters").mkdir(parents=True)
        self.file.write_text("the work of years")
        (folder / "chapters" / "one.txt").write_text("the first chapter")
        (folder / "model.safetensors").write_text("weights that nobody else has")
        (folder / "config.json").write_text('{"precious": true}')
        os.chmod(folder / "chapters" / "one.txt", 0o640)
        self._was = self._found()

    def _found(self):
        found = {}
        for path in [self.folder, *sorted(self.folder.rglob("*"))]:
            there = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(there.st_mode) else b""
            name = path.relative_to(self.folder).as_posix()
            found[name] = (content, there.st_mode, there.st_uid, there.st_mtime_ns)
        return found

    def check(self) -> None:
        """Fail if anything of it was touched."""
        assert self._found() == self._was


def link_to_folder(path, precious):
    path.symlink_to(precious.folder)


def link_to_file(path, precious):
    path.symlink_to(precious.file)


def dangling_link(path, precious):
    path.symlink_to(precious.folder / "not-there-yet")


def hard_link(path, precious):
    os.link(precious.file, path)


def pipe(path, _precious):
    os.mkfifo(path)


PLANTS = (link_to_folder, link_to_file, dangling_link, hard_link, pipe)


def plant(kind, path: Path, precious: Precious) -> None:
    """Put it at a path, in the place of whatever is there."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        os.rename(path, path.with_name(f"{path.name}-moved"))
    elif os.path.lexists(path):
        path.unlink()
    kind(path, precious)


@contextmanager
def ends_soon():
    """Fail whatever waits, such as for a pipe's other end."""

    def fail(*_):
        raise AssertionError("it waits for something that never comes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CHANGING = ("open", "mkdir", "rename", "unlink", "rmdir", "scandir", "stat")


class Intruder:
    """Puts a link in the place of something, just before the n-th call that could follow it."""

    def __init__(self, monkeypatch, *, at: int, act) -> None:
        self.num_calls = 0
        for name in CHANGING:
            self._watch(monkeypatch, name, at, act)

    def _watch(self, monkeypatch, name, at, act):
        real = getattr(os, name)

        def call(target=".", *args, **options):
            # Those relative to a folder, which are all that a merge makes of its own.
            is_within = isinstance(target, int) or {"dir_fd", "src_dir_fd"} & options.keys()
            if is_within:
                self.num_calls += 1
                if self.num_calls == at:
                    self.num_calls += 1_000_000  # what it does itself does not count
                    act()
            return real(target, *args, **options)

        monkeypatch.setattr(os, name, call)
