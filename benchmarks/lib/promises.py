"""The memory promise: measured peak ≤ projection ≤ budget, and a refusal of what cannot work."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.control_group import memory_group
from benchmarks.lib.processes import Finished, run
from benchmarks.lib.tables import Row, mib, over, print_table
from benchmarks.lib.workspace import remove

BASIC = ("budget MiB", "projected", "measured", "/ budget", "/ projected")
CELLS: dict[str, Callable[[Row], str]] = {
    "budget MiB": lambda row: mib(row["budget_bytes"]) if row["budget_bytes"] else "-",
    "projected": lambda row: mib(row["projected_bytes"]) if row["projected_bytes"] else "-",
    "measured": lambda row: mib(row["measured_bytes"]),
    "/ budget": lambda row: over(row["measured_bytes"], row["budget_bytes"]),
    "/ projected": lambda row: over(row["measured_bytes"], row["projected_bytes"], 3),
    "chunks": lambda row: f"{row['workers']} x {row['strip_bytes'] // 1024} KiB",
    "s": lambda row: f"{row['seconds']:.2f}",
    "charged MiB": lambda row: mib(row["charged_bytes"]) if row["charged_bytes"] else "-",
    "OOM kills": lambda row: row["oom_kills"] if row["charged_bytes"] else "-",
}
"""Of a row's figures, by title."""
GROUP = ("charged MiB", "OOM kills")
OF_FAILED = ("budget MiB", *GROUP)
"""What is shown of a run that has no figures."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run to hold against its promise."""

    named: Row
    """What its row says of it first."""
    command: Sequence[str]
    budget_bytes: int = 0
    """`--max-memory`; 0 leaves it to shardmix."""
    group_bytes: int = 0
    """Size of the memory control group that it runs in; 0 for none."""
    is_refused: bool | None = False
    """Whether the budget is too small for any run, so that shardmix must say so and not start.

    None leaves that to shardmix, which must name a larger one.
    """


def measure(case: Case) -> tuple[Row, Finished]:
    """Run a case; return its row and the process. Raises NoMemoryGroupError.

    `promise` is `kept`, `refused` as it should be, `FAILED` or `BROKEN`.
    """
    command, charged = [*case.command, *budget_option(case.budget_bytes)], (0, 0)
    if case.group_bytes:
        with memory_group(case.group_bytes) as group:
            finished = run(group.wrap(command))
            charged = group.charged()
    else:
        finished = run(command)
    failure = finished.last_words() if finished.returncode else ""
    report = {} if failure else finished.report()
    projected = report.get("projected_peak_bytes", 0)
    if failure:
        # A signal is never a refusal: status 137 or -9 is the kernel's doing.
        is_right = case.is_refused and 0 < finished.returncode < 128
        if case.is_refused is None:
            is_right = named_budget(finished)[0] > case.budget_bytes > 0
        promise = "refused" if is_right else "FAILED"
    else:
        is_kept = finished.peak_bytes <= projected <= (case.budget_bytes or projected)
        promise = "kept" if is_kept and not case.is_refused else "BROKEN"
    return case.named | {
        "budget_bytes": case.budget_bytes,
        "group_bytes": case.group_bytes,
        "projected_bytes": projected,
        "reported_bytes": report.get("peak_rss_bytes", 0),  # what shardmix measured of itself
        "measured_bytes": finished.peak_bytes,  # what the kernel said when the process had ended
        "charged_bytes": charged[0],
        "oom_kills": charged[1],
        "strip_bytes": report.get("strip_bytes", 0),
        "workers": report.get("workers", 0),
        "seconds": report.get("seconds", 0.0),
        "failure": failure,
        "promise": promise,
    }, finished


def print_rows(
    titles: Sequence[str],
    rows: Sequence[Row],
    more: Mapping[str, Callable[[Row], str]] | None = None,
) -> None:
    """Print rows in columns: by `CELLS`, by `more` of such, or what is in the column.

    Below is what those without figures said, once if several said the same.
    """
    known = CELLS | dict(more or {})

    def cell(row: Row, title: str) -> object:
        if title not in known:
            return row[title]
        return "" if row["failure"] and title not in OF_FAILED else known[title](row)

    print_table(titles, [[cell(row, title) for title in titles] for row in rows])
    for failure in dict.fromkeys(row["failure"] for row in rows if row["failure"]):
        print(f"  {failure}")
    print()


def are_kept(rows: Sequence[Row]) -> bool:
    """Return whether no promise was broken."""
    return all(row["promise"] in ("kept", "refused") for row in rows)


def budget_option(nbytes: int) -> list[str]:
    """Return `--max-memory`; nothing for 0, which is no budget."""
    return [f"--max-memory={nbytes}B"] if nbytes else []


def least_budget(command: Sequence[str], output: Path, *, is_tried: bool = True) -> int:
    """Return the least `--max-memory` of a merge, found as a user finds it: by what refusals name.

    By the time that a merge starts it may hold a little more than when it planned, so what is named
    as the least is tried as well, if `is_tried`.
    """
    nbytes, is_least = 1, False
    while is_tried or not is_least:
        finished = run([*command, *budget_option(nbytes)])
        remove(output)
        if not finished.returncode:
            break
        named, is_least = named_budget(finished)
        if not named or (named <= nbytes and not is_tried):
            raise SystemExit(f"{nbytes} bytes: no larger budget is named: {finished.last_words()}")
        nbytes = max(named, nbytes + 1024**2 * (nbytes > 1))
    return nbytes


def named_budget(finished: Finished) -> tuple[int, bool]:
    """Return the budget that a refusal asks for, and whether it is the least that works.

    If already a header might not fit, more may be asked for after it. 0: not refused for that.
    """
    words = " ".join(finished.stderr.split())
    found = re.search(r"(may take|least that works here is) (\d+)MiB", words)
    if finished.returncode not in (1, 2) or found is None:
        return 0, False
    return int(found[2]) * 1024**2, found[1] != "may take"
