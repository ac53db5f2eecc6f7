"""Measures one merge by one tool, from a known state of caches, disk and cores."""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.compare.parts import Case, tiny
from benchmarks.compare.samples import Look, Sample
from benchmarks.lib.machine import Filler, drop_caches, read_into_cache, wait_until_idle
from benchmarks.lib.processes import run, run_or_exit, tree_resident_bytes
from benchmarks.lib.programs import (
    MERGES,
    Pythons,
    budget_option,
    merge_command,
    split_options,
)
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
        self._tiny = tiny(workspace).models

    def warm_up(self, tool: str) -> None:
        """Merge next to nothing: brings a tool's libraries into the page cache, compiles sums.

        Ends the benchmark if the tool doesn't work.
        """
        self._clear()
        run_or_exit(self._command(tool, self._tiny), environment=self._environment())
        self._clear()

    def measure(
        self, case: Case, *, part: str, cache: str, synced: bool, number: int, is_watched: bool
    ) -> tuple[Sample, list[Look]]:
        """Run one case once, and look at its memory meanwhile if it is watched.

        Raises `CaseFailedError` if it did not write as many bytes as a model has.
        """
        busy = self._prepare(case, cache)
        looks: list[Look] = []
        started = perf_counter()

        def look(pid: int) -> None:
            if nbytes := tree_resident_bytes(pid):
                looks.append(Look(case.tool, round(perf_counter() - started, 3), nbytes))

        models = case.model_set
        options = budget_option(case.budget_bytes)
        command = self._command(case.tool, models.models, fsync=synced, options=options)
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
        if abs(written - models.model_bytes) > HEADERS_MARGIN_BYTES:
            wrote = f"wrote {written} bytes of about {models.model_bytes}"
            raise CaseFailedError(f"{case}: {wrote}")
        sample = Sample(
            part=part,
            model_set=models.name,
            tool=case.tool,
            cache=cache,
            synced=synced,
            round=number,
            num_models=len(models.models),
            model_bytes=models.model_bytes,
            num_tensors=models.num_tensors,
            largest_tensor_bytes=models.largest_tensor_bytes,
            budget_bytes=case.budget_bytes,
            wall_s=round(finished.wall_s, 3),
            sync_s=round(sync_s, 3),
            reported_s=(
                round(float(finished.report()["seconds"]), 3) if case.program.reports else None
            ),
            user_s=round(finished.user_s, 3),
            system_s=round(finished.system_s, 3),
            peak_bytes=finished.peak_bytes,
            written_bytes=written,
            busy_before=busy,
        )
        return sample, without_repetition(looks)

    def _command(
        self,
        tool: str,
        models: Sequence[Path],
        *,
        fsync: bool = False,
        options: Sequence[str] = (),
    ) -> list[str]:
        own = tool.partition("-")[0] if tool.startswith("shardmix") else tool
        extra = (
            [*split_options(self._args, own)] if own in ("shardmix", "floor", "mergekit") else []
        )
        return merge_command(
            tool,
            self._pythons[MERGES[tool].environment],
            models,
            self._output,
            fsync=fsync,
            options=[*extra, *options],
            recipe=self._recipe,
        )

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


def without_repetition(looks: Sequence[Look]) -> list[Look]:
    """Return the looks that differ from the last one kept by `NOTICEABLE`, the first and last."""
    kept = list(looks[:1])
    for look, following in itertools.pairwise(looks[1:]):
        # The one before a jump is kept too: what was level until then is drawn level.
        last = kept[-1].resident_bytes
        if abs(following.resident_bytes - last) > NOTICEABLE * last:
            kept.append(look)
    return kept + list(looks[1:][-1:])
