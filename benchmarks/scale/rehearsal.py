"""Rehearses a merge of three models of 70B or 671B on a small disk: whole, killed, gone on with."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import wait_until_idle
from benchmarks.lib.processes import Finished, run, run_or_exit
from benchmarks.lib.programs import MERGE, PLAN, command, patched
from benchmarks.lib.promises import budget_option
from benchmarks.lib.tables import Row, Size, mib, print_table
from benchmarks.lib.workspace import PRESETS, Workspace, benchmark, remove
from benchmarks.scale.holes import Range, sweep, zero_ranges

WEIGHTS = (0.5, 0.3, 0.2)
# shardmix without its check that the disk has room for the output, in which holes are made.
ON_SMALL_DISK = "from shardmix import api; api.check_disk = lambda *_, **_options: None"
NEARLY_ALL = 0.99
"""Of what the journal claims must be kept; the last leaf of a file is a short one."""
LEAF_BYTES = 4 * 1024**2
"""Bytes that one line of the journal claims (`system.hashing`)."""
LEAST_FREE_BYTES = 10 * 10**9
"""Of the disk; with less the rehearsal ends."""
FIGURES = {
    # Read of sources and written, or read again; of a killed merge, for the leaves claimed.
    "moved_bytes": "GB moved",
    # Source bytes that were not read again, since an earlier run had done their part.
    "kept_bytes": "GB kept",
    # Output that the journal claims at the end of the process.
    "claimed_bytes": "GB claimed",
    # Until it claimed anything new: start, plan, and check of the old.
    "first_claim_s": "1st claim s",
    "peak_bytes": "peak MiB",
    # Promised by the merge's report, or if it was killed by the plan's.
    "projected_bytes": "projected MiB",
    "budget_bytes": "budget MiB",
    # The most that the growing output took of the disk, or of what waits to be written to it.
    "staged_bytes": "staged GB",
}
"""Columns of figures that a step may have: each with its title."""


def step_of(step: str, finished: Finished, outcome: str, **figures: Any) -> Row:
    """Return the row of one process; an outcome in capitals is not as promised."""
    first = {"step": step, "outcome": outcome, "is_as_promised": outcome.islower()}
    first["wall_s"] = round(finished.wall_s, 3)
    known = {"peak_bytes": finished.peak_bytes, "output_digest": ""} | figures
    return first | dict.fromkeys(FIGURES, 0) | known


def print_steps(steps: Sequence[Row]) -> None:
    """Print a table of the steps."""
    rows = []
    for step in steps:
        rate = f"{step['moved_bytes'] / step['wall_s'] / 1e9:.2f}"
        cells = [step["step"], f"{step['wall_s']:.1f}", rate]
        for name, title in FIGURES.items():
            told = f"{step[name] / (1e9 if 'GB' in title else 1):.1f}"
            told = mib(step[name]) if "MiB" in title else told
            cells.append(told if step[name] else "")
        rows.append([*cells, step["outcome"]])
    print_table(["step", "wall s", "GB/s", *FIGURES.values(), "outcome"], rows)


class Watch:
    """Looks at a merge from outside, again and again; sweeps its output, and may kill it."""

    def __init__(
        self, staging: Path, zeros: Mapping[str, Sequence[Range]], kill_at_bytes: float
    ) -> None:
        self._staging, self._journal = staging, staging / "journal"
        self._zeros = zeros
        self._kill_at_bytes = kill_at_bytes
        self._position = self._num_lines = 0
        self._started = time.perf_counter()
        self.claimed_before = self.claimed_bytes()
        """What earlier runs had done."""
        self.first_claim_s = 0.0
        self.staged_bytes = 0
        """The most that the growing output took of the disk."""

    def claimed_bytes(self) -> int:
        """Return the bytes of output that the journal claims by now, to a leaf."""
        # There is none if the merge has not begun, or if the output is in place.
        with contextlib.suppress(FileNotFoundError), self._journal.open("rb") as file:
            file.seek(self._position)
            added = file.read()
            self._position += len(added)
            self._num_lines += added.count(b"\n")
        return max(0, self._num_lines - 1) * LEAF_BYTES  # the first line says what merge it is

    def __call__(self, pid: int) -> None:
        """Look once; raises SystemExit if the disk runs low."""
        seconds = time.perf_counter() - self._started
        claimed = self.claimed_bytes()
        if not self.first_claim_s and claimed > self.claimed_before:
            self.first_claim_s = seconds
        self.staged_bytes = max(self.staged_bytes, disk_bytes(self._staging / "model"))
        disk = self._staging.parent
        if shutil.disk_usage(disk).free < LEAST_FREE_BYTES:
            raise SystemExit(
                f"{disk}: less than {LEAST_FREE_BYTES // 10**9} GB are left on this disk; "
                "free some space, or give another --work-dir"
            )
        if claimed >= self._kill_at_bytes:
            os.kill(pid, signal.SIGKILL)
        sweep(self._staging / "model", self._zeros)


def disk_bytes(folder: Path) -> int:
    """Return what a folder's files take of the disk, or will; 0 if it is not there.

    Files may come and go meanwhile.
    """
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sum(entry.stat().st_blocks * 512 for entry in entries)
    return 0


class Rehearsal:
    """Three models, where they are merged to, and the steps that were taken."""

    def __init__(self, args: argparse.Namespace, workspace: Workspace) -> None:
        """Make the sources, and plan; raises SystemExit if a shard is not as the sources' are."""
        self._args = args
        self._output = workspace.scratch("merged")
        self._staging = workspace.scratch(".merged.shardmix")
        options = ("--sparse", "--regions", args.regions)
        self._sources = workspace.checkpoints(f"{args.model}-sparse", "abc", args.model, *options)
        self._where = {"output": self._output, "weights": WEIGHTS}
        self._where["options"] = budget_option(args.max_memory)
        words = command(PLAN, args.python, self._sources, **self._where)
        run_or_exit(words)  # brings files into the cache
        planned = run_or_exit(words)
        self._plan = plan = planned.report()
        print(
            f"3 x {args.model}: {plan['num_tensors']} tensors, {len(plan['shards'])} shards, "
            f"{plan['bytes_written'] / 1e9:.1f} GB each, {args.regions} x 2 MiB of data a shard; "
            f"{'with fsync' if args.fsync else '--no-fsync'}\n"
        )
        # Name of a shard → where the output will be zero.
        self._zeros = {}
        for shard in plan["shards"]:
            paths = [source / shard["name"] for source in self._sources]
            if any(not path.exists() or path.stat().st_size != shard["bytes"] for path in paths):
                raise SystemExit(f"{shard['name']}: is not laid out as the sources' files are")
            self._zeros[shard["name"]] = zero_ranges(paths)
        outcome = "planned" if planned.peak_bytes <= args.max_memory else "PEAK TOO HIGH"
        promised = {"projected_bytes": plan["projected_peak_bytes"]}
        promised["budget_bytes"] = args.max_memory
        self.steps = [step_of("plan", planned, outcome, **promised)]

    def merge(self, step: str, *, kill_at_bytes: float = math.inf) -> None:
        """Merge to the end, or until it is killed when so much is claimed."""
        is_killed, args, plan = kill_at_bytes < math.inf, self._args, self._plan
        words = command(MERGE, args.python, self._sources, fsync=args.fsync, **self._where)
        wait_until_idle()
        watch = Watch(self._staging, self._zeros, kill_at_bytes)
        finished = run(patched(words, ON_SMALL_DISK), watch=watch)
        for folder in (self._staging / "model", self._output):
            sweep(folder, self._zeros, slack_bytes=0)
        if finished.returncode == 0 and is_killed:
            raise SystemExit(f"{step}: it was done before it could be killed")
        if finished.returncode != (-signal.SIGKILL if is_killed else 0):
            raise SystemExit(f"{finished.stderr}\n{step}: failed ({finished.returncode})")
        report, digest = {}, ""
        if not is_killed:
            report = finished.report()
            # One digest of all that shardmix.json tells of the files.
            files = json.loads((self._output / "shardmix.json").read_text())["digests"]["files"]
            digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        projected = report.get("projected_peak_bytes", plan["projected_peak_bytes"])
        read_bytes, total_bytes = plan["bytes_read"], plan["bytes_written"]
        claimed_bytes = watch.claimed_bytes() if is_killed else total_bytes
        kept_bytes = report.get("bytes_kept", 0)
        outcome = "killed" if is_killed else "whole"
        if finished.peak_bytes > min(projected, args.max_memory):
            outcome = "PEAK TOO HIGH"
        elif report and kept_bytes < NEARLY_ALL * watch.claimed_before * read_bytes / total_bytes:
            outcome = "WORK LOST"
        new_share = (claimed_bytes - watch.claimed_before) / total_bytes
        figures = {
            "moved_bytes": round(new_share * (read_bytes + total_bytes)),
            "kept_bytes": kept_bytes,
            "claimed_bytes": claimed_bytes,
            "first_claim_s": round(watch.first_claim_s, 3),
            "projected_bytes": projected,
            "budget_bytes": args.max_memory,
            "staged_bytes": watch.staged_bytes,
            "output_digest": digest,
        }
        self.steps.append(step_of(step, finished, outcome, **figures))

    def take_steps(self) -> None:
        """Merge undisturbed, then killed and gone on with, and look at what was written."""
        args, total_bytes = self._args, self._plan["bytes_written"]
        if args.undisturbed:
            self.merge("undisturbed")
        if args.kills:
            remove(self._output)
            chance = random.Random(args.seed)
            for share in sorted(chance.uniform(0.05, 0.95) for _ in range(args.kills)):
                self.merge(f"killed at {share:.0%}", kill_at_bytes=share * total_bytes)
            self.merge("gone on to the end")
        # The digests made while merging, then numpy's sum of the sources.
        words = [f"{path}={weight}" for path, weight in zip(self._sources, WEIGHTS, strict=True)]
        looks = (
            ("shardmix verify", ["shardmix", "verify", self._output], total_bytes),
            ("numpy's sum", ["benchmarks.scale.expected_merge", self._output, *words], 0),
        )
        for step, module, moved_bytes in looks:
            finished = run([args.python, "-m", *module])
            print(f"{step}: {finished.stdout}{finished.stderr if finished.returncode else ''}")
            outcome = "DIFFERENT" if finished.returncode else "equal"
            self.steps.append(step_of(step, finished, outcome, moved_bytes=moved_bytes))


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Rehearse and report."""
    rehearsal = Rehearsal(args, workspace)
    rehearsal.take_steps()
    steps = rehearsal.steps
    print_steps(steps)
    digests = {step["output_digest"] for step in steps} - {""}
    for digest in digests:
        print(f"\ndigest of the output's digests: {digest}")
    is_as_promised = all(step["is_as_promised"] for step in steps) and len(digests) <= 1
    return [{"model": args.model, **step} for step in steps], is_as_promised


if __name__ == "__main__":
    benchmark(
        measure,
        model=("llama-3-70b", "its shape", PRESETS),
        max_memory=(Size("1GiB"), "the budget"),
        regions=(6, "of data in each shard, 2 MiB each"),
        kills=(3, "by SIGKILL, at random moments"),
        seed=(70, "of the moments"),
        undisturbed=(True, "a merge that is not killed, too"),
        fsync=(False, "merge with fsync"),
        csv=(Path("rehearsal.csv"), "raw figures"),
    )
