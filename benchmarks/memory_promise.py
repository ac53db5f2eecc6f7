"""Holds the memory promise over many combinations: measured peak <= projected peak <= budget.

    python benchmarks/memory_promise.py --work-dir WORK

Combinations of shape, dtype, number of models, budget, workers, way to read, backend, output dtype
and digest, chosen so that any two values of two of these meet at least once. Ends with status 1 if
a promise was broken.
"""

import argparse
import itertools
import os
import random
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import shardmix_command
from checkpoints import parse_size
from harness import (
    OFFLINE,
    Finished,
    Workspace,
    mib,
    print_table,
    remove,
    run,
    workspace_arguments,
    write_csv,
)
from machine import print_facts

SHAPES = {
    "llama": ("llama", "--preset", "llama-100m"),
    "giant tensor": ("giant", "--tensor-size", "160MiB"),
    "12000 tensors": ("moe", "--num-tensors", "12000"),
}
DTYPES = {
    "bf16": ("BF16",),
    "f16": ("F16",),
    "f32": ("F32",),
    "bf16+f32": ("BF16", "F32"),
    "f16+bf16+f32": ("F16", "BF16", "F32"),
}
"""The models' dtypes, in turn."""
LEAST = "least"
NO_BUDGET = "none"
FACTORS: dict[str, tuple] = {
    "shape": tuple(SHAPES),
    "dtypes": tuple(DTYPES),
    "models": (2, 3, 5, 8, 10),
    "budget": (LEAST, "300MiB", "400MiB", "1GiB", NO_BUDGET),
    "workers": (1, 2, 4, 8),
    "io": ("pread", "mmap"),
    "backend": ("llvm", "torch"),
    "dtype": ("keep", "float32"),
    "digest": ("xxh3", "blake3", "sha256"),
}
Combination = Mapping[str, object]
NUM_DRAWN = 200
"""Combinations that the next one is chosen from."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What one merge held at most: a row of the CSV."""

    shape: str
    dtypes: str
    models: int
    budget: str
    workers: int
    io: str
    backend: str
    dtype: str
    digest: str
    budget_bytes: int
    """0 where none was given."""
    projected_bytes: int
    """What the merge promised."""
    reported_bytes: int
    """What shardmix measured of itself: VmHWM."""
    measured_bytes: int
    """What the kernel said when the process had ended: ru_maxrss."""
    strip_bytes: int
    seconds: float
    promise: str
    """`kept`; `refused`, naming a larger budget as the least; `FAILED` or `BROKEN`."""

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        is_measured = self.projected_bytes > 0
        return (
            f"{self.shape}, {self.dtypes}",
            str(self.models),
            f"{self.workers} x {self.strip_bytes / 1024:.0f} KiB" if is_measured else "",
            self.io,
            self.backend,
            self.dtype,
            self.digest,
            mib(self.budget_bytes) if self.budget_bytes else "-",
            mib(self.projected_bytes) if is_measured else "",
            mib(self.measured_bytes) if is_measured else "",
            f"{self.measured_bytes / self.projected_bytes:.3f}" if is_measured else "",
            self.promise,
        )


HEADER = (
    *("sources", "models", "chunks", "io", "backend", "dtype", "digest", "budget MiB"),
    *("projected", "measured", "/ projected", "promise"),
)


def combinations(count: int, generator: random.Random) -> Iterator[dict[str, object]]:
    """Yield combinations until every pair of values was there, but at least `count`.

    The next one is the one of `NUM_DRAWN` random ones that brings most pairs that are new.
    """

    def pairs(combination: Combination) -> set[tuple]:
        return set(itertools.combinations(combination.items(), 2))

    missing = {
        pair
        for (name, values), (other, others) in itertools.combinations(FACTORS.items(), 2)
        for pair in itertools.product(
            ((name, value) for value in values), ((other, value) for value in others)
        )
    }
    while missing or count > 0:
        drawn = (
            {name: generator.choice(values) for name, values in FACTORS.items()}
            for _ in range(NUM_DRAWN)
        )
        best = max(drawn, key=lambda each: len(pairs(each) & missing))
        missing -= pairs(best)
        count -= 1
        yield best


class Merges:
    """Runs combinations as merges, on sources that are written where they are first needed."""

    def __init__(self, workspace: Workspace, args: argparse.Namespace) -> None:
        self._workspace = workspace
        self._args = args
        self._output = workspace.scratch("merged")
        self._links: dict[tuple[str, str, int], Path] = {}

    def measure(self, combination: Combination) -> Peak:
        """Merge once; a broken promise is printed with its command."""
        budget = str(combination["budget"])
        budget_bytes = 0 if budget in (LEAST, NO_BUDGET) else parse_size(budget)
        os.sync()
        remove(self._output)
        if budget == LEAST:
            budget_bytes = self._least_budget(combination)
        command = self.command(combination, budget_bytes)
        finished = run(command, environment=OFFLINE)
        peak = peak_of(combination, budget_bytes, finished)
        if peak.promise not in ("kept", "refused"):
            print(f"{peak.promise}: {shlex.join(command)}\n  {finished.last_words()}")
        return peak

    def _least_budget(self, combination: Combination) -> int:
        """The least budget that works, found as a user finds it: by what refusals name."""
        budget_bytes, is_last = 1, False
        while not is_last:
            refusal = run(self.command(combination, budget_bytes), environment=OFFLINE)
            named = budget_named(refusal)
            if named is None or named[0] <= budget_bytes:
                raise SystemExit(f"{budget_bytes} bytes: no larger budget is named:\n{refusal}")
            budget_bytes, is_last = named
        return budget_bytes

    def command(self, combination: Combination, budget_bytes: int) -> list[str]:
        """The merge's command line."""
        dtypes = DTYPES[str(combination["dtypes"])]
        models = [
            self._model(str(combination["shape"]), dtypes[number % len(dtypes)], number)
            for number in range(int(str(combination["models"])))
        ]
        extra = [f"--max-memory={budget_bytes}B"] if budget_bytes else []
        names = ("workers", "io", "backend", "dtype", "digest")
        extra += [f"--{name}={combination[name]}" for name in names]
        extra += ["--no-fsync"]
        return shardmix_command.merge_command(self._args.python, models, self._output, extra=extra)

    def _model(self, shape: str, dtype: str, number: int) -> Path:
        """A folder of hard links, the same for every merge that has it at this place."""
        key = shape, dtype, number
        if key not in self._links:
            kind, *options = SHAPES[shape]
            name = f"{shape}-{dtype}".replace(" ", "-").lower()
            original = self._workspace.checkpoint(name, kind, *options, "--dtype", dtype)
            self._links[key] = self._workspace.linked_copy(original, f"{name}-{number}")
        return self._links[key]


def budget_named(finished: Finished) -> tuple[int, bool] | None:
    """The budget that a refusal asks for, and whether it is the least that works.

    Where already a header might not fit, more may be asked for after it. None: not refused for it.
    """
    words = " ".join(finished.stderr.split())
    found = re.search(r"(may take|least that works here is) (\d+)MiB", words)
    if finished.returncode not in (1, 2) or found is None:
        return None
    return parse_size(f"{found[2]}MiB"), found[1] != "may take"


def peak_of(combination: Combination, budget_bytes: int, finished: Finished) -> Peak:
    """The figures of a finished merge, and whether it did as promised."""
    report = shardmix_command.report_of(finished) if finished.returncode == 0 else {}
    projected = report.get("projected_peak_bytes", 0)
    if report:
        is_kept = finished.peak_bytes <= projected <= (budget_bytes or projected)
        promise = "kept" if is_kept else "BROKEN"
    else:
        named = budget_named(finished)
        is_right = named is not None and named[0] > budget_bytes > 0
        promise = "refused" if is_right and combination["budget"] != LEAST else "FAILED"
    return Peak(
        **combination,
        budget_bytes=budget_bytes,
        projected_bytes=projected,
        reported_bytes=report.get("peak_rss_bytes", 0),
        measured_bytes=finished.peak_bytes,
        strip_bytes=report.get("strip_bytes", 0),
        seconds=report.get("seconds", 0.0),
        promise=promise,
    )


def main() -> None:
    """Measure everything; exit with 1 where a promise was broken."""
    parser = workspace_arguments("Hold shardmix's memory promise over many combinations.")
    parser.add_argument("--combinations", type=int, default=64, help="how many, at least")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other combinations")
    parser.add_argument("--csv", type=Path, default=Path("memory-promise.csv"), help="raw figures")
    args = parser.parse_args()
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[args.python])
        merges = Merges(workspace, args)
        chosen = combinations(args.combinations, random.Random(args.seed))
        peaks = [merges.measure(combination) for combination in chosen]
    print_table(HEADER, [peak.row() for peak in peaks])
    measured = [peak for peak in peaks if peak.projected_bytes]
    kept = sum(peak.promise == "kept" for peak in measured)
    worst = max(peak.measured_bytes / peak.projected_bytes for peak in measured)
    print(
        f"\n{kept} of {len(measured)} merges kept the promise, {len(peaks) - len(measured)} "
        f"were refused; the worst measured / projected is {worst:.3f}"
    )
    write_csv(args.csv, [asdict(peak) for peak in peaks])
    raise SystemExit(0 if all(peak.promise in ("kept", "refused") for peak in peaks) else 1)


if __name__ == "__main__":
    main()
