"""No file from outside crashes the process, hangs it, leads it elsewhere or makes it grow.

Every input goes through the command line, in processes that do nothing else: what they took at
their peak is what the inputs made them take.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.hostile_batch import CASES
from tests.support.hostile_inputs import Case
from tests.support.sampling import sample

_ROOT = Path(__file__).parents[2]
_BATCH = 100
"""How many inputs one process is given."""
_MOST_NBYTES = 300_000_000


def harmed(case: Case) -> list[str]:
    """Return what a case harms: a header, an index, the recipe, ..."""
    return [case.name.partition(":")[0]]


SAMPLE = sample("hostile inputs", CASES, 90, kinds=harmed)
REAL = ["header: a name that clears the screen", "recipe: a pipe"]
"""Which cases meet the installed command as well."""

Outcomes = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What became of each input: refused for people, for machines, and looked at."""
    folder = tmp_path_factory.mktemp("hostile")
    told: Outcomes = {}
    numbers = [CASES.index(case) for case in SAMPLE]
    for first in range(0, len(numbers), _BATCH):
        batch = numbers[first : first + _BATCH]
        words = [sys.executable, "-m", "tests.support.hostile_batch", folder, *batch]
        done = subprocess.run(
            list(map(str, words)),
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            outcome = json.loads(line)
            told.setdefault(outcome["name"], {})[outcome["kind"]] = outcome
    return told


def test_inputs_are_many_and_named_once():
    """There are many of them, and no two of one name."""
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 170


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_it_is_refused_in_one_clear_line(outcomes, case):
    for outcome in (outcomes[case.name]["people"], outcomes[case.name]["machines"]):
        assert outcome["traceback"] == ""
        lines = outcome["stderr"].splitlines()
        assert len(lines) == 1, lines
        assert outcome["stderr"] == lines[0] + "\n"
        assert lines[0].startswith("error: ")
        assert lines[0].isprintable()
        assert len(lines[0]) < 2_500
        assert case.said in lines[0]
        assert outcome["status"] == case.status
        assert not outcome["changed"]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_machines_are_told_the_same(outcomes, case):
    """Machines are told the same, and nothing that a terminal obeys."""
    for_people, for_machines = (outcomes[case.name][kind] for kind in ("people", "machines"))
    assert for_people["stdout"] == ""
    assert "".join(for_machines["stdout"].split("\n")).isprintable()
    error = json.loads(for_machines["stdout"])["error"]
    assert f"error: {error['message']}\n" == for_people["stderr"]
    assert error["kind"].endswith("Error")


def test_inspecting_does_no_harm(outcomes):
    """What cannot be merged may be looked at, but does no more harm."""
    looked_at = [told["inspect"] for told in outcomes.values() if "inspect" in told]
    assert len(looked_at) > len(SAMPLE) / 3
    for outcome in looked_at:
        assert outcome["traceback"] == ""
        assert outcome["status"] in (0, 1)
        assert outcome["stderr"].count("\n") == outcome["status"]  # an error, or nothing
        assert all(
            line.isprintable() for line in (outcome["stdout"] + outcome["stderr"]).split("\n")
        )
        assert not outcome["changed"]


def test_none_takes_much_memory(outcomes):
    all_outcomes = [outcome for told in outcomes.values() for outcome in told.values()]
    largest = max(all_outcomes, key=lambda outcome: outcome["peak_nbytes"])
    assert largest["peak_nbytes"] < _MOST_NBYTES, largest["name"]


def refusal(*words: object) -> str:
    """Return what the installed command says, from a process of its own, as it is refused."""
    done = subprocess.run(
        [sys.executable, "-m", "shardmix", *map(str, words)],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode in (1, 2)
    return done.stderr.decode()


@pytest.mark.parametrize("name", REAL)
def test_the_real_command_says_the_same(tmp_path: Path, name: str):
    case = next(case for case in CASES if case.name == name)
    message = refusal(*case.build(tmp_path))
    assert message.startswith("error: ")
    assert case.said in message
    assert message[:-1].isprintable()
