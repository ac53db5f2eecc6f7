"""Merges that come to harm, and what must be true of them afterwards.

Starts command lines with a fault in them (`faulty_cli`), looks at what is at the output path, and
compares it, by hashes of its own, with what an undisturbed merge has written.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from tests.faults.faulty_cli import FAULT_VARIABLE, Fault
from tests.support.models import random_tensor, save_model

ROOT = Path(__file__).resolve().parents[2]
NONE, OLD, NEW = "nothing", "the old model", "the new model"
SECONDS_AT_MOST = 120  # whoever takes as long hangs
UNHARMED = Fault()


def told(fault: Fault) -> str:
    """Return what is special about a fault."""
    fields = dataclasses.fields(fault)
    special = {f.name: getattr(fault, f.name) for f in fields}
    return str({f.name: special[f.name] for f in fields if special[f.name] != f.default})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command line has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def is_one_clear_line(self) -> bool:
        lines = self.stderr.strip().splitlines()
        return len(lines) == 1 and lines[0].startswith(("error: ", "interrupted: ", "terminated: "))


class Running:
    """A command line at work."""

    def __init__(self, process: int, folder: Path, wait) -> None:
        self.process = process
        self._folder = folder
        self._wait = wait

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, number)

    def wait(self) -> Outcome:
        timer = threading.Timer(SECONDS_AT_MOST, self.kill)
        timer.start()
        try:
            status = self._wait(self.process)
        finally:
            timer.cancel()
        texts = [(self._folder / name).read_text() for name in ("stdout", "stderr")]
        shutil.rmtree(self._folder)
        return Outcome(status, *texts)


class CommandLines:
    """Starts command lines: forked from one process that has all of it loaded, or each anew."""

    def __init__(self, folder: Path, *, leaf_nbytes: int = 0, is_forking: bool = True) -> None:
        self._folder = folder / "told"
        self._folder.mkdir(parents=True)
        self._numbers = iter(range(1_000_000))
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._server: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        if is_forking:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.faulty_cli", "--serve", str(leaf_nbytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == "ready\n"

    def start(self, words, fault: Fault = UNHARMED, *, user: int = 0) -> Running:
        """Start `shardmix` with these words; `user` is for a process that is not to be root."""
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        words = [str(word) for word in words]
        paths = {name: str(folder / name) for name in ("stdout", "stderr")}
        for path in paths.values():
            Path(path).touch()
            os.chmod(path, 0o666)
        if self._server is not None:
            told = {"words": words, "fault": dataclasses.asdict(fault), "user": user, **paths}
            return Running(self._ask(told), folder, lambda process: self._ask({"wait": process}))
        assert not user
        variables = {**os.environ, FAULT_VARIABLE: json.dumps(dataclasses.asdict(fault))}
        with open(paths["stdout"], "wb") as stdout, open(paths["stderr"], "wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.faulty_cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=variables,
                cwd=ROOT,
            )
        self._children[child.pid] = child
        return Running(child.pid, folder, lambda process: self._children.pop(process).wait())

    def run(self, words, fault: Fault = UNHARMED, *, user: int = 0) -> Outcome:
        """Start one, and wait for its end."""
        return self.start(words, fault, user=user).wait()

    def _ask(self, request) -> int:
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._lock:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return int(self._server.stdout.readline())

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()


@dataclasses.dataclass(frozen=True)
class Variation:
    """One of the ways in which a merge can be run."""

    sharded: bool = True
    overwrite: bool = False
    digest: str = "xxh3"
    io: str = "pread"
    backend: str = "torch"
    workers: int = 1
    fsync: bool = True

    @staticmethod
    def drawn(chance: random.Random) -> "Variation":
        return Variation(
            sharded=chance.random() < 0.7,
            overwrite=chance.random() < 0.5,
            digest=chance.choice(["xxh3", "blake3", "sha256"]),
            io=chance.choice(["pread", "mmap"]),
            backend=chance.choice(["torch", "llvm"]),
            workers=chance.choice([1, 2]),
            fsync=chance.random() < 0.7,
        )


class Bench:
    """Sources, the merge of them that nothing disturbs, and new places to disturb it at."""

    def __init__(self, folder: Path, commands: CommandLines, *, num_elements: int) -> None:
        self.folder = folder
        self.commands = commands
        self._numbers = iter(range(1_000_000))
        self._wanted: dict[tuple[bool, str], Wanted] = {}
        for is_sharded in (False, True):
            for number, name in enumerate("ab"):
                save_source(self.source(name, is_sharded), number, num_elements, is_sharded)
        self.old = folder / "old"
        save_source(self.old, 7, 1000, False)
        (self.old / "merges.txt").write_text("of the old model alone")
        self.old_hashes = hashes(self.old)

    def source(self, name: str, is_sharded: bool) -> Path:
        return self.folder / f"{'sharded' if is_sharded else 'single'}-{name}"

    def wanted(self, variation: Variation) -> "Wanted":
        """Return what a merge of this kind comes to when nothing disturbs it."""
        key = variation.sharded, variation.digest
        if key not in self._wanted:
            plain = Variation(sharded=variation.sharded, digest=variation.digest)
            merge = Merge(self, plain, self.folder / f"wanted-{key[0]}-{key[1]}", None)
            done = merge.run()
            assert done.status == 0, done.stderr
            found = json.loads(done.stdout)
            self._wanted[key] = Wanted(
                hashes(merge.output), {name: found[name] for name in ("nonfinite", "warnings")}
            )
        return self._wanted[key]

    def merge(self, variation: Variation, place: Path | None = None) -> "Merge":
        """Return a merge at a place of its own."""
        wanted = self.wanted(variation)
        place = place or self.folder / f"work-{next(self._numbers)}"
        return Merge(self, variation, place, wanted)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What an undisturbed merge has come to."""

    hashes: dict[str, str]
    anomalies: dict[str, object]


class Merge:
    """A merge at a place of its own, for as many command lines as it takes."""

    def __init__(self, bench: Bench, variation: Variation, place: Path, wanted) -> None:
        self.bench = bench
        self.variation = variation
        self.place = place
        self.wanted = wanted
        self.output = place / "out"
        self.staging = place / ".out.shardmix"
        place.mkdir(exist_ok=True)
        if variation.overwrite:
            shutil.copytree(bench.old, self.output)

    def words(self, **changed) -> list[str]:
        how = dataclasses.replace(self.variation, **changed)
        sources = [self.bench.source(name, how.sharded) for name in "ab"]
        words = ["merge", f"{sources[0]}=0.75", f"{sources[1]}=0.25", "-o", str(self.output)]
        words += ["--io", how.io, "--backend", how.backend, "--workers", str(how.workers)]
        words += ["--digest", how.digest, "--device", "cpu", "--json", "--quiet"]
        return words + ["--overwrite"] * how.overwrite + ["--no-fsync"] * (not how.fsync)

    def start(self, fault: Fault = UNHARMED, *words: str, user: int = 0, **changed) -> Running:
        fault = dataclasses.replace(fault, root=fault.root or str(self.place))
        return self.bench.commands.start([*self.words(**changed), *words], fault, user=user)

    def run(self, fault: Fault = UNHARMED, *words: str, user: int = 0, **changed) -> Outcome:
        return self.start(fault, *words, user=user, **changed).wait()

    @property
    def found(self) -> str:
        """What is at the output path: one of NONE, OLD, NEW, or what is wrong."""
        strays = {path.name for path in self.place.iterdir()} - {"out", ".out.shardmix"}
        if strays:
            return f"besides the output there are {strays}"
        if not self.output.exists():
            return NONE
        there = hashes(self.output)
        if self.variation.overwrite and there == self.bench.old_hashes:
            return OLD
        if there != self.wanted.hashes:
            names = sorted({*there, *self.wanted.hashes})
            return "wrong: " + ", ".join(
                name for name in names if there.get(name) != self.wanted.hashes.get(name)
            )
        load(self.output)
        return NEW

    def trouble(self) -> str:
        """Return what may not be at the output path at any time; "" where all is well."""
        found = self.found
        allowed = {OLD, NEW} if self.variation.overwrite else {NONE, NEW}
        if (self.staging / "old").exists():
            allowed.add(NONE)  # between the two renames of a system that has no exchange
        return "" if found in allowed else found

    def trouble_after_end(self, *words: str, **changed) -> str:
        """Let the same command end in peace; return what is then wrong, or ""."""
        was = self.found
        done = self.run(UNHARMED, *words, **changed)
        if was == NEW and not self.variation.overwrite:
            # Whoever was killed had just made it whole.
            if done.status != 1 or "exists" not in done.stderr:
                return f"the output was whole, and then: {done}"
        elif done.status != 0:
            return f"cannot be finished: {done}"
        elif self.wanted.anomalies != {
            name: json.loads(done.stdout)[name] for name in self.wanted.anomalies
        }:
            return f"tells of other anomalies: {done.stdout}"
        if self.found != NEW:
            return f"in the end there is {self.found}"
        return "the hidden folder is still there" if self.staging.exists() else ""

    @property
    def phase(self) -> str:
        """How far it had come, by what is there."""
        if not self.staging.exists():
            return "before or after"
        if (self.staging / "placing").exists():
            return "placed" if self.found == NEW else "placing"
        if (self.staging / "model" / "shardmix.json").exists():
            return "last files"
        if (self.staging / "model" / "README.md").exists():
            return "auxiliary_files"
        return "weights" if self.num_claims else "beginning"

    @property
    def num_claims(self) -> int:
        """How many lines the journal has besides its head."""
        with contextlib.suppress(FileNotFoundError):
            return max(0, (self.staging / "journal").read_bytes().count(b"\n") - 1)
        return 0

    def remove(self) -> None:
        shutil.rmtree(self.place)


def save_source(folder: Path, number: int, num_elements: int, is_sharded: bool) -> None:
    """Save a model with all that there may be to tell of: NaN, Inf, integers that differ."""
    tensors = {
        f"layers.{layer}.weight": random_tensor(
            (num_elements,), torch.bfloat16, seed=number * 100 + layer
        )
        for layer in range(4)
    }
    tensors["layers.1.weight"][[3, num_elements // 2, -1]] = float("nan")
    tensors["layers.2.weight"][num_elements // 3] = float("inf")
    tensors["layers.2.steps"] = torch.arange(1000) + number * (torch.arange(1000) % 2)
    tensors["layers.3.norm"] = random_tensor((100,), torch.float32, seed=number)
    shards = None
    if is_sharded:
        shards = [[name for name in tensors if f".{layer}." in name] for layer in range(4)]
    save_model(folder, tensors, shards=shards)
    (folder / "tokenizer.json").write_text(json.dumps({"vocabulary": list(range(3000))}))
    (folder / "chat_template.jinja").write_text("{{ messages }}" * 20)


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load(folder: Path) -> None:
    """Load every tensor of a model."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                file.get_tensor(name)


def calls(log: Path) -> list[tuple[str, str, int]]:
    """Return the calls that command lines have made: kind, path below the root, and process."""
    with contextlib.suppress(FileNotFoundError):
        return [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    return []


def calls_of(merge: Merge, **how) -> list[tuple[str, str, int]]:
    """Return the calls that a merge makes when nothing disturbs it."""
    log = merge.bench.folder / f"{merge.place.name}.log"
    done = merge.run(Fault(log=str(log), **how))
    assert done.status == 0, done.stderr
    made = calls(log)
    log.unlink()
    return made


def lose_writes(merge: Merge, chance: random.Random) -> str:
    """Do to staged files what a power cut can; return what was done."""
    files = [path for path in merge.staging.rglob("*") if path.is_file() and path.name != "lock"]
    if not files:
        return "nothing"
    journal = merge.staging / "journal"
    target = chance.choice([*files, journal]) if journal.exists() else chance.choice(files)
    content = target.read_bytes()
    if not content:
        return "nothing"
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.choice([1, 100, 4096, 100_000]))
    kinds = {
        "zeros within": content[:start] + bytes(stop - start) + content[stop:],
        "cut short": content[:start],
        "emptied": b"",
        "zeros at the end": content + bytes(chance.choice([1, 4096])),
        "noise within": content[:start] + chance.randbytes(stop - start) + content[stop:],
    }
    if target == journal:
        lines = content.splitlines(keepends=True)
        kinds |= {
            "lines twice": content + b"".join(lines[1:]),
            "last line torn": content[: -chance.randrange(1, 20)],
            "claims of what was never written": content + _false_claims(lines),
        }
        del kinds["noise within"]  # a disk's doing, and not a lost write
    kind = chance.choice(list(kinds))
    target.write_bytes(kinds[kind])
    return f"{kind} of {target.name}"


def _false_claims(lines: list[bytes]) -> bytes:
    """Return claims of the first leaves, with the digest of another."""
    last = [-1, -1, "00" * 16]
    for line in lines[1:]:
        with contextlib.suppress(ValueError):  # torn before
            last = json.loads(line)
    digest = last[2]
    return b"".join(
        json.dumps([shard, leaf, digest, []]).encode() + b"\n"
        for shard in range(4)
        for leaf in range(3)
        if [shard, leaf] != last[:2]  # whose claim would be true, and only its anomalies lost
    )


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """Mount a disk of a few bytes; raises PermissionError where that is not allowed."""
    folder.mkdir()
    made = _mount("-t", "tmpfs", "-o", f"size={nbytes}", "none", folder)
    if made:
        folder.rmdir()
        raise PermissionError(made)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def resize(folder: Path, nbytes: int) -> None:
    """Give a mounted disk another size."""
    told = _mount("-o", f"remount,size={nbytes}", folder)
    assert not told, told


def _mount(*words) -> str:
    try:
        done = subprocess.run(
            ["mount", *map(str, words)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""
