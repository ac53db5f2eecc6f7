"""Executors that show what the seam allows: one thread, and other processes."""

import multiprocessing
import pickle
import queue

STOP_SECONDS = 0.05


class SerialExecutor:
    """Runs tasks one after the other, on the caller's thread."""

    def run(self, job, tasks, cancel):
        with job.work.opened() as opened, opened.worker() as worker:
            yield None
            for task in tasks:
                result = None if cancel.is_set() else worker.run(task, cancel.is_set)
                if result is None:
                    return
                yield result


class ProcessExecutor:
    """Runs tasks in two other processes, each with the files of one parity."""

    def run(self, job, tasks, cancel):
        context = multiprocessing.get_context("fork")
        results, stop = context.Queue(), context.Event()
        copy = pickle.dumps(job)
        processes = [
            context.Process(
                target=_work_through,
                args=(copy, [task for task in tasks if task.file % 2 == parity], results, stop),
            )
            for parity in range(2)
        ]
        for process in processes:
            process.start()
        try:
            yield None
            num_running = len(processes)
            while num_running:
                if cancel.is_set():
                    stop.set()
                try:
                    kind, value = results.get(timeout=STOP_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if kind == "result":
                    yield value
                elif kind == "error":
                    raise value
                else:
                    num_running -= 1
        finally:
            stop.set()
            for process in processes:
                while process.is_alive():
                    while not results.empty():  # a process ends once its results are taken
                        results.get()
                    process.join(STOP_SECONDS)


def _work_through(copy, tasks, results, stop):
    """Do one process's part, and tell how it ended."""
    job = pickle.loads(copy)
    try:
        with job.work.opened() as opened, opened.worker() as worker:
            for task in tasks:
                result = None if stop.is_set() else worker.run(task, stop.is_set)
                if result is None:
                    break
                results.put(("result", result))
    except Exception as error:
        results.put(("error", error))
    results.put(("end", None))
