"""Measures one merge by one tool, from a known state of caches, disk and cores."""

import argparse
import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.compare.parts import Case
from benchmarks.lib.machine import Filler, drop_caches, read_into_cache, wait_until_idle
from benchmarks.lib.processes import run, run_or_exit, tree_resident_bytes
from benchmarks.lib.programs import MERGES, command
from benchmarks.lib.promises import budget_option
from benchmarks.lib.tables import Row
from benchmarks.lib.workspace import Workspace, remove

HEADERS_MARGIN_BYTES = 16 * 1024**2
"""By which an output may differ from a model in size: a header for each shard."""
NOTICEABLE = 0.01
"""Share by which two looks at memory must differ for both to be kept."""


class CaseFailedError(Exception):
    """A tool failed at a merge, or wrote something else than one."""


class Bench:
    """Where measurements are made."""

    def __init__(self, args: argparse.Namespace, workspace: Workspace) -> None:
        self._args = args
        self._workspace = workspace
        self._output = workspace.scratch("merged")
        # For the tools' temporary files: one of them writes as much as it reads.
        self._temporary = workspace.scratch("temporary")
        self._environment = {"TMPDIR": str(self._temporary)}
        self._recipe = workspace.scratch("mergekit.yaml")
        self._filler = Filler(workspace.scratch("filler"))
        self._tiny = workspace.checkpoints("tiny", "ab", "tiny")

    def warm_up(self, tool: str) -> None:
        """Merge next to nothing: brings a tool's libraries into the page cache, compiles sums.

        Ends the benchmark if the tool doesn't work.
        """
        self._clear()
        run_or_exit(self._command(tool, self._tiny), environment=self._environment)
        self._clear()

    def measure(self, row: Row, case: Case, *, is_watched: bool) -> tuple[Row, list[Row]]:
        """Run one case as its row says; return it with figures, and looks at memory if watched.

        Raises `CaseFailedError` if it did not write as many bytes as a model has.
        """
        synced, busy = row["synced"], self._prepare(case, row["cache"])
        looks: list[Row] = []
        started = perf_counter()

        def look(pid: int) -> None:
            if nbytes := tree_resident_bytes(pid):
                seconds = round(perf_counter() - started, 3)
                looks.append({"tool": case.tool, "seconds": seconds, "resident_bytes": nbytes})

        words = self._command(case.tool, case.model_set.models, synced)
        words += budget_option(case.budget_bytes)
        watch = look if is_watched else None
        finished = run(words, environment=self._environment, watch=watch)
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
        reports = MERGES[case.tool].reports
        figures = {
            "wall_s": round(finished.wall_s, 3),
            "sync_s": round(sync_s, 3),
            "reported_s": round(finished.report()["seconds"], 3) if reports else None,
            "user_s": finished.user_s,
            "system_s": finished.system_s,
            "peak_bytes": finished.peak_bytes,
            "written_bytes": written,
            "busy_before": busy,
        }
        return row | figures, without_repetition(looks)

    def _command(self, tool: str, models: Sequence[Path], fsync: bool = False) -> list[str]:
        """Return a merge's command line; writes mergekit's recipe."""
        lines = ["merge_method: linear", "dtype: bfloat16", "parameters: {normalize: false}"]
        weight = f"parameters: {{weight: {1 / len(models)}}}"
        each = (f"  - {{model: {model}, {weight}}}" for model in models)
        self._recipe.write_text("\n".join([*lines, "models:", *each]) + "\n")
        python = self._workspace.python(MERGES[tool].environment)
        given = vars(self._args).get(f"{tool.partition('-')[0]}_options", "")
        how = {"output": self._output, "recipe": self._recipe, "options": shlex.split(given)}
        return command(MERGES[tool], python, models, fsync=fsync, **how)

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


def without_repetition(looks: list[Row]) -> list[Row]:
    """Return the looks that differ from the last one kept by `NOTICEABLE`, the first and last."""
    kept = looks[:1]
    for look, following in itertools.pairwise(looks[1:]):
        # The one before a jump is kept too: what was level until then is drawn level.
        last = kept[-1]["resident_bytes"]
        if abs(following["resident_bytes"] - last) > NOTICEABLE * last:
            kept.append(look)
    return kept + looks[1:][-1:]
