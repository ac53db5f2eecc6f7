"""Rehearses a merge of three 70B (or 671B) models on a small disk: whole, killed and gone on with.

    python -m benchmarks.scale.rehearsal --work-dir WORK
    python -m benchmarks.scale.rehearsal --work-dir WORK --model deepseek-v3-fine --stop-after 120

The sources are sparse files with the true names and shapes, true headers, and random values in
some places of each shard. While shardmix merges them, holes are made where it writes zeros, so that
the output takes no more disk than those places. Ends with status 1 if anything is not as promised.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import print_facts, wait_until_idle
from benchmarks.lib.processes import run, run_or_exit
from benchmarks.lib.programs import budget_option, merge_command, plan_command
from benchmarks.lib.shapes import DEEPSEEKS, LLAMAS
from benchmarks.lib.tables import Size, mib, print_table, write_csv
from benchmarks.lib.workspace import Workspace, parser, remove
from benchmarks.scale.holes import Range, sweep, zero_ranges

WEIGHTS = (0.5, 0.3, 0.2)
NEARLY_ALL = 0.99
"""Of what the journal claims must be kept; the last leaf of a file is a short one."""
LEAF_BYTES = 4 * 1024**2
"""What one line of the journal claims (`docs/design.md`)."""
LEAST_FREE_BYTES = 10 * 10**9
"""Of the disk; with less the rehearsal ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One process of the rehearsal: a row of the CSV."""

    step: str
    outcome: str
    is_as_promised: bool
    wall_s: float
    moved_bytes: int = 0
    """Read of sources and written, or read again; of a killed merge, for the leaves claimed."""
    kept_bytes: int = 0
    """Source bytes that were not read again, since an earlier run had done their part."""
    claimed_bytes: int = 0
    """Output that the journal claims at the end of the process."""
    first_claim_s: float = 0.0
    """From the process's start until it claimed anything new: start, plan, and check of the old."""
    peak_bytes: int
    """ru_maxrss of the ended process, which is its VmHWM."""
    projected_bytes: int = 0
    """Promised by the merge's report, or if it was killed by the plan's."""
    budget_bytes: int = 0
    staged_bytes: int = 0
    """The most that the growing output took of the disk, or of what waits to be written to it."""
    output_digest: str = ""
    """Of all digests in shardmix.json, so that outputs can be compared."""

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        return (
            self.step,
            f"{self.wall_s:.1f}",
            f"{self.moved_bytes / 1e9:.1f}",
            f"{self.moved_bytes / self.wall_s / 1e9:.2f}",
            f"{self.kept_bytes / 1e9:.1f}",
            f"{self.claimed_bytes / 1e9:.1f}",
            f"{self.first_claim_s:.1f}" if self.first_claim_s else "",
            mib(self.peak_bytes),
            mib(self.projected_bytes) if self.projected_bytes else "",
            mib(self.budget_bytes) if self.budget_bytes else "",
            f"{self.staged_bytes / 1e9:.1f}" if self.staged_bytes else "",
            self.outcome,
        )


HEADER = (
    *("step", "wall s", "GB moved", "GB/s", "GB kept", "GB claimed", "1st claim s", "peak MiB"),
    *("projected", "budget", "staged GB", "outcome"),
)


class Watch:
    """Looks at a merge from outside, again and again; sweeps its output, and may kill it."""

    def __init__(
        self, staging: Path, zeros: Mapping[str, Sequence[Range]], kill: Mapping[str, float]
    ) -> None:
        self._staging = staging
        self._zeros = zeros
        self._kill = kill
        self._position = self._num_lines = 0
        self._started = time.perf_counter()
        self._look_at_journal()
        self.claimed_before = self.claimed_bytes
        """What earlier runs had done."""
        self.first_claim_s = 0.0
        self.staged_bytes = 0
        """The most that the growing output took of the disk."""

    @property
    def claimed_bytes(self) -> int:
        """Bytes of output that are claimed by now, to a leaf."""
        return max(0, self._num_lines - 1) * LEAF_BYTES  # the first line says what merge it is

    def __call__(self, pid: int) -> None:
        """Look once; raises SystemExit if the disk runs low."""
        seconds = time.perf_counter() - self._started
        self._look_at_journal()
        if not self.first_claim_s and self.claimed_bytes > self.claimed_before:
            self.first_claim_s = seconds
        self.staged_bytes = max(self.staged_bytes, disk_bytes(self._staging / "model"))
        disk = self._staging.parent
        if shutil.disk_usage(disk).free < LEAST_FREE_BYTES:
            raise SystemExit(
                f"{disk}: less than {LEAST_FREE_BYTES // 10**9} GB are left on this disk; "
                "free some space, or give another --work-dir"
            )
        is_far = self.claimed_bytes >= self._kill.get("kill_at_bytes", float("inf"))
        if is_far or seconds >= self._kill.get("kill_after_s", float("inf")):
            os.kill(pid, signal.SIGKILL)
        sweep(self._staging / "model", self._zeros)

    def _look_at_journal(self) -> None:
        try:
            with (self._staging / "journal").open("rb") as file:
                file.seek(self._position)
                added = file.read()
        except FileNotFoundError:  # not begun, or the output is in place
            return
        self._position += len(added)
        self._num_lines += added.count(b"\n")


def disk_bytes(folder: Path) -> int:
    """Return what a folder's files take of the disk, or will; 0 if it is not there.

    Files may come and go meanwhile.
    """
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_blocks * 512 for entry in entries)
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What all steps have in common."""

    python: str
    sources: Sequence[Path]
    output: Path
    fsync: bool
    budget_bytes: int
    plan: Mapping[str, Any]
    """What `shardmix plan` said."""
    zeros: Mapping[str, Sequence[Range]]
    """Name of a shard → where the output will be zero."""

    @property
    def staging(self) -> Path:
        """Where the output grows."""
        return self.output.with_name(f".{self.output.name}.shardmix")

    def merge(self, step: str, **kill: float) -> Step:
        """Merge to the end, or until it is killed at `kill_at_bytes` or `kill_after_s`."""
        command = merge_command(
            "shardmix",
            self.python,
            self.sources,
            self.output,
            weights=WEIGHTS,
            fsync=self.fsync,
            options=budget_option(self.budget_bytes),
        )
        command[command.index("shardmix")] = "benchmarks.scale.merge_on_small_disk"
        wait_until_idle()
        watch = Watch(self.staging, self.zeros, kill)
        finished = run(command, watch=watch)
        for folder in (self.staging / "model", self.output):
            sweep(folder, self.zeros, slack_bytes=0)
        if finished.returncode == 0 and kill:
            raise SystemExit(f"{step}: it was done before it could be killed")
        if finished.returncode != (-signal.SIGKILL if kill else 0):
            raise SystemExit(f"{finished.stderr}\n{step}: failed ({finished.returncode})")
        report = {} if kill else finished.report()
        projected = report.get("projected_peak_bytes", self.plan["projected_peak_bytes"])
        read_bytes, total_bytes = self.plan["bytes_read"], self.plan["bytes_written"]
        claimed_bytes = watch.claimed_bytes if kill else total_bytes
        kept_bytes = report.get("bytes_kept", 0)
        outcome = "killed" if kill else "whole"
        if finished.peak_bytes > min(projected, self.budget_bytes):
            outcome = "PEAK TOO HIGH"
        elif report and kept_bytes < NEARLY_ALL * watch.claimed_before * read_bytes / total_bytes:
            outcome = "WORK LOST"
        new_share = (claimed_bytes - watch.claimed_before) / total_bytes
        return Step(
            step=step,
            outcome=outcome,
            is_as_promised=outcome.islower(),
            wall_s=round(finished.wall_s, 3),
            moved_bytes=round(new_share * (read_bytes + total_bytes)),
            kept_bytes=kept_bytes,
            claimed_bytes=claimed_bytes,
            first_claim_s=round(watch.first_claim_s, 3),
            peak_bytes=finished.peak_bytes,
            projected_bytes=projected,
            budget_bytes=self.budget_bytes,
            staged_bytes=watch.staged_bytes,
            output_digest="" if kill else output_digest(self.output),
        )

    def verify(self) -> Step:
        """Hold the output's bytes against the digests made while merging."""
        command = [self.python, "-m", "shardmix", "verify", self.output]
        return self._look("shardmix verify", command, self.plan["bytes_written"])

    def compare(self, folder: Path, *options: str) -> Step:
        """Hold the bytes in a folder against numpy's sum of the sources."""
        words = [f"{path}={weight}" for path, weight in zip(self.sources, WEIGHTS, strict=True)]
        script = [self.python, "-m", "benchmarks.scale.expected_merge"]
        return self._look("numpy's sum", [*script, folder, *words, *options])

    def _look(self, step: str, command: Sequence[str | Path], moved_bytes: int = 0) -> Step:
        """Run a process that reads and changes nothing, and fails if anything is wrong."""
        finished = run(command)
        is_equal = finished.returncode == 0
        print(f"{step}: {finished.stdout if is_equal else finished.stdout + finished.stderr}")
        return Step(
            step=step,
            outcome="equal" if is_equal else "DIFFERENT",
            is_as_promised=is_equal,
            wall_s=round(finished.wall_s, 3),
            moved_bytes=moved_bytes,
            peak_bytes=finished.peak_bytes,
        )

    def whole(self, *, num_kills: int, seed: int, undisturbed: bool) -> list[Step]:
        """Merge undisturbed, then killed and gone on with, and look at what was written."""
        steps = [self.merge("undisturbed")] if undisturbed else []
        if num_kills:
            remove(self.output)
            chance = random.Random(seed)
            for share in sorted(chance.uniform(0.05, 0.95) for _ in range(num_kills)):
                kill_at_bytes = share * self.plan["bytes_written"]
                steps.append(self.merge(f"killed at {share:.0%}", kill_at_bytes=kill_at_bytes))
            steps.append(self.merge("gone on to the end"))
        return [*steps, self.verify(), self.compare(self.output)]

    def part(self, *, seconds: float) -> list[Step]:
        """Merge the beginning, killed after a time, gone on with as long, and killed."""
        steps = [self.merge(title, kill_after_s=seconds) for title in ("begun", "gone on")]
        return [*steps, self.compare(self.staging / "model", "--finished-files")]


def zeros_of(sources: Sequence[Path], plan: Mapping[str, Any]) -> dict[str, list[Range]]:
    """Return where each shard of the output will be zero; raises SystemExit if that isn't known."""
    zeros = {}
    for shard in plan["shards"]:
        paths = [source / shard["name"] for source in sources]
        if any(not path.exists() or path.stat().st_size != shard["bytes"] for path in paths):
            raise SystemExit(f"{shard['name']}: is not laid out as the sources' files are")
        zeros[shard["name"]] = zero_ranges(paths)
    return zeros


def output_digest(output: Path) -> str:
    """Return one digest of all that an output's shardmix.json tells of its files."""
    files = json.loads((output / "shardmix.json").read_text())["digests"]["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def rehearse(args: argparse.Namespace, workspace: Workspace) -> list[Step]:
    """Make the sources, and take every step."""
    output = workspace.scratch("merged")
    workspace.scratch(".merged.shardmix")
    kind = "llama" if args.model in LLAMAS else "deepseek"
    options = ("--preset", args.model, "--sparse", "--regions", args.regions)
    sources = workspace.checkpoints(f"{args.model}-sparse", "abc", kind, *options)
    budget = args.max_memory
    command = plan_command(
        args.python, sources, output, weights=WEIGHTS, options=budget_option(budget)
    )
    run_or_exit(command)  # brings files into the cache
    planned = run_or_exit(command)
    plan = planned.report()
    print(
        f"3 x {args.model}: {plan['num_tensors']} tensors, {len(plan['shards'])} shards, "
        f"{plan['bytes_written'] / 1e9:.1f} GB each, {args.regions} x 2 MiB of data a shard; "
        f"{'with fsync' if args.fsync else '--no-fsync'}\n"
    )
    zeros = zeros_of(sources, plan)
    rehearsal = Rehearsal(args.python, sources, output, args.fsync, budget, plan, zeros)
    first = Step(
        step="plan",
        outcome="planned",
        is_as_promised=planned.peak_bytes <= budget,
        wall_s=round(planned.wall_s, 3),
        peak_bytes=planned.peak_bytes,
        projected_bytes=plan["projected_peak_bytes"],
        budget_bytes=budget,
    )
    if args.stop_after:
        return [first, *rehearsal.part(seconds=args.stop_after)]
    undisturbed = args.undisturbed
    return [
        first,
        *rehearsal.whole(num_kills=args.kills, seed=args.seed, undisturbed=undisturbed),
    ]


def main() -> None:
    """Rehearse and report; exit with 1 if something is not as promised."""
    args = parser(
        "Rehearse the merge of three huge models on a small disk.",
        model=("llama-3-70b", "its shape", [*LLAMAS, *DEEPSEEKS]),
        max_memory=(Size("1GiB"), "the budget"),
        regions=(6, "of data in each shard, 2 MiB each"),
        kills=(3, "by SIGKILL, at random moments"),
        seed=(70, "of the moments"),
        undisturbed=(True, "a merge that is not killed, too"),
        stop_after=(float, "merge for so many seconds only, and once more so many"),
        fsync=(False, "merge with fsync"),
        csv=(Path("rehearsal.csv"), "raw figures"),
    ).parse_args()
    with Workspace(args) as workspace:
        print_facts(args.work_dir, args.python)
        steps = rehearse(args, workspace)
    print_table(HEADER, [step.row() for step in steps])
    digests = {step.output_digest for step in steps if step.output_digest}
    for digest in digests:
        print(f"\ndigest of the output's digests: {digest}")
    write_csv(args.csv, [{"model": args.model, **asdict(step)} for step in steps])
    is_as_promised = all(step.is_as_promised for step in steps) and len(digests) <= 1
    raise SystemExit(0 if is_as_promised else 1)


if __name__ == "__main__":
    main()
