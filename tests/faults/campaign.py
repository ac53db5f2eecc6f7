"""Harm merges in every way that a machine can, and see that nothing is lost or looks whole.

    python -m tests.faults.campaign kills --count 200 --seed 1
    python -m tests.faults.campaign all

The long form of tests/test_kill_and_resume.py and its neighbours; prints a table, and each failure
with what leads to it again. Needs the packages of the tests; `disk` needs leave to mount.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import errno
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from tests.faults import merges as faults
from tests.faults.faulty_cli import Fault
from tests.faults.merges import NEW, NONE, Bench, CommandLines, Merge, Variation

SMALL_LEAF = 64 * 1024
SMALL, LARGE = 100_000, 4_000_000
CHANGING = (
    *("open", "close", "write", "pwrite", "sendfile", "truncate", "ftruncate", "fsync", "flock"),
    *("mkdir", "rename", "replace", "renameat2", "unlink", "rmdir"),
)
"""Calls that change what is on the disk, or end a chance to."""
LOOKING = ("stat", "lstat", "scandir", "listdir", "statvfs")
ERRORS = {
    "open": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "close": (errno.EIO,),
    "read": (errno.EIO,),
    "preadv": (errno.EIO,),
    "pread": (errno.EIO,),
    "write": (errno.EIO, errno.ENOSPC),
    "pwrite": (errno.EIO, errno.ENOSPC),
    "sendfile": (errno.EIO, errno.ENOSPC),
    "truncate": (errno.EIO, errno.ENOSPC),
    "ftruncate": (errno.EIO,),
    "fsync": (errno.EIO, errno.ENOSPC),
    "flock": (errno.EIO, errno.ENOLCK),
    "mkdir": (errno.EACCES, errno.ENOSPC),
    "rename": (errno.EIO, errno.EACCES),
    "renameat2": (errno.EIO, errno.EINVAL),
    "unlink": (errno.EIO, errno.EACCES),
    "rmdir": (errno.EIO, errno.EACCES),
    **dict.fromkeys(LOOKING, (errno.EIO, errno.EACCES)),
}
"""What calls fail with; of some the merge knows to make something."""


class Tally:
    """What was done, by kind, and what went wrong; from several threads."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def add(self, kind: str, count: int = 1) -> None:
        """Count what was done."""
        with self._lock:
            self.counts[kind] += count

    def judge(self, trouble: str, story: object) -> bool:
        """Note a failure, if there is trouble; return whether there was none."""
        if trouble:
            with self._lock:
                self.failures.append(f"{trouble}\n    after {story}")
            print(f"FAILED: {trouble}\n    after {story}", flush=True)
        return not trouble

    def show(self, title: str, seconds: float) -> None:
        """Print the table."""
        print(f"\n{title}: {seconds:.0f} s")
        for kind, count in sorted(self.counts.items()):
            print(f"  {kind:<44} {count:>8,}")
        print(f"  {'failures':<44} {len(self.failures):>8,}", flush=True)


class Harness:
    """Benches for several episodes at once, and the figures of one campaign."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        self.tally = Tally()
        self._benches = threading.local()
        self._made: list[Bench] = []
        self._numbers = itertools.count()
        self._pool = concurrent.futures.ThreadPoolExecutor(options.jobs)

    def bench(self, *, is_large: bool = False) -> Bench:
        """Return this thread's bench: of small models and small leaves, or of larger ones."""
        key = "large" if is_large else "small"
        if not hasattr(self._benches, key):
            place = self.folder / f"{key}-{next(self._numbers)}"
            place.mkdir()
            commands = CommandLines(
                place, leaf_nbytes=0 if is_large else SMALL_LEAF, is_forking=not is_large
            )
            bench = Bench(place, commands, num_elements=LARGE if is_large else SMALL)
            setattr(self._benches, key, bench)
            self._made.append(bench)
        return getattr(self._benches, key)

    def run(self, episode, arguments) -> None:
        """Run an episode for each argument, a few at a time."""
        list(self._pool.map(lambda argument: self._guarded(episode, argument), arguments))

    def _guarded(self, episode, argument) -> None:
        try:
            episode(argument)
        except Exception:
            self.tally.judge(traceback.format_exc(), argument)

    def close(self) -> None:
        """End what was started."""
        self._pool.shutdown()
        for bench in self._made:
            bench.commands.close()


# Kills at random moments


def kills(harness: Harness) -> None:
    """Kill whole processes at moments by the clock, several times a merge; then let it end."""
    wanted, seed = harness.options.count or 200, harness.options.seed * 10_000
    while (missing := wanted - harness.tally.counts["killed"]) > 0 and not harness.tally.failures:
        numbers = range(seed, seed + -(-missing // 3))
        seed = numbers.stop
        harness.run(lambda number: _kills(harness, number), numbers)


def _kills(harness: Harness, seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randrange(1, 6)
    bench, tally = harness.bench(is_large=not harness.options.forked), harness.tally
    merge = bench.merge(Variation.drawn(chance))
    num_killed = 0
    while num_killed < count:
        budget = chance.choice([None, "900MiB", "1GiB", "2GiB"])
        workers, io = chance.choice([1, 2]), chance.choice(["pread", "mmap"])
        fault = Fault(
            seconds_per_call=chance.choice([0.002, 0.005]),
            operations=CHANGING,
            chunk_nbytes=chance.choice([64, 256, 2048]) * 1024,
        )
        words = () if budget is None else ("--max-memory", budget)
        is_resume = merge.num_claims > 0
        running = merge.start(fault, *words, workers=workers, io=io)
        # What to wait for, and how long after it to strike.
        landmark, num_calls = chance.choice(
            [
                *(("journal", 300), ("model/*.safetensors", 80), ("model/*.safetensors", 150)),
                *(("model/README.md", 30), ("placing", 50)),
            ]
        )
        _await(merge.staging, landmark, running)
        time.sleep(chance.uniform(0, num_calls * fault.seconds_per_call))
        running.kill()
        done = running.wait()
        story = (
            f"kills --seed {harness.options.seed}, episode {seed}: {merge.variation}, {landmark}"
        )
        if not tally.judge(merge.trouble(), story):
            return
        if done.status != -signal.SIGKILL:
            tally.add("ended before they were killed")
            if not tally.judge("" if done.status == 0 else str(done), story):
                return
            break
        num_killed += 1
        phase = merge.phase
        tally.add("killed")
        tally.add(f"killed: {'resumed, ' * is_resume}{phase}")
        if harness.options.losses and chance.random() < 0.5:
            tally.add(f"lost: {faults.lose_writes(merge, chance)}")
        if merge.found == NEW and not merge.variation.overwrite:
            break
    _end(merge, tally, seed)


def _await(folder: Path, pattern: str, running) -> None:
    """Wait until such a file is there, or the process is not."""
    while not _is_there(folder, pattern):
        try:
            os.kill(running.process, 0)
            state = Path(f"/proc/{running.process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.0005)


def _is_there(folder: Path, pattern: str) -> bool:
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # it is just being removed
        return False


def _end(merge: Merge, tally: Tally, story: object, *words: str) -> None:
    """Let a merge end in peace, and see that it is right."""
    tally.add("resumed to the end", merge.num_claims > 0)
    tally.add("claims found by the last run", merge.num_claims)
    if tally.judge(merge.trouble_after_end(*words), story):
        merge.remove()


def losses(harness: Harness) -> None:
    """Kill at random moments, and then lose writes as a power cut does."""
    harness.options.losses = harness.options.forked = True
    kills(harness)


# Kills at each call


POINTS = (
    (Variation(), {}),
    (Variation(overwrite=True, workers=1, digest="sha256"), {}),
    (Variation(overwrite=True, sharded=False, fsync=False), {}),
    (Variation(overwrite=True, sharded=False), {"has_no_exchange": True}),
    (Variation(sharded=False, digest="blake3"), {}),
)


def points(harness: Harness) -> None:
    """Kill before each call that changes something on the disk, and after the last."""
    bench = harness.bench()
    todo = []
    for variation, how in POINTS:
        made = faults.calls_of(bench.merge(variation), operations=CHANGING, **how)
        weights = [n for n, call in enumerate(made, 1) if call[1].endswith(".safetensors")]
        first = 1 if harness.options.every_call else weights[-1] // 2
        todo += [(variation, how, at, False) for at in range(first, len(made) + 1)]
        todo.append((variation, how, len(made), True))
    harness.run(lambda point: _point(harness, *point), todo)
    harness.run(lambda point: _point(harness, *point, is_twice=True), todo[::3])


def _point(harness, variation, how, at, is_after, *, is_twice=False) -> None:
    tally, merge = harness.tally, harness.bench().merge(variation)
    fault = Fault(at=at, action="kill", is_after=is_after, operations=CHANGING, **how)
    story = f"a kill at call {at}, {is_after=}, {how}, {variation}"
    done = merge.run(fault)
    if not tally.judge("" if done.status == -signal.SIGKILL else f"not killed: {done}", story):
        return
    tally.add(f"killed: {merge.phase}")
    tally.add("killed")
    if not tally.judge(merge.trouble(), story):
        return
    if is_twice:
        again = random.Random(at).randrange(1, 120)
        done = merge.run(dataclasses.replace(fault, at=again, is_after=False))
        story += f", and at call {again}"
        tally.add("killed a second time", done.status == -signal.SIGKILL)
        if not tally.judge(merge.trouble(), story):
            return
    _end(merge, tally, story)


# Full disks


def disk(harness: Harness) -> None:
    """Run out of disk at random sizes; enlarge it, and go on."""
    harness.run(
        lambda seed: _disk(harness, harness.options.seed * 10_000 + seed),
        range(harness.options.count or 60),
    )


def _disk(harness: Harness, seed: int) -> None:
    chance, tally, bench = random.Random(seed), harness.tally, harness.bench()
    variation = dataclasses.replace(Variation.drawn(chance), overwrite=False)
    needed = 900_000
    nbytes = int(needed * chance.uniform(0.02, 0.98))
    story = f"disk, episode {seed}: {nbytes} bytes, {variation}"
    with faults.small_disk(bench.folder / f"disk-{seed}", nbytes) as place:
        merge = bench.merge(variation, place)
        for _ in range(chance.choice([1, 2])):
            done = merge.run(Fault(is_blind=True))
            if done.status == 0 and merge.found == NEW:
                break  # with what was added it had room enough
            tally.add("full disks")
            trouble = merge.trouble()
            if done.status != 1 or not done.is_one_clear_line or "disk is full" not in done.stderr:
                trouble = trouble or f"no clear error: {done}"
            if merge.num_claims and "goes on from there" not in done.stderr:
                trouble = trouble or f"does not say how to go on: {done}"
            tally.add("with something kept", merge.num_claims > 0)
            if not tally.judge(trouble, story):
                return
            nbytes = min(needed, nbytes + chance.randrange(100_000))
            faults.resize(place, nbytes)
        faults.resize(place, 20_000_000)
        tally.add("claims found by the last run", merge.num_claims)
        if tally.judge(merge.trouble_after_end(), story):
            tally.add("ended well")
        shutil.rmtree(merge.output, ignore_errors=True)


# Calls that fail


def injected(harness: Harness) -> None:
    """Let a call fail: each one, or as many as were asked for at random."""
    chance, bench = random.Random(harness.options.seed), harness.bench()
    todo = []
    for variation in (
        Variation(),
        Variation(overwrite=True, sharded=False, digest="sha256"),
        Variation(overwrite=True, workers=2, backend="llvm"),
    ):
        how = {"operations": tuple(ERRORS)}
        made = faults.calls_of(bench.merge(variation), **how)
        for at, (operation, *_) in enumerate(made, 1):
            for number in ERRORS[operation]:
                fault = Fault(
                    at=at,
                    action="error",
                    number=number,
                    # A system that does not know a call has not carried it out.
                    is_after=operation in ("rename", "renameat2")
                    and number != errno.EINVAL
                    and chance.random() < 0.3,
                    is_lasting=chance.random() < 0.3,
                    **how,
                )
                todo.append((variation, fault))
        for is_sharded in {variation.sharded}:
            # Reading of sources; their root is not that of the output.
            root = str(bench.source("a", is_sharded))
            merge = bench.merge(variation)
            reads = faults.calls_of(merge, root=root, operations=("open", "preadv", "read"))
            for at in range(1, len(reads) + 1, 3):
                todo.append((variation, Fault(root="source", at=at, action="error", number=5)))
    count = harness.options.count
    harness.run(
        lambda each: _injected(harness, *each), chance.sample(todo, count) if count else todo
    )
    smooth = [
        (variation, fault)
        for variation in (Variation(), Variation(overwrite=True, digest="sha256", sharded=False))
        for fault in (Fault(action="short"), Fault(alarm_seconds=0.0005))
    ]
    harness.run(lambda each: _smooth(harness, *each), smooth)


def _injected(harness: Harness, variation: Variation, fault: Fault) -> None:
    tally, bench = harness.tally, harness.bench()
    if fault.root == "source":
        root = str(bench.source("a", variation.sharded))
        fault = dataclasses.replace(fault, root=root, operations=("open", "preadv", "read"))
    merge = bench.merge(variation)
    story = f"{variation}, {faults.told(fault)}"
    done = merge.run(fault)
    found = merge.found
    tally.add("errors injected")
    trouble = merge.trouble()
    if done.status == 0:
        tally.add("errors injected: without harm")
        trouble = trouble or ("" if found == NEW else f"succeeded, and there is {found}")
    elif done.status != 1 or not done.is_one_clear_line:
        trouble = trouble or f"no clear error: {done}"
    elif (
        found != NEW
        and fault.number == errno.ENOSPC
        and not any(words in done.stderr for words in ("disk is full", "cannot be read"))
    ):
        trouble = trouble or f"a full disk, not named: {done}"
    elif merge.num_claims and found != NEW and "goes on from there" not in done.stderr:
        trouble = trouble or f"does not say how to go on: {done}"
    elif found == NEW and "goes on from there" in done.stderr:
        trouble = trouble or f"says that something is to be done still: {done}"
    if tally.judge(trouble, story):
        _end(merge, tally, story)


def _smooth(harness: Harness, variation: Variation, fault: Fault) -> None:
    merge = harness.bench().merge(variation)
    for is_resume in (False, True):
        if is_resume:
            merge = harness.bench().merge(variation)
            merge.run(Fault(at=120, action="kill", operations=CHANGING))
        done = merge.run(fault)
        trouble = "" if done.status == 0 and merge.found == NEW else f"{merge.found}: {done}"
        harness.tally.add("merges of short reads and writes, or of interrupted calls")
        if harness.tally.judge(trouble, f"{variation}, {faults.told(fault)}"):
            merge.remove()


# Several at one output


def races(harness: Harness) -> None:
    """Let eight processes want one output at once; kill some."""
    for seed in range(harness.options.count or 20):
        harness.run(lambda number: _race(harness, number), [harness.options.seed * 10_000 + seed])


def _race(harness: Harness, seed: int) -> None:
    chance, tally, bench = random.Random(seed), harness.tally, harness.bench()
    variation = dataclasses.replace(Variation.drawn(chance), overwrite=seed % 3 == 0)
    merge = bench.merge(variation)
    log = bench.folder / f"race-{seed}.log"
    fault = Fault(log=str(log), operations=CHANGING)
    running = [merge.start(fault) for _ in range(8)]
    for doomed in chance.sample(running, seed % 3):
        time.sleep(chance.uniform(0, 0.3))
        doomed.kill()
        tally.add("killed")
    ends = [each.wait() for each in running]
    story = f"races, episode {seed}: {variation}"
    trouble = merge.trouble() or _interleaved(faults.calls(log))
    for end in ends:
        kinds = {
            "was first": end.status == 0,
            "killed": end.status == -signal.SIGKILL,
            "refused: at work": end.status == 1 and "is at work on this output" in end.stderr,
            "refused: exists": end.status == 1 and ": exists; " in end.stderr,
        }
        for kind, is_it in kinds.items():
            tally.add(f"of eight at once, {kind}", is_it)
        if not any(kinds.values()) or (end.status == 1 and not end.is_one_clear_line):
            trouble = trouble or f"another end: {end}"
    tally.add("races")
    if tally.judge(trouble, story):
        _end(merge, tally, story)
    log.unlink()


def _interleaved(made) -> str:
    """Say whether a second process wrote while the first was not done."""
    writers = [process for _, path, process in made if "/model/" in path or "/journal" in path]
    seen: list[int] = []
    for process in writers:
        if process in seen[:-1]:
            return f"processes wrote in turn: {seen}"
        if process not in seen:
            seen.append(process)
    return ""


# Signals


def signals(harness: Harness) -> None:
    """Interrupt and terminate at each of many calls; once, or twice in a row."""
    chance, bench = random.Random(harness.options.seed), harness.bench()
    todo = []
    for variation in (Variation(), Variation(overwrite=True, workers=2)):
        made = faults.calls_of(bench.merge(variation))
        ats = list(range(1, len(made) + 1, 2))
        ats = chance.sample(ats, min(len(ats), harness.options.count or 200))
        todo += [
            (variation, at, chance.choice([signal.SIGINT, signal.SIGTERM]), chance.random() < 0.3)
            for at in ats
        ]
    harness.run(lambda each: _signal(harness, *each), todo)


def _signal(harness: Harness, variation, at: int, number: int, is_twice: bool) -> None:
    tally, merge = harness.tally, harness.bench().merge(variation)
    story = f"signal {number} at call {at}, {is_twice=}, {variation}"
    fault = Fault(at=at, action="signal", number=number, is_lasting=is_twice)
    running = merge.start(fault)
    started = time.monotonic()
    done = running.wait()
    seconds = time.monotonic() - started
    found, trouble = merge.found, merge.trouble()
    tally.add("signals")
    tally.add(f"signals: with {found} at the output")
    if done.status == 0:
        trouble = trouble or ("" if found == NEW else f"succeeded, and there is {found}")
        tally.add("signals: too late to stop anything")
    elif not merge.staging.exists() and found != NEW and not done.stdout + done.stderr:
        tally.add("signals: before there was anything to say")
    elif done.status != 128 + number or not done.is_one_clear_line:
        trouble = trouble or f"no clear end: {done}"
    elif found == NEW and "complete" not in done.stderr:
        trouble = trouble or f"does not say that it is complete: {done}"
    elif merge.num_claims and found != NEW and "goes on from there" not in done.stderr:
        trouble = trouble or f"does not say how to go on: {done}"
    if seconds > 10:
        trouble = trouble or f"took {seconds:.0f} s to stop"
    if tally.judge(trouble, story):
        _end(merge, tally, story)


# Sources that change


CHANGES = {
    "touched": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000)),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "replaced": lambda path: _replace(path),
    "gone": lambda path: path.unlink(),
    "another header": lambda path: path.write_bytes(path.read_bytes().replace(b"BF16", b"F16 ", 1)),
}


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)


def sources(harness: Harness) -> None:
    """Change a source between two runs, and while one is at work."""
    todo = [
        (kind, is_during, io, is_sharded, name)
        for kind in CHANGES
        for is_during in (False, True)
        for io in ("pread", "mmap")
        for is_sharded in (True, False)
        for name in "ab"
    ]
    harness.run(lambda each: _source(harness, *each), todo)


def _source(harness, kind, is_during, io, is_sharded, name) -> None:
    tally, bench = harness.tally, harness.bench()
    variation = Variation(io=io, sharded=is_sharded)
    merge = bench.merge(variation)
    path = max(bench.source(name, is_sharded).glob("*.safetensors"))
    content, times = path.read_bytes(), path.stat()
    story = f"{path.name} of {name} {kind}, {is_during=}, {variation}"
    done = None
    try:
        if is_during:
            gate = bench.folder / "gate"
            running = merge.start(Fault(wait_for=str(gate)))
            _await(merge.staging, "model/*.safetensors", running)
            CHANGES[kind](path)
            gate.touch()
            done = running.wait()
            gate.unlink()
        else:
            merge.run(Fault(at=90, action="kill", operations=CHANGING))
            CHANGES[kind](path)
            done = merge.run()
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    tally.add("sources changed")
    tally.add(f"sources changed: {kind}, {'during a run' if is_during else 'between runs'}")
    trouble = merge.trouble()
    if done.status != 1 or not done.is_one_clear_line or path.name not in done.stderr:
        trouble = trouble or f"not refused, or not named: {done}"
    elif merge.found != NONE:
        trouble = trouble or f"there is {merge.found}"
    if tally.judge(trouble, story):
        # Its content is put back, but the file system knows that it was another.
        _end(merge, tally, story, "--restart")


CAMPAIGNS = {
    "kills": kills,
    "losses": losses,
    "points": points,
    "disk": disk,
    "injected": injected,
    "races": races,
    "signals": signals,
    "sources": sources,
}


def main() -> int:
    """Run what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("campaign", choices=[*CAMPAIGNS, "all"])
    parser.add_argument("--count", type=int, help="how many, where that is a question of chance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="episodes at once")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--forked", action="store_true", help="kills: quicker, of small models")
    parser.add_argument("--losses", action="store_true", help="kills: with lost writes")
    parser.add_argument("--every-call", action="store_true", help="points: from the very first on")
    options = parser.parse_args()
    num_failures = 0
    for name in CAMPAIGNS if options.campaign == "all" else [options.campaign]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="faults-") as folder:
            harness = Harness(Path(folder).resolve(), argparse.Namespace(**vars(options)))
            try:
                CAMPAIGNS[name](harness)
            finally:
                harness.close()
        harness.tally.show(name, time.monotonic() - started)
        num_failures += len(harness.tally.failures)
    return int(num_failures > 0)


if __name__ == "__main__":
    sys.exit(main())
