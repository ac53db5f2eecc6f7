"""Measures one merge by one tool, from a known state of caches, disk and cores."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from harness import OFFLINE, Finished, remove, run, run_or_exit, wait_until_idle
from model_sets import ModelSet
from page_cache import Filler, drop_caches, read_into_cache
from resident_memory import ResidentMemory
from samples import Sample
from tools import Merge, Tool

HEADERS_MARGIN_BYTES = 16 * 1024**2
"""By which an output may differ from a model in size: a header for each shard."""


class CaseFailedError(Exception):
    """A tool failed at a merge, or wrote something else than one."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: a tool merges a set within a budget."""

    tool: Tool
    model_set: ModelSet
    budget_bytes: int = 0

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells this case from others, as `Sample.identity` begins."""
        models = self.model_set
        return (self.tool.name, models.name, len(models.models), self.budget_bytes)

    def __str__(self) -> str:
        budget = f", {self.budget_bytes // 1024**2} MiB" if self.budget_bytes else ""
        return f"{self.tool.name}: {len(self.model_set.models)} x {self.model_set.name}{budget}"


@dataclass(frozen=True, slots=True)
class Bench:
    """Where measurements are made."""

    output: Path
    temporary: Path
    """Folder for the tools' temporary files: one of them writes as much as it reads."""
    tiny: ModelSet
    filler: Filler

    def warm_up(self, tool: Tool) -> None:
        """Merge next to nothing: brings a tool's libraries into the page cache, compiles sums.

        Ends the benchmark where the tool doesn't work.
        """
        self._clear()
        merge = Merge(self.tiny.models, self.output, fsync=False)
        run_or_exit(tool.command(merge), environment=self._environment())
        self._clear()

    def measure(
        self,
        case: Case,
        *,
        part: str,
        cache: str,
        synced: bool,
        number: int,
        memory: ResidentMemory | None = None,
    ) -> Sample:
        """Run one case once and check that it wrote as many bytes as a model has.

        Raises `CaseFailedError` where it did not.
        """
        busy = self._prepare(case, cache)
        tool, model_set = case.tool, case.model_set
        merge = Merge(model_set.models, self.output, synced, case.budget_bytes)
        finished = run(
            tool.command(merge),
            environment=self._environment(),
            on_start=memory.watch if memory else None,
        )
        ended = perf_counter()
        if synced:
            os.sync()
        sync_s = perf_counter() - ended if synced else 0.0
        if finished.returncode:
            self._clear()
            raise CaseFailedError(f"{case}: {finished.last_words()}")
        sample = Sample(
            part=part,
            model_set=model_set.name,
            tool=tool.name,
            cache=cache,
            synced=synced,
            round=number,
            num_models=len(model_set.models),
            model_bytes=model_set.model_bytes,
            num_tensors=model_set.num_tensors,
            largest_tensor_bytes=model_set.largest_tensor_bytes,
            budget_bytes=case.budget_bytes,
            wall_s=round(finished.wall_s, 3),
            sync_s=round(sync_s, 3),
            reported_s=_reported_s(finished) if tool.reports else None,
            user_s=round(finished.user_s, 3),
            system_s=round(finished.system_s, 3),
            peak_bytes=finished.peak_bytes,
            written_bytes=sum(path.stat().st_size for path in self.output.glob("*.safetensors")),
            busy_before=busy,
        )
        self._clear()
        if abs(sample.written_bytes - sample.model_bytes) > HEADERS_MARGIN_BYTES:
            wrote = f"wrote {sample.written_bytes} bytes of about {sample.model_bytes}"
            raise CaseFailedError(f"{case}: {wrote}")
        return sample

    def _prepare(self, case: Case, cache: str) -> float:
        """Bring caches and disk to the same state; how busy others keep the cores, from 0 to 1."""
        self._clear()
        os.sync()
        if cache == "cold":
            drop_caches()
            # Cold are the checkpoints, not the tools: start-up from disk is not what is compared.
            self.warm_up(case.tool)
        self.filler.fill()
        if cache == "warm":
            read_into_cache(case.model_set.models)
        return wait_until_idle()

    def _clear(self) -> None:
        for path in (self.output, self.temporary):
            remove(path)
        self.temporary.mkdir()

    def _environment(self) -> dict[str, str]:
        return {**OFFLINE, "TMPDIR": str(self.temporary)}


def _reported_s(finished: Finished) -> float:
    return round(float(json.loads(finished.stdout)["seconds"]), 3)
