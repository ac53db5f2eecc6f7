"""Prints the tests of what was changed since main: for `make check`.

    python -m tests.support.changed [COMMIT]

Changed is what differs from the commit that this branch and main have in common, committed or not.
A package's tests are its folder; those of a module at the top are the files named after it. What
decides the bytes of outputs has the golden test beside its own.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = ("tests/test_docs.py", "tests/test_house.py", "tests/test_imports.py")
"""What any change may break, and takes seconds."""
DECIDE_BYTES = {"compute", "execute", "matching", "methods", "output", "plan", "recipe", "sources"}
TESTED_ELSEWHERE = {
    "errors": ("tests/test_errors.py", "tests/test_redaction.py"),
    "reports": ("tests/cli",),
    "score_and_merge": ("tests/test_lm_cocktail.py",),
}
"""Packages and modules whose tests have other names; of a module at the top, tests/test_merge.py
has them by default."""


def changed_files(since: str | None = None) -> list[str]:
    """Return the paths that differ from a commit, by default the last one shared with main."""
    since = since or _git("merge-base", "HEAD", "main") or "HEAD"
    differing = _git("diff", "--name-only", since, "--")
    new = _git("ls-files", "--others", "--exclude-standard")
    return [*differing.splitlines(), *new.splitlines()]


def select_tests(changed: Iterable[str]) -> list[str]:
    """Return the files and folders of tests that belong to changed paths; none twice."""
    found: set[str] = set()
    for path in map(Path, changed):
        found.update(_tests_of_one(path))
    if found:
        found.update(ALWAYS)
    return sorted(
        path
        for path in found
        if (ROOT / path).exists() and not found & {p.as_posix() for p in Path(path).parents}
    )


def _tests_of_one(path: Path) -> Iterable[str]:
    top, *rest = path.parts
    if top == "shardmix" and len(rest) > 1:
        yield from TESTED_ELSEWHERE.get(rest[0], (f"tests/{rest[0]}",))
        if rest[0] in DECIDE_BYTES:
            yield "tests/golden"
    elif top == "shardmix":
        own = f"tests/test_{path.stem}.py"
        default = own if (ROOT / own).exists() else "tests/test_merge.py"
        yield from TESTED_ELSEWHERE.get(path.stem, (default,))
    elif top == "tests" and path.name.startswith("test_"):
        yield path.as_posix()
    elif top == "tests" and len(rest) > 1 and rest[0] not in ("support", "generators"):
        yield f"tests/{rest[0]}"
    elif top in ("docs", "README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "tests"):
        yield from ALWAYS


def _git(*words: str) -> str:
    """Return what git prints, or nothing if it refuses: there may be no branch called main."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    print(*select_tests(changed_files(*sys.argv[1:])))
