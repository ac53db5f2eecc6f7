"""Carries a `MergePlan` out: strips from readers through reducers to writers, on several threads.

Decides nothing about the output: names, offsets and strip size are the plan's. Prints nothing:
progress goes to a callback, as events.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shardmix.errors import MergeCancelled
from shardmix.memory import peak_resident_nbytes, resident_nbytes
from shardmix.model_folder import write_companions, write_index, write_model_card
from shardmix.plan import MergePlan, OutputShard, Run
from shardmix.reader import Reader, open_reader
from shardmix.reducer import Backend, Reducer, make_reducers, strip_num_elements
from shardmix.safetensors_layout import element_nbytes
from shardmix.staging import staged_folder
from shardmix.writer import ShardWriter

_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a merge is; sent about ten times a second, and once at its end."""

    num_bytes_done: int
    """Source bytes merged."""
    num_bytes_total: int
    """Source bytes of the whole merge."""
    num_shards_done: int
    """Output files that are complete."""
    num_shards_total: int
    """Output files of the whole merge."""
    seconds: float
    """Since the first read."""
    resident_nbytes: int
    """Memory that the process holds now."""


OnProgress = Callable[[ProgressEvent], None]


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """What carrying out a plan took."""

    seconds: float
    """From the first read until the output was in place."""
    peak_resident_nbytes: int
    """Largest resident set of the process so far (VmHWM)."""
    peak_vram_nbytes: int
    """GPU memory that torch had reserved at most; 0 on the CPU."""
    disagreements: tuple[str, ...]
    """Integer tensors that differ between models; the first model's were kept."""


def execute(
    plan: MergePlan,
    backend: Backend,
    *,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> ExecutionResult:
    """Carry out a plan on its loaded backend. The output appears as the last step, or not at all.

    Raises `SourceError` or `OutputError` where a disk fails, `MergeCancelled` once `cancel` is
    set; those, and KeyboardInterrupt, leave nothing behind.
    """
    started = time.perf_counter()
    settings = plan.settings
    staging = staged_folder(Path(plan.output), overwrite=settings.overwrite, fsync=settings.fsync)
    with staging as folder, backend.running():
        work = _Work(plan, folder)
        _run_workers(plan, backend, work, on_progress, cancel)
        write_companions(plan, folder)
        write_model_card(plan, folder)
        # Last: with it, a folder of shards becomes a model.
        write_index(plan, folder)
    return ExecutionResult(
        seconds=time.perf_counter() - started,
        peak_resident_nbytes=peak_resident_nbytes(),
        peak_vram_nbytes=backend.peak_vram_nbytes(),
        disagreements=work.disagreements(),
    )


class _OpenShard:
    """An output file being written, and how many of its strips are still to come."""

    def __init__(self, folder: Path, planned: OutputShard, *, num_strips: int) -> None:
        self.planned = planned
        self.writer = ShardWriter(folder / planned.filename, file_nbytes=planned.file_nbytes)
        self.num_strips_left = num_strips


@dataclass(frozen=True, slots=True)
class _Strip:
    """A flat range of elements of a run, the same in every source and in the output."""

    shard: _OpenShard
    run: Run
    start: int
    num_elements: int

    @property
    def source_nbytes(self) -> int:
        return self.num_elements * sum(element_nbytes(dtype) for dtype in self.run.dtypes)


class _Work:
    """Hands strips to the workers in plan order, and ends each shard with its last strip."""

    def __init__(self, plan: MergePlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._lock = threading.RLock()  # a shard of nothing ends while strips are handed out
        self._strips = self._all_strips()
        self._open: set[_OpenShard] = set()
        self._disagreeing: dict[str, set[int]] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self.num_bytes_done = 0
        self.num_shards_done = 0

    def _all_strips(self) -> Iterator[_Strip]:
        for planned in self._plan.shards:
            steps = [
                strip_num_elements(run, strip_nbytes=self._plan.memory.strip_nbytes)
                for run in planned.runs
            ]
            num_strips = sum(
                -(-run.num_elements // step) for run, step in zip(planned.runs, steps, strict=True)
            )
            shard = _OpenShard(self._folder, planned, num_strips=num_strips)
            self._open.add(shard)
            if num_strips == 0:  # nothing but empty tensors
                self._finish(shard)
            for run, step in zip(planned.runs, steps, strict=True):
                for start in range(0, run.num_elements, step):
                    yield _Strip(shard, run, start, min(step, run.num_elements - start))

    def next_strip(self) -> _Strip | None:
        """Return a strip that nobody has yet, or None at the end or after `stop`."""
        with self._lock:
            return None if self._stopped else next(self._strips, None)

    def strip_written(self, strip: _Strip, disagreeing: frozenset[int]) -> None:
        """Count a strip as done; the worker that ends a shard's last strip ends the shard."""
        with self._lock:
            self.num_bytes_done += strip.source_nbytes
            strip.shard.num_strips_left -= 1
            is_last = strip.shard.num_strips_left == 0
            if disagreeing:
                self._disagreeing.setdefault(strip.run.name, set()).update(disagreeing)
        if is_last:
            self._finish(strip.shard)

    def stop(self, error: BaseException | None = None) -> None:
        """Hand out no more strips; the first error is the one to raise."""
        with self._lock:
            self._stopped = True
            self._error = self._error or error

    def close(self) -> None:
        """Close what is still open, then raise the first worker's error, if there was one."""
        for shard in list(self._open):
            shard.writer.close()
        if self._error is not None:
            raise self._error

    def disagreements(self) -> tuple[str, ...]:
        """Say which integer tensors differ between models."""
        sources = self._plan.sources
        return tuple(
            f"{name}: differs in {', '.join(sources[model] for model in sorted(models))}; integers "
            f"are not averaged: {sources[0]}'s were kept"
            for name, models in sorted(self._disagreeing.items())
        )

    def _finish(self, shard: _OpenShard) -> None:
        shard.writer.finish(shard.planned.header, fsync=self._plan.settings.fsync)
        with self._lock:
            self._open.discard(shard)
            self.num_shards_done += 1


def _run_workers(
    plan: MergePlan,
    backend: Backend,
    work: _Work,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> None:
    started = time.perf_counter()

    def report() -> None:
        if on_progress is not None:
            on_progress(
                ProgressEvent(
                    num_bytes_done=work.num_bytes_done,
                    num_bytes_total=plan.read_nbytes,
                    num_shards_done=work.num_shards_done,
                    num_shards_total=len(plan.shards),
                    seconds=time.perf_counter() - started,
                    resident_nbytes=resident_nbytes(),
                )
            )

    threads = [
        threading.Thread(
            target=_work_through, args=(plan, backend, work), name=f"shardmix-{number}"
        )
        for number in range(plan.memory.workers)
    ]
    try:
        for thread in threads:
            thread.start()
        report()
        for thread in threads:
            while thread.is_alive():
                _stop_if_cancelled(work, cancel)
                thread.join(_PROGRESS_SECONDS)
                report()
        _stop_if_cancelled(work, cancel)
        report()
    finally:
        # Also on KeyboardInterrupt, or an error of the callback: no thread outlives the merge.
        work.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        work.close()


def _stop_if_cancelled(work: _Work, cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        work.stop(MergeCancelled("the merge was cancelled; nothing was written"))


def _work_through(plan: MergePlan, backend: Backend, work: _Work) -> None:
    """Merge strip after strip until there is none left: what each worker does."""
    try:
        reducers = make_reducers(backend, strip_nbytes=plan.memory.strip_nbytes)
        with closing(open_reader(plan.settings.io, plan.files)) as reader:
            while (strip := work.next_strip()) is not None:
                reducer = reducers[strip.run.reduction]
                _merge_strip(strip, reader, reducer)
                work.strip_written(strip, reducer.disagreeing)
    except BaseException as error:
        work.stop(error)


def _merge_strip(strip: _Strip, reader: Reader, reducer: Reducer) -> None:
    run, start = strip.run, strip.start
    reducer.begin(run, strip.num_elements)
    for source, (file, offset, dtype) in enumerate(
        zip(run.files, run.offsets, run.dtypes, strict=True)
    ):
        position = offset + start * element_nbytes(dtype)
        reducer.add(source, reader.view(file, position, reducer.staging(source)))
        reader.release()
    position = run.out_offset + start * element_nbytes(run.out_dtype)
    strip.shard.writer.write(position, reducer.finish())
