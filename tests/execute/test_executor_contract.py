"""What every executor must do, wherever it runs tasks. A new one is a line in `EXECUTORS`.

One in this process takes a line in `test_in_process_executors` as well.
"""

import contextlib
import os
import pickle
import threading
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
from tests.support.executors import ProcessExecutor, SerialExecutor

EXECUTORS = [ThreadExecutor, SerialExecutor, ProcessExecutor]


@pytest.fixture(params=EXECUTORS, ids=lambda kind: kind.__name__)
def executor(request):
    before = set(threading.enumerate())
    yield request.param()
    assert set(threading.enumerate()) == before


def run_all(executor, job, tasks, cancel=None):
    """Return all results."""
    with closing(executor.run(job, tasks, cancel or threading.Event())) as results:
        told = list(results)
    return [result for result in told if result is not None]


@dataclass(frozen=True)
class Signed:
    """A pass whose results tell who did them: process, thread, and how many tasks before."""

    fails: tuple[Task, ...] = ()
    lasts: tuple[Task, ...] = ()
    """Tasks that go on until they are told to stop."""

    @contextmanager
    def opened(self):
        yield self

    @contextmanager
    def worker(self):
        yield SignedWorker(self)


class FlawError(Exception):
    pass


@dataclass
class SignedWorker:
    work: Signed
    num_done: int = 0

    def run(self, task, is_stopped):
        if task in self.work.fails:
            raise FlawError(task.first_leaf)
        if task in self.work.lasts:
            while not is_stopped():
                threading.Event().wait(0.001)
            return None
        self.num_done += 1
        return TaskResult(task, 10, (os.getpid(), threading.get_ident(), self.num_done))


TASKS = Tasks([n * LEAF_NBYTES for n in (3, 1, 0, 40, 2)], leaves_per_task=2)


@pytest.mark.parametrize("num_workers", [1, 2, 7])
@pytest.mark.parametrize("is_in_order", [False, True])
def test_each_task_once(executor, num_workers, is_in_order):
    """All of a file in one process; by one worker from end to end, if its digest needs that."""
    results = run_all(executor, Job(Signed(), num_workers, is_in_order), TASKS)
    assert Counter(result.task for result in results) == Counter(TASKS)
    for file in range(5):
        of_file = [result for result in results if result.task.file == file]
        assert len({result.value[0] for result in of_file}) == 1
        if is_in_order:
            assert len({result.value[1] for result in of_file}) == 1
            of_file.sort(key=lambda result: result.task.first_leaf)
            numbers = [result.value[2] for result in of_file]
            assert numbers == sorted(numbers)


def test_no_task_at_all(executor):
    assert run_all(executor, Job(Signed(), 2), []) == []


def test_none_comes_first(executor):
    """The caller's thread has something else to do once the workers have started."""
    with closing(executor.run(Job(Signed(), 2), TASKS, threading.Event())) as results:
        assert next(results) is None


def test_an_error_is_raised(executor):
    """What had ended before is yielded; what had not begun is left."""
    fails = TASKS[6:]
    results = []
    with pytest.raises(FlawError) as caught:
        for result in executor.run(Job(Signed(fails), 1), TASKS, threading.Event()):
            results += [] if result is None else [result.task]
    assert caught.value.args[0] in [task.first_leaf for task in fails]
    assert set(results) <= set(TASKS[:6])


def test_a_long_task_is_told_to_stop(executor):
    """Its caller cancels, or closes the results."""
    cancel = threading.Event()
    job = Job(Signed(lasts=TASKS[:]), 2)
    threading.Timer(0.2, cancel.set).start()
    assert run_all(executor, job, TASKS, cancel) == []
    results = executor.run(job, TASKS, threading.Event())
    next(results)
    results.close()


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
        assert journal.num_leaves_done == journal_length(plan) - len(claims)
        if not (is_pickled or isinstance(executor, ProcessExecutor)):
            assert not claims, "workers in this process claim leaves at once"
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
