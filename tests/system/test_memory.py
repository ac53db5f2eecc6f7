import pytest

from shardmix.errors import BudgetError
from shardmix.system import memory
from shardmix.system.units import MIB
from tests.support.fresh_process import python


def test_measured_memory_is_the_processs():
    """Measured memory is that of the process.

    In a fresh one: this one's allocator may serve the ballast from what it kept.
    """
    code = (
        "from shardmix.system.memory import peak_resident_nbytes, resident_nbytes\n"
        "before = resident_nbytes()\n"
        "ballast = b'x' * (64 << 20)\n"
        "print(resident_nbytes() - before > 60 << 20)\n"
        "del ballast\n"
        "print(peak_resident_nbytes() - before > 60 << 20)\n"
        "print(resident_nbytes() - before < 4 << 20)\n"
    )
    assert python(code).split() == ["True"] * 3


def test_room_is_within_the_whole_budget(monkeypatch):
    """Room is asked for within the budget for the whole process."""
    monkeypatch.setattr(memory, "resident_nbytes", lambda: 100 * MIB)
    memory.check_room(50 * MIB, max_memory=150 * MIB, subject="x", purpose="to decode it")
    with pytest.raises(
        BudgetError,
        match="x: to decode it may take 151MiB in all but --max-memory is 150MiB; "
        "later steps may take more; raise the budget",
    ):
        memory.check_room(51 * MIB, max_memory=150 * MIB, subject="x", purpose="to decode it")


def test_default_budget_is_four_fifths(monkeypatch):
    """Without a budget, four fifths of the free memory is one."""
    monkeypatch.setattr(memory, "resident_nbytes", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "available_nbytes", lambda: 1000 * MIB)
    memory.check_room(800 * MIB, max_memory=None, subject="x", purpose="to decode it")
    with pytest.raises(BudgetError, match="may take 901MiB in all but only 900MiB can be had here"):
        memory.check_room(801 * MIB, max_memory=None, subject="x", purpose="to decode it")
    monkeypatch.setattr(memory, "available_nbytes", lambda: 0)
    memory.check_room(
        64 * MIB, max_memory=None, subject="x", purpose="what takes little is not asked about"
    )
