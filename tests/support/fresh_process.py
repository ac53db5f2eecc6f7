"""Run a merge in a process of its own and tell its peak resident memory."""

import json
import subprocess
import sys
from typing import Any


def merge_report(*words: object) -> dict[str, Any]:
    """Return the JSON report of `shardmix merge` with these words; its VmHWM is the process's."""
    done = _merge(words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused_merge(*words: object) -> str:
    """Return the error message of a `shardmix merge` that is refused."""
    done = _merge(words)
    assert done.returncode in (1, 2), done.stderr
    return done.stderr


def _merge(words: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardmix", "merge", *map(str, words), "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str, *words: object) -> str:
    """Return what a fresh interpreter prints for this code, which finds the words in `sys.argv`."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
