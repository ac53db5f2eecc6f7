"""Runs a job: the caller's side of an executor.

Chooses the executor, counts, reports progress and cancels.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from shardmix.errors import MergeCancelled
from shardmix.execute.executor import Executor, Job, T, Task, TaskResult
from shardmix.execute.progress import OnProgress, ProgressEvent
from shardmix.execute.thread_executor import ThreadExecutor
from shardmix.system.memory import resident_nbytes


def chosen_executor() -> Executor:
    """Return the executor for jobs; a trial of a device (`calibrate_pass`) takes threads."""
    return ThreadExecutor()


def run_job(
    job: Job[T],
    tasks: Sequence[Task],
    take: Callable[[TaskResult[T]], None],
    *,
    num_bytes: int,
    num_files: int,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
    what: str = "the merge",
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run a job to its end, or raise.

    Args:
        job: the pass and its workers.
        tasks: see `Executor.run`.
        take: gets each result, on this thread.
        num_bytes: bytes of all tasks, for progress.
        num_files: files of all tasks, for progress.
        on_progress: called about ten times a second, on this thread.
        cancel: once set, `MergeCancelled` is raised.
        what: name of the job, for the message of `MergeCancelled`.
        meanwhile: called once on this thread, which is otherwise idle.

    Raises:
        MergeCancelled: if `cancel` is set.
        Exception: the first error of any worker, or of `take`.
    """
    started = time.perf_counter()
    cancel = threading.Event() if cancel is None else cancel
    num_bytes_done = num_bytes_kept = num_files_done = 0

    def report() -> None:
        if on_progress is not None:
            on_progress(
                ProgressEvent(
                    num_bytes_done=num_bytes_done,
                    num_bytes_kept=num_bytes_kept,
                    num_bytes_total=num_bytes,
                    num_shards_done=num_files_done,
                    num_shards_total=num_files,
                    seconds=time.perf_counter() - started,
                    resident_nbytes=resident_nbytes(),
                )
            )

    with closing(chosen_executor().run(job, tasks, cancel)) as results:
        for result in results:
            if result is not None:
                num_bytes_done += result.num_bytes
                num_bytes_kept += result.num_bytes_kept
                num_files_done += result.is_file_end
                take(result)
                continue
            report()
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
    if cancel.is_set():
        raise MergeCancelled(f"{what} was cancelled")
    report()
