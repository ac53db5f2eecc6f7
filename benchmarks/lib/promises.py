"""The memory promise: measured peak ≤ projection ≤ budget, and a refusal of what cannot work."""

from collections.abc import Sequence
from typing import Any

from benchmarks.lib.processes import Finished
from benchmarks.lib.programs import named_budget
from benchmarks.lib.tables import mib, over

HEADER = ("budget MiB", "projected", "measured", "/ budget", "/ projected")
Row = dict[str, Any]


def judged(finished: Finished, budget_bytes: int, *, is_refused: bool | None = False) -> Row:
    """Return a run's part of a row: what was promised, what was measured, and the verdict.

    `is_refused` says whether the budget is too small for any run, so that shardmix must say so and
    not start; None leaves that to shardmix, which must name a larger one. 0 bytes: no budget.
    `promise` is `kept`, `refused` as it should be, `FAILED` or `BROKEN`.
    """
    failure = finished.last_words() if finished.returncode else ""
    report = {} if failure else finished.report()
    projected = report.get("projected_peak_bytes", 0)
    if failure:
        # A signal is never a refusal: status 137 or -9 is the kernel's doing.
        is_right = is_refused and 0 < finished.returncode < 128
        if is_refused is None:
            is_right = named_budget(finished)[0] > budget_bytes > 0
        promise = "refused" if is_right else "FAILED"
    else:
        is_kept = finished.peak_bytes <= projected <= (budget_bytes or projected)
        promise = "kept" if is_kept and not is_refused else "BROKEN"
    return {
        "budget_bytes": budget_bytes,
        "projected_bytes": projected,
        "reported_bytes": report.get("peak_rss_bytes", 0),  # what shardmix measured of itself
        "measured_bytes": finished.peak_bytes,  # what the kernel said when the process had ended
        "strip_bytes": report.get("strip_bytes", 0),
        "workers": report.get("workers", 0),
        "seconds": report.get("seconds", 0.0),
        "failure": failure,
        "promise": promise,
    }


def cells(row: Row) -> list[str]:
    """Return the cells under `HEADER`."""
    budget, projected, measured = (
        row[f"{name}_bytes"] for name in ("budget", "projected", "measured")
    )
    first = mib(budget) if budget else "-"
    if row["failure"]:
        return [first, *[""] * 4]
    ratios = [over(measured, budget), over(measured, projected, 3)]
    return [first, mib(projected) if projected else "-", mib(measured), *ratios]


def chunks(row: Row) -> str:
    """Return the cell that says how a merge was cut."""
    return "" if row["failure"] else f"{row['workers']} x {row['strip_bytes'] // 1024} KiB"


def print_failures(rows: Sequence[Row]) -> None:
    """Print what those without figures said, once if several said the same."""
    for failure in dict.fromkeys(row["failure"] for row in rows if row["failure"]):
        print(f"  {failure}")
    print()


def exit_status(rows: Sequence[Row]) -> int:
    """Return 1 if a promise was broken."""
    return int(any(row["promise"] not in ("kept", "refused") for row in rows))
