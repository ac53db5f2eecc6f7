"""Sources that change while they are merged: an error that says so, whichever way they are read.

A merge whose mapped source shrinks used to die of SIGBUS, so each of these runs in a process of its
own. Files are cut between the moment a range is promised and the moment it is read, the one
that no check beforehand could see.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from shardmix.errors import SourceError
from shardmix.sources.identity import SourceFile, SourceIdentity
from shardmix.sources.readers import open_reader
from shardmix.system import sigbus
from tests.support.models import save_model
from tests.support.sampling import sample

PAGE = 4096
NUM_ELEMENTS = (
    3 << 19
)  # two chunks of either backend: the second half of a file is its second chunk

NEEDS_LLVM = pytest.mark.skipif(not find_spec("llvmlite"), reason="needs llvmlite")
CUTS = [
    cut
    for cut in product(("mmap", "pread"), ("torch", "llvm"), ("aligned", "unaligned", "integers"))
    if cut[1:] != ("llvm", "integers")  # which are compared, by numpy
]
BACKENDS = ["torch", pytest.param("llvm", marks=NEEDS_LLVM)]

# `cut` shortens a file once, as soon as a range is about to be read that it will then not have:
# just before the system call that reads it, or between its mapping and the loads.
CUTTING = """
    import builtins, json, os, sys, threading
    import shardmix
    from shardmix.sources import readers
    from shardmix.errors import SourceError

    class Cut:
        victim, length, done = None, None, False

    doomed = threading.local()

    def note(view):
        def noted(self, file, offset, into):
            path = str(self._open.path(file))
            doomed.path = path if path == Cut.victim and offset + len(into) > Cut.length else None
            return view(self, file, offset, into)
        return noted

    def cut_before(read):
        def cut(*args):
            if getattr(doomed, "path", None) and not Cut.done:
                Cut.done = True
                os.truncate(doomed.path, Cut.length)
            return read(*args)
        return cut

    readers.MmapReader.view = note(readers.MmapReader.view)
    readers.PreadReader.view = note(readers.PreadReader.view)
    readers.memoryview = cut_before(builtins.memoryview)
    os.preadv = cut_before(os.preadv)
    readers.PreadReader.descriptors = lambda *_: None  # kernels read past `os`
"""


def run(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that would tell of a fatal signal on stderr."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,  # a fault met again for ever would be a failure, too
        cwd=Path(__file__).resolve().parents[2],
    )


def results(code: str, *words: object) -> list[dict[str, str]]:
    """Return the lines of JSON that a fresh interpreter prints; it must end in peace."""
    done = run(code, *words)
    assert done.returncode == 0, done.stderr
    assert "exception" not in done.stderr.lower(), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def models(folder, *, kind="aligned"):
    """Save two models of one tensor, of floats (unaligned: at an odd address) or integers."""
    values = torch.arange(NUM_ELEMENTS) % 97
    tensor = values if kind == "integers" else values.bfloat16()
    paths = []
    for name in "ab":
        path = save_model(folder / name, {"weight": tensor}, config={}) / "model.safetensors"
        if kind == "unaligned":
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            header = content[8 : 8 + length] + b" "
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        paths.append(path)
    return paths


# What is in flight when the page is found missing: a kernel without the interpreter's lock, a copy
# to an aligned buffer with it, and numpy's comparison.
@pytest.mark.parametrize(("io", "backend", "kind"), sample("sources cut while read", CUTS, 3))
def test_source_cut_while_read_is_an_error(tmp_path, io, backend, kind):
    """A source cut short while it is read is an error."""
    if backend == "llvm":
        pytest.importorskip("llvmlite")
    paths = models(tmp_path, kind=kind)
    size = paths[0].stat().st_size
    lengths = {"nothing": 0, "half": size // 2, "a page less": size - PAGE, "a byte less": size - 1}
    code = textwrap.dedent(CUTTING) + textwrap.dedent("""
        a, b, output, io, backend, lengths = sys.argv[1:]
        for victim in (a, b):
            content = open(victim, "rb").read()
            for name, length in json.loads(lengths).items():
                Cut.victim, Cut.length, Cut.done = victim, length, False
                outcome = "no error"
                try:
                    models = {os.path.dirname(path): 0.5 for path in (a, b)}
                    options = {"io": io, "backend": backend, "restart": True}
                    shardmix.merge(models, output, **options, fsync=False, workers=1)
                except SourceError as error:
                    outcome = str(error)
                line = {"victim": victim, "cut to": name, "outcome": outcome}
                print(json.dumps(line), flush=True)
                with open(victim, "wb") as file:
                    file.write(content)
    """)
    output = tmp_path / "out"
    found = results(code, *paths, output, io, backend, json.dumps(lengths))
    assert [line["cut to"] for line in found] == [*lengths] * 2
    for line in found:
        assert line["outcome"].startswith(f"{line['victim']}: ends at byte"), line
        assert "it was cut short while in use; fetch it again" in line["outcome"]
    assert not output.exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unloadable_page_is_an_error(tmp_path, backend):
    """A page that cannot be loaded is an error though the file is whole.

    As with a disk that fails: played by a file that is cut, loaded from, and whole again.
    """
    paths = models(tmp_path)
    code = textwrap.dedent(CUTTING) + textwrap.dedent("""
        a, b, output, backend = sys.argv[1:]
        Cut.victim, Cut.length = a, 0
        size = os.stat(a).st_size
        release = readers.MmapReader.release

        def restored_before_release(self):
            if Cut.done:
                os.truncate(a, size)
            release(self)

        readers.MmapReader.release = restored_before_release
        try:
            models = {os.path.dirname(path): 0.5 for path in (a, b)}
            shardmix.merge(models, output, io="mmap", backend=backend, fsync=False, workers=1)
        except SourceError as error:
            print(json.dumps(str(error)))
    """)
    [message] = results(code, *paths, tmp_path / "out", backend)
    assert message == f"{paths[0]}: reading failed (Input/output error); check its disk"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shrinking_map_is_right_or_an_error(tmp_path, backend):
    """Whenever a mapped source shrinks, the outcome is right or an error."""
    paths = models(tmp_path)
    code = textwrap.dedent("""
        import json, os, random, shutil, sys, threading
        import shardmix
        from shardmix.errors import SourceError

        a, b, output, backend = sys.argv[1:]
        weights = {os.path.dirname(a): 0.5, os.path.dirname(b): 0.5}
        whole = {path: open(path, "rb").read() for path in (a, b)}
        chance = random.Random(7)

        def merge(cutter=None):
            def begin(_):
                if cutter is not None and cutter.ident is None:
                    cutter.start()
            report = shardmix.merge(weights, output, io="mmap", backend=backend, fsync=False,
                                    restart=True, workers=2, on_progress=begin)
            content = open(output + "/model.safetensors", "rb").read()
            shutil.rmtree(output)
            return content, report.seconds

        expected, seconds = merge()
        for _ in range(10):
            victim = chance.choice((a, b))
            length = chance.randrange(len(whole[victim]))
            cutter = threading.Timer(chance.uniform(0, seconds), os.truncate, (victim, length))
            try:
                outcome = "right" if merge(cutter)[0] == expected else "wrong"
            except SourceError:
                outcome = "error"
            cutter.join()
            print(json.dumps(outcome), flush=True)
            with open(victim, "wb") as file:
                file.write(whole[victim])
    """)
    outcomes = results(code, *paths, tmp_path / "out", backend)
    assert len(outcomes) == 10
    assert set(outcomes) <= {"right", "error"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, PAGE])
def test_cut_before_mapping_is_an_error(tmp_path, monkeypatch, length):
    """A source cut short between opening and mapping is an error.

    A mapping as short as the file would be read beyond its end by a compiled kernel.
    """
    path = tmp_path / "a"
    path.write_bytes(bytes(3 * PAGE))
    reader = open_reader("mmap", [SourceFile(str(path), 3 * PAGE)])
    descriptor = reader._open.descriptor

    def opened_then_cut(file):
        opened = descriptor(file)
        os.truncate(path, length)
        return opened

    monkeypatch.setattr(reader._open, "descriptor", opened_then_cut)
    with pytest.raises(SourceError, match=f"ends at byte {length}, before its header says"):
        reader.view(0, 0, memoryview(bytearray(3 * PAGE)))
    reader.close()


FOREIGN_FAULT = """
    import mmap, os, sys
    from shardmix.sources.identity import SourceFile, SourceIdentity
    from shardmix.sources.readers import open_reader

    guarded, foreign = sys.argv[1:]
    reader = open_reader("mmap", [SourceFile(guarded, os.stat(guarded).st_size)])
    reader.view(0, 0, memoryview(bytearray(8)))
    with open(foreign, "rb") as file:
        theirs = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    os.truncate(foreign, 0)
    print("before", flush=True)
    print(theirs[0], flush=True)
"""


def test_foreign_fault_does_as_ever(tmp_path):
    """A fault in a mapping that is not ours does what it always did."""
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(PAGE))
    done = run(textwrap.dedent(FOREIGN_FAULT), tmp_path / "a", tmp_path / "b")
    assert done.stdout == "before\n"
    assert done.returncode < 0  # killed: SIGBUS
    assert "Bus error" in done.stderr  # and the handler from before, faulthandler's, told of it


def test_sent_signal_does_as_ever(tmp_path):
    """A signal that was sent does what it always did."""
    (tmp_path / "a").write_bytes(bytes(PAGE))
    code = """
        import os, signal, sys
        from shardmix.sources.identity import SourceFile, SourceIdentity
        from shardmix.sources.readers import open_reader

        reader = open_reader("mmap", [SourceFile(sys.argv[1], 4096)])
        reader.view(0, 0, memoryview(bytearray(8)))
        os.kill(os.getpid(), signal.SIGBUS)
        print("survived")
    """
    done = run(textwrap.dedent(code), tmp_path / "a")
    assert done.returncode < 0
    assert done.stdout == ""


def disposition():
    action = sigbus._Action()
    ctypes.CDLL(None).sigaction(signal.SIGBUS, None, ctypes.byref(action))
    sa_restorer = 0x04000000  # set by the C library with whatever it installs
    return action.handler, action.flags | sa_restorer, bytes(action.mask[:8])


def test_former_handler_comes_back(tmp_path):
    """The former handler is back once the last reader is closed."""
    (tmp_path / "a").write_bytes(bytes(PAGE))
    files = [SourceFile(str(tmp_path / "a"), PAGE)]
    former = disposition()
    readers = [open_reader("mmap", files) for _ in range(2)]
    for reader in readers:
        reader.view(0, 0, memoryview(bytearray(8)))
    assert disposition() != former
    readers[0].close()
    assert disposition() != former
    readers[1].close()
    assert disposition() == former


def test_a_handler_that_came_on_top_stays(tmp_path):
    (tmp_path / "a").write_bytes(bytes(PAGE))
    code = """
        import signal, sys
        from shardmix.sources.identity import SourceFile, SourceIdentity
        from shardmix.sources.readers import open_reader

        reader = open_reader("mmap", [SourceFile(sys.argv[1], 4096)])
        reader.view(0, 0, memoryview(bytearray(8)))
        signal.signal(signal.SIGBUS, lambda *_: print("theirs"))
        reader.close()
        signal.raise_signal(signal.SIGBUS)
    """
    done = run(textwrap.dedent(code), tmp_path / "a")
    assert (done.returncode, done.stdout) == (0, "theirs\n")


def test_a_forked_process_is_protected_too(tmp_path):
    (tmp_path / "a").write_bytes(bytes(2 * PAGE))
    code = """
        import os, sys
        from shardmix.errors import SourceError
        from shardmix.sources.identity import SourceFile, SourceIdentity
        from shardmix.sources.readers import open_reader

        reader = open_reader("mmap", [SourceFile(sys.argv[1], 8192)])
        view = reader.view(0, 4096, memoryview(bytearray(4096)))
        child = os.fork()
        if child == 0:
            os.truncate(sys.argv[1], 4096)
        else:
            assert os.waitpid(child, 0)[1] == 0
        bytes(view)
        try:
            reader.release()
        except SourceError as error:
            os._exit(0 if "ends at byte 4096" in str(error) else 1)
        os._exit(2)
    """
    done = run(textwrap.dedent(code), tmp_path / "a")
    assert done.returncode == 0, done.stderr


def test_mapping_needs_faults_to_be_caught(tmp_path, monkeypatch):
    """If faults cannot be caught, mapping is refused."""
    (tmp_path / "a").write_bytes(bytes(PAGE))
    monkeypatch.setattr(sigbus, "_handler", None)
    monkeypatch.setattr(sigbus.platform, "machine", lambda: "s390x")
    reader = open_reader("mmap", [SourceFile(str(tmp_path / "a"), PAGE)])
    with pytest.raises(SourceError, match=r"would kill the process here.*use --io pread"):
        reader.view(0, 0, memoryview(bytearray(8)))
    reader.close()


@pytest.fixture(params=["mmap", "pread"])
def io(request):
    return request.param


def source(path, content):
    path.write_bytes(content)
    status = path.stat()
    return SourceFile(str(path), status.st_size, status.st_mtime_ns)


def test_replaced_source_is_refused_on_open(tmp_path, io):
    """A source replaced by one of its size is refused when opened."""
    file = source(tmp_path / "a", b"old content")
    (tmp_path / "new").write_bytes(b"new content")
    os.utime(tmp_path / "new", ns=(0, file.mtime_ns + 1))
    os.rename(tmp_path / "new", tmp_path / "a")
    with pytest.raises(SourceError, match=r"has changed since.*leave sources alone"):
        open_reader(io, [file]).view(0, 0, memoryview(bytearray(4)))


def test_unknown_time_leaves_the_size(tmp_path, io):
    """A source without a known time is judged only by its size."""
    (tmp_path / "a").write_bytes(b"content")
    os.utime(tmp_path / "a", ns=(0, 0))
    reader = open_reader(io, [SourceFile(str(tmp_path / "a"), 7)])
    assert bytes(reader.view(0, 0, memoryview(bytearray(7)))) == b"content"
    reader.close()
    SourceIdentity((SourceFile(str(tmp_path / "a"), 7),)).check_unchanged()


def test_deleted_source_is_read_then_missing(tmp_path, io):
    """A source deleted after it was opened is still read, and then found missing."""
    file = source(tmp_path / "a", bytes(range(256)))
    reader = open_reader(io, [file])
    reader.view(0, 0, memoryview(bytearray(8)))
    os.unlink(tmp_path / "a")
    assert bytes(reader.view(0, 200, memoryview(bytearray(56)))) == bytes(range(200, 256))
    reader.close()
    with pytest.raises(
        SourceError, match=r"a: was there when its header was read, and is gone now"
    ):
        SourceIdentity((file,)).check_unchanged()


@pytest.mark.parametrize("change", ["replaced", "in place", "longer", "touched"])
def test_changed_source_is_named_among_many(tmp_path, change):
    """A changed source is found among many, and named."""
    files = [source(tmp_path / name, np.random.default_rng(0).bytes(50)) for name in "abc"]
    SourceIdentity(tuple(files)).check_unchanged()
    path = tmp_path / "b"
    if change == "replaced":
        source(tmp_path / "new", bytes(50))
        os.rename(tmp_path / "new", path)
    else:
        path.write_bytes(bytes(51 if change == "longer" else 50))
    if change != "longer":
        os.utime(path, ns=(0, files[1].mtime_ns + 1))
    with pytest.raises(SourceError, match=r"b: has changed since its header was read"):
        SourceIdentity(tuple(files)).check_unchanged()


def test_all_views_are_judged_by_one_release(tmp_path):
    path = tmp_path / "a"
    file = source(path, bytes(2 * PAGE))
    reader = open_reader("mmap", [SourceFile(file.path, file.nbytes)])
    reader.view(0, 8, memoryview(bytearray(2 * PAGE - 8)))
    os.truncate(path, PAGE)
    reader.view(0, 0, memoryview(bytearray(8)))
    with pytest.raises(SourceError, match=f"ends at byte {PAGE}"):
        reader.release()
    reader.close()
