"""Rehearses a merge of three 70B (or 671B) models on a small disk: whole, killed and gone on with.

    python benchmarks/rehearsal_70b.py --work-dir WORK
    python benchmarks/rehearsal_70b.py --work-dir WORK --model deepseek-v3-fine --stop-after 120

The sources are sparse files with the true names and shapes, true headers, and random values in
some places of each shard. While shardmix merges them a sweeper makes holes where it writes zeros,
so that the output takes no more disk than those places. Ends with status 1 if anything is not as
promised.
"""

import hashlib
import json
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import shardmix_command
from checkpoint_shapes import DEEPSEEK_PRESETS, PRESETS
from checkpoints import parse_size
from harness import (
    BENCHMARKS,
    Workspace,
    print_table,
    remove,
    run,
    run_or_exit,
    wait_until_idle,
    workspace_arguments,
    write_csv,
)
from holes import Range
from machine import print_facts
from rehearsal_steps import HEADER, Step, Watch
from sweeper import Sweeper, sweep, zero_ranges

WEIGHTS = (0.5, 0.3, 0.2)
NEARLY_ALL = 0.99
"""Of what the journal claims must be kept; the last leaf of a file is a short one."""
FROM = ["-m", "shardmix"]
FROM_SMALL_DISK = [str(BENCHMARKS / "merge_on_small_disk.py")]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What all steps have in common."""

    python: str
    sources: Sequence[Path]
    output: Path
    options: Sequence[str]
    """Of every merge, without its budget."""
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
        """One merge, to its end, or until it is killed at `kill_at_bytes` or `kill_after_s`."""
        budget = ["--max-memory", f"{self.budget_bytes}B"]
        command = shardmix_command.merge_command(
            self.python, self.sources, self.output, weights=WEIGHTS, extra=[*budget, *self.options]
        )
        assert command[1:3] == FROM
        command[1:3] = FROM_SMALL_DISK
        wait_until_idle()
        watch = Watch(self.staging, **kill)
        with Sweeper(self.staging / "model", self.zeros) as sweeper:
            finished = run(command, watch=watch)
        if sweeper.error is not None:
            raise SystemExit(f"the sweeper had to stop: {sweeper.error}")
        for folder in (self.staging / "model", self.output):
            sweep(folder, self.zeros, slack_bytes=0)
        if finished.returncode == 0 and kill:
            raise SystemExit(f"{step}: it was done before it could be killed")
        if finished.returncode != (-signal.SIGKILL if kill else 0):
            raise SystemExit(f"{finished.stderr}\n{step}: failed ({finished.returncode})")
        report = {} if kill else shardmix_command.report_of(finished)
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
        """`shardmix verify`: the output's bytes against the digests made while merging."""
        command = [self.python, *FROM, "verify", self.output]
        return self._look("shardmix verify", command, self.plan["bytes_written"])

    def compare(self, folder: Path, *options: str) -> Step:
        """Numpy's sum of the sources against the bytes in a folder."""
        words = [f"{path}={weight}" for path, weight in zip(self.sources, WEIGHTS, strict=True)]
        script = BENCHMARKS / "expected_merge.py"
        return self._look("numpy's sum", [self.python, script, folder, *words, *options])

    def _look(self, step: str, command: Sequence[str | Path], moved_bytes: int = 0) -> Step:
        """A process that reads and changes nothing, and fails if anything is wrong."""
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
        """The merge undisturbed, then killed and gone on with, and a look at what it wrote."""
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
        """The merge's beginning, killed after a time, gone on with as long, and killed."""
        steps = [self.merge(title, kill_after_s=seconds) for title in ("begun", "gone on")]
        return [*steps, self.compare(self.staging / "model", "--finished-files")]


def make_sources(workspace: Workspace, model: str, num_regions: int) -> list[Path]:
    """Three sparse models of one shape, with values of their own in the same places."""
    kind = "llama" if model in PRESETS else "deepseek"
    options = ("--preset", model, "--sparse", "--regions", str(num_regions))
    return [
        workspace.checkpoint(f"{model}-sparse-{name}", kind, *options, "--seed", str(seed))
        for seed, name in enumerate("abc")
    ]


def zeros_of(sources: Sequence[Path], plan: Mapping[str, Any]) -> dict[str, list[Range]]:
    """Where each shard of the output will be zero; raises SystemExit where that isn't known."""
    zeros = {}
    for shard in plan["shards"]:
        paths = [source / shard["name"] for source in sources]
        if any(not path.exists() or path.stat().st_size != shard["bytes"] for path in paths):
            raise SystemExit(f"{shard['name']}: is not laid out as the sources' files are")
        zeros[shard["name"]] = zero_ranges(paths)
    return zeros


def output_digest(output: Path) -> str:
    """One digest of all that an output's shardmix.json tells of its files."""
    files = json.loads((output / "shardmix.json").read_text())["digests"]["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Rehearse and report; exit with 1 where something is not as promised."""
    parser = workspace_arguments("Rehearse the merge of three huge models on a small disk.")
    models = [*PRESETS, *DEEPSEEK_PRESETS]
    parser.add_argument("--model", choices=models, default="llama-3-70b", help="its shape")
    parser.add_argument("--max-memory", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--regions", type=int, default=6, help="of data in each shard, 2 MiB each")
    parser.add_argument("--kills", type=int, default=3, help="by SIGKILL, at random moments")
    parser.add_argument("--seed", type=int, default=70, help="of the moments")
    parser.add_argument("--no-undisturbed", action="store_true", help="leave that run out")
    parser.add_argument(
        "--stop-after", type=float, help="merge for so many seconds alone, and once more so many"
    )
    parser.add_argument("--fsync", action="store_true", help="merge with fsync")
    parser.add_argument("--csv", type=Path, default=Path("rehearsal.csv"), help="raw figures")
    args = parser.parse_args()
    options = [] if args.fsync else ["--no-fsync"]
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[args.python])
        output = workspace.scratch("merged")
        workspace.scratch(".merged.shardmix")
        sources = make_sources(workspace, args.model, args.regions)
        command = shardmix_command.plan_command(
            args.python,
            sources,
            output,
            weights=WEIGHTS,
            extra=["--max-memory", f"{args.max_memory}B"],
        )
        run_or_exit(command)  # brings files into the cache
        planned = run_or_exit(command)
        plan = json.loads(planned.stdout)
        print(
            f"3 x {args.model}: {plan['num_tensors']} tensors, {len(plan['shards'])} shards, "
            f"{plan['bytes_written'] / 1e9:.1f} GB each, "
            f"{args.regions} x 2 MiB of data a shard; {' '.join(options) or 'with fsync'}\n"
        )
        zeros = zeros_of(sources, plan)
        rehearsal = Rehearsal(args.python, sources, output, options, args.max_memory, plan, zeros)
        first = Step(
            step="plan",
            outcome="planned",
            is_as_promised=planned.peak_bytes <= args.max_memory,
            wall_s=round(planned.wall_s, 3),
            peak_bytes=planned.peak_bytes,
            projected_bytes=plan["projected_peak_bytes"],
            budget_bytes=args.max_memory,
        )
        if args.stop_after:
            steps = [first, *rehearsal.part(seconds=args.stop_after)]
        else:
            steps = rehearsal.whole(
                num_kills=args.kills, seed=args.seed, undisturbed=not args.no_undisturbed
            )
            steps = [first, *steps]
    print_table(HEADER, [step.row() for step in steps])
    digests = {step.output_digest for step in steps if step.output_digest}
    for digest in digests:
        print(f"\ndigest of the output's digests: {digest}")
    write_csv(args.csv, [{"model": args.model, **asdict(step)} for step in steps])
    is_as_promised = all(step.is_as_promised for step in steps) and len(digests) <= 1
    raise SystemExit(0 if is_as_promised else 1)


if __name__ == "__main__":
    main()
