"""What every executor must do. A new one is a line in `EXECUTORS`."""

import contextlib
import gc
import os
import pickle
import threading
import weakref
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest

import shardmix
from shardmix.execute.compare_pass import compare_job
from shardmix.execute.digest_pass import digest_job
from shardmix.execute.executor import Job, Task, TaskResult
from shardmix.execute.tasks import Tasks, merge_tasks
from shardmix.execute.thread_executor import ThreadExecutor
from shardmix.execute.write_pass import write_job
from shardmix.output.journal import open_journal
from shardmix.output.staging import open_staging
from shardmix.system.hashing import LEAF_NBYTES, file_digest
from tests.support.cut_off import folder_bytes, large_models


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


EXECUTORS = [ThreadExecutor, SerialExecutor]


@pytest.fixture(params=EXECUTORS, ids=lambda kind: kind.__name__)
def executor(request):
    before = set(threading.enumerate())
    yield request.param()
    assert set(threading.enumerate()) == before


@dataclass
class Noted:
    """A pass that notes its tasks, and does with each what it is told to."""

    act: object = lambda task, is_stopped: None

    def __post_init__(self):
        self.opened_now = self.num_workers = 0
        self.done = []
        self.buffers = []

    @contextmanager
    def opened(self):
        self.opened_now += 1
        try:
            yield self
        finally:
            self.opened_now -= 1

    @contextmanager
    def worker(self):
        self.num_workers += 1
        try:
            yield NotedWorker(self)
        finally:
            self.num_workers -= 1

    @property
    def is_closed(self):
        return self.opened_now == self.num_workers == 0


class Buffer(bytearray):
    """Memory that can be watched."""


class NotedWorker:
    def __init__(self, work):
        self.work = work
        self.buffer = Buffer(1000)
        work.buffers.append(weakref.ref(self.buffer))

    def run(self, task, is_stopped):
        if self.work.act(task, is_stopped) == "stopped":
            return None
        self.work.done.append(task)
        return TaskResult(task, 10, task.first_leaf)


def run_all(executor, job, tasks, cancel=None):
    """Return all results."""
    with closing(executor.run(job, tasks, cancel or threading.Event())) as results:
        told = list(results)
    return [result for result in told if result is not None]


TASKS = Tasks([n * LEAF_NBYTES for n in (3, 1, 0, 40, 2)], leaves_per_task=2)


@pytest.mark.parametrize("num_workers", [1, 2, 7])
@pytest.mark.parametrize("is_in_order", [False, True])
def test_each_task_once(executor, num_workers, is_in_order):
    work = Noted()
    results = run_all(executor, Job(work, num_workers, is_in_order), TASKS)
    assert len(TASKS) == 2 + 1 + 1 + 20 + 1
    assert Counter(work.done) == Counter(result.task for result in results) == Counter(TASKS)
    assert all(result.value == result.task.first_leaf for result in results)
    assert work.is_closed


def test_no_task_at_all(executor):
    work = Noted()
    assert run_all(executor, Job(work, 2), []) == []
    assert work.is_closed


def test_order_within_a_file(executor):
    """One worker has a file from end to end if its digest needs that."""
    workers = {}
    lock = threading.Lock()

    def note(task, _):
        with lock:
            workers.setdefault(task.file, []).append((threading.get_ident(), task.first_leaf))

    run_all(executor, Job(Noted(note), 3, is_in_order=True), TASKS)
    for seen in workers.values():
        assert len({worker for worker, _ in seen}) == 1
        assert seen == sorted(seen)


def test_none_comes_first(executor):
    """The caller's thread has something else to do once the workers have started."""
    work = Noted()
    with closing(executor.run(Job(work, 2), TASKS, threading.Event())) as results:
        assert next(results) is None
        assert work.opened_now == 1


def test_none_comes_while_a_task_lasts(monkeypatch):
    """About ten times a second; of executors that wait for workers."""
    monkeypatch.setattr("shardmix.execute.thread_executor.WAIT_SECONDS", 0.001)
    enough = threading.Event()
    work = Noted(lambda task, is_stopped: enough.wait(60) and None)
    with closing(ThreadExecutor().run(Job(work, 1), TASKS[:1], threading.Event())) as results:
        for _ in range(5):
            assert next(results) is None
        enough.set()
        assert len([result for result in results if result is not None]) == 1


def test_cancelled_in_the_middle(executor):
    """A task that comes to its end all the same counts."""
    cancel = threading.Event()

    def cancel_and_wait(task, is_stopped):
        if task.first_leaf == 4:
            cancel.set()
            while not is_stopped():
                cancel.wait(0.001)

    work = Noted(cancel_and_wait)
    results = run_all(executor, Job(work, 1), TASKS, cancel)
    assert [result.task for result in results] == work.done == TASKS[:7]
    assert work.is_closed


def test_a_long_task_is_told_to_stop(executor):
    """It returns None then, and there is no result of it."""
    cancel = threading.Event()
    waiting = threading.Event()

    def wait(task, is_stopped):
        cancel.set()
        while not is_stopped():
            waiting.wait(0.001)
        return "stopped"

    work = Noted(wait)
    assert run_all(executor, Job(work, 2), TASKS, cancel) == []
    assert work.done == []
    assert work.is_closed


def test_closing_stops_the_workers(executor):
    work = Noted()
    results = executor.run(Job(work, 2), TASKS, threading.Event())
    next(results)
    results.close()
    assert work.is_closed


def test_the_callers_error_stops_the_workers(executor):
    work = Noted()
    with (
        pytest.raises(KeyboardInterrupt),
        closing(executor.run(Job(work, 2), TASKS, threading.Event())) as results,
    ):
        for result in results:
            if result is not None:
                raise KeyboardInterrupt
    assert work.is_closed


class FlawError(Exception):
    pass


@pytest.mark.parametrize("num_workers", [1, 4])
def test_an_error_stops_the_others(executor, num_workers):
    """The first one is raised; what had ended before is yielded."""

    def fail(task, _):
        if task.file == 3 and task.first_leaf >= 4:
            raise FlawError(task.first_leaf)

    work, told = Noted(fail), []
    with pytest.raises(FlawError) as caught:
        for result in executor.run(Job(work, num_workers), TASKS, threading.Event()):
            told += [] if result is None else [result]
    assert caught.value.args[0] >= 4
    assert Counter(result.task for result in told) == Counter(work.done)
    assert len(work.done) < len(TASKS)
    assert work.is_closed


@pytest.mark.parametrize("error", [FlawError, MemoryError, KeyboardInterrupt])
def test_an_error_holds_no_buffers(executor, error):
    """Else a GPU's memory would be held for as long as the error is."""

    def fail(task, _):
        raise error

    work = Noted(fail)
    caught = None
    try:
        run_all(executor, Job(work, 2), TASKS)
    except error as raised:
        caught = raised
    assert type(caught) is error
    if isinstance(executor, ThreadExecutor):
        assert caught.__traceback__ is not None
    else:
        caught = None  # its frames are the caller's own
    gc.collect()
    assert work.buffers
    assert not any(buffer() for buffer in work.buffers)


def test_an_error_while_opening(executor):
    class Unopened(Noted):
        @contextmanager
        def opened(self):
            raise FlawError
            yield

    with pytest.raises(FlawError):
        run_all(executor, Job(Unopened(), 2), TASKS)


def test_an_error_while_a_worker_is_made(executor):
    class Poor(Noted):
        @contextmanager
        def worker(self):
            raise FlawError
            yield

    with pytest.raises(FlawError):
        run_all(executor, Job(Poor(), 2), TASKS)


# Jobs that merge


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return large_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    shardmix.merge(models, out)
    return out


@contextlib.contextmanager
def staged(plan, out):
    with (
        open_staging(out) as staging,
        closing(open_journal(staging.hidden, plan)) as journal,
    ):
        yield staging, journal


def weights_of(folder):
    return {name: data for name, data in folder_bytes(folder).items() if "safetensors" in name}


@pytest.mark.parametrize("digest", ["xxh3", "sha256"])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_written_merge(executor, models, merged, tmp_path, digest, is_pickled):
    """The bytes and the claims are the same, wherever the job was unpickled."""
    out = tmp_path / "out"
    plan = shardmix.plan_merge(models, out, digest=digest, workers=2)
    with staged(plan, out) as (staging, journal):
        job = write_job(plan, staging.folder, journal)
        job = pickle.loads(pickle.dumps(job)) if is_pickled else job
        results = run_all(executor, job, merge_tasks(plan))
        written = weights_of(staging.folder.path)
        assert sum(result.num_bytes for result in results) == plan.read_nbytes
        ends = [result for result in results if result.is_file_end]
        assert sorted(result.task.file for result in ends) == [0, 1]
        assert all(bool(result.value.file_digest) == result.is_file_end for result in results)
        claims = [claim for result in results for claim in result.value.claims]
        assert len(claims) == (journal_length(plan) if is_pickled else 0)
        for claim in claims:
            journal.add(*claim)
        assert journal.num_leaves_done == journal_length(plan)
        # Whoever goes on has nothing left to do.
        again = run_all(executor, write_job(plan, staging.folder, journal), merge_tasks(plan))
        assert sum(result.num_bytes_kept for result in again) == plan.read_nbytes
        digests = {result.task.file: result.value.file_digest for result in ends}
        assert digests == {
            result.task.file: result.value.file_digest for result in again if result.is_file_end
        }
    expected = weights_of(merged)
    expected.pop("model.safetensors.index.json")
    assert written == expected


def journal_length(plan):
    return sum(-(-shard.file_nbytes // LEAF_NBYTES) for shard in plan.shards)


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_compared_merge(executor, models, merged, tmp_path, is_pickled):
    plan = shardmix.plan_merge(models, workers=2)
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in weights_of(merged).items():
        (folder / name).write_bytes(data)
    assert not differences(executor, plan, folder, is_pickled=is_pickled)
    file = folder / plan.shards[0].filename
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    content[plan.shards[0].data_start + 5_000_000] ^= 1
    file.write_bytes(content)
    found = differences(executor, plan, folder, is_pickled=is_pickled)
    names = plan.shards[0].tensor_names
    assert found == {(file.name, names[1]): 1, (file.name, names[-1]): 1}


def differences(executor, plan, folder, *, is_pickled):
    job = compare_job(plan, folder)
    job = pickle.loads(pickle.dumps(job)) if is_pickled else job
    found = Counter()
    for result in run_all(executor, job, merge_tasks(plan)):
        assert not result.value.unreadable
        found.update(result.value.num_bytes)
    return found


@pytest.mark.parametrize("digest", ["xxh3", "sha256"])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_digested_files(executor, tmp_path, digest, is_pickled):
    """Of a file of another size nothing is read."""
    contents = {"a": b"", "b": os.urandom(20_000_000), "c/d": b"x", "e": bytes(LEAF_NBYTES)}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    sizes = {name: len(content) for name, content in contents.items()}
    job, tasks = digest_job(tmp_path, {**sizes, "e": 10**18, "missing": 3}, digest)
    job = pickle.loads(pickle.dumps(job)) if is_pickled else job
    results = run_all(executor, job, tasks)
    ends = {result.task.file: result.value for result in results if result.is_file_end}
    for number, name in enumerate(["a", "b", "c/d"]):
        with open(tmp_path / name, "rb") as file:
            assert ends[number].file_digest == file_digest(file.fileno(), digest)
    assert [ends[number].problem for number in range(5)] == [
        *("", "", ""),
        f"{tmp_path / 'e'}: has {LEAF_NBYTES} bytes, not {10**18}",
        f"{tmp_path / 'missing'}: is missing",
    ]
    assert sum(result.num_bytes for result in results) == 20_000_001 + 10**18 + 3
    assert sum(result.value.num_bytes_read for result in results) == 20_000_001


def test_tasks_are_made_when_asked_for():
    """A file of a petabyte costs no memory."""
    tasks = Tasks([10**15, 0, 1], leaves_per_task=3)
    num_leaves = -(-(10**15) // LEAF_NBYTES)
    assert len(tasks) == -(-num_leaves // 3) + 2
    assert tasks[1] == Task(0, 3, 6)
    assert tasks[-3].stop_leaf == num_leaves
    assert tasks[-2:] == [Task(1, 0, 0), Task(2, 0, 1)]
    with pytest.raises(IndexError):
        tasks[len(tasks)]
