"""Measures one merge by one tool, from a known state of caches, disk and cores."""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.compare.parts import Case
from benchmarks.compare.samples import Row, Rows
from benchmarks.lib.machine import Filler, drop_caches, read_into_cache, wait_until_idle
from benchmarks.lib.processes import run, run_or_exit, tree_resident_bytes
from benchmarks.lib.programs import MERGES, Pythons, budget_option, merge_command, split_options
from benchmarks.lib.workspace import Workspace, remove

HEADERS_MARGIN_BYTES = 16 * 1024**2
"""By which an output may differ from a model in size: a header for each shard."""
NOTICEABLE = 0.01
"""Share by which two looks at memory must differ for both to be kept."""


class CaseFailedError(Exception):
    """A tool failed at a merge, or wrote something else than one."""


class Bench:
    """Where measurements are made."""

    def __init__(self, args: argparse.Namespace, pythons: Pythons, workspace: Workspace) -> None:
        self._args = args
        self._pythons = pythons
        self._output = workspace.scratch("merged")
        # For the tools' temporary files: one of them writes as much as it reads.
        self._temporary = workspace.scratch("temporary")
        self._recipe = workspace.scratch("mergekit.yaml")
        self._filler = Filler(workspace.scratch("filler"))
        self._tiny = workspace.checkpoints("tiny", "ab", "tiny")

    def warm_up(self, tool: str) -> None:
        """Merge next to nothing: brings a tool's libraries into the page cache, compiles sums.

        Ends the benchmark if the tool doesn't work.
        """
        self._clear()
        run_or_exit(self._command(tool, self._tiny), environment=self._environment())
        self._clear()

    def measure(
        self, row: Row, case: Case, *, cache: str, synced: bool, is_watched: bool
    ) -> tuple[Row, Rows]:
        """Run one case once; return the row with its figures, and looks at memory if watched.

        Raises `CaseFailedError` if it did not write as many bytes as a model has.
        """
        busy = self._prepare(case, cache)
        looks: list[Row] = []
        started = perf_counter()

        def look(pid: int) -> None:
            if nbytes := tree_resident_bytes(pid):
                seconds = round(perf_counter() - started, 3)
                looks.append({"tool": case.tool, "seconds": seconds, "resident_bytes": nbytes})

        options = budget_option(case.budget_bytes)
        command = self._command(case.tool, case.model_set.models, synced, options)
        watch = look if is_watched else None
        finished = run(command, environment=self._environment(), watch=watch)
        ended = perf_counter()
        if synced:
            os.sync()
        sync_s = perf_counter() - ended if synced else 0.0
        written = sum(path.stat().st_size for path in self._output.glob("*.safetensors"))
        self._clear()
        if finished.returncode:
            raise CaseFailedError(f"{case}: {finished.last_words()}")
        if abs(written - row["model_bytes"]) > HEADERS_MARGIN_BYTES:
            raise CaseFailedError(f"{case}: wrote {written} bytes of about {row['model_bytes']}")
        reported_s = None
        if MERGES[case.tool].reports:
            reported_s = round(float(finished.report()["seconds"]), 3)
        figures = {
            "wall_s": round(finished.wall_s, 3),
            "sync_s": round(sync_s, 3),
            "reported_s": reported_s,
            "user_s": finished.user_s,
            "system_s": finished.system_s,
            "peak_bytes": finished.peak_bytes,
            "written_bytes": written,
            "busy_before": busy,
        }
        return row | figures, without_repetition(looks)

    def _command(
        self, tool: str, models: Sequence[Path], fsync: bool = False, options: Sequence[str] = ()
    ) -> list[str]:
        given = split_options(self._args, tool.partition("-")[0])
        how = {"fsync": fsync, "options": [*given, *options], "recipe": self._recipe}
        python = self._pythons[MERGES[tool].environment]
        return merge_command(tool, python, models, self._output, **how)

    def _prepare(self, case: Case, cache: str) -> float:
        """Bring caches and disk to the same state; return how busy others keep the cores."""
        self._clear()
        os.sync()
        if cache == "cold":
            drop_caches()
            # Cold are the checkpoints, not the tools: start-up from disk is not what is compared.
            self.warm_up(case.tool)
        self._filler.fill()
        if cache == "warm":
            read_into_cache(case.model_set.models)
        return wait_until_idle()

    def _clear(self) -> None:
        for path in (self._output, self._temporary):
            remove(path)
        self._temporary.mkdir()

    def _environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self._temporary)}


def without_repetition(looks: Rows) -> Rows:
    """Return the looks that differ from the last one kept by `NOTICEABLE`, the first and last."""
    kept = list(looks[:1])
    for look, following in itertools.pairwise(looks[1:]):
        # The one before a jump is kept too: what was level until then is drawn level.
        last = kept[-1]["resident_bytes"]
        if abs(following["resident_bytes"] - last) > NOTICEABLE * last:
            kept.append(look)
    return kept + list(looks[1:][-1:])
