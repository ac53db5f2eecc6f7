"""Runs arrangements by the command line, and digests what comes out.

Only this module imports shardmix. Options are named here, or in the table if they decide bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from shardmix.cli.commands import app
from tests.golden.arrangements import Arrangement

RECORD = Path(__file__).with_name("outputs.json")
"""Arrangement → the SHA-256 of its models ("sources"), and of each file of its output."""

WAYS: Mapping[str, tuple[str, ...]] = {
    "by default": (),
    "torch": ("--backend", "torch", "--io", "pread", "--workers", "1"),
    "mmap": ("--io", "mmap", "--workers", "3"),
}
"""Ways to run a merge, none of which may change a byte."""

_ALL_WAYS = ("--no-fsync", "--device", "cpu", "--json", "--quiet")
_CONFIG_FROM = "--config-from"
# These tell of the merge: of the version, of options, of paths. Other words in them are no harm.
_NOT_RECORDED = {"README.md", "shardmix.json"}


def merge(
    arrangement: Arrangement, folder: Path, out: Path, words: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a merge, with more words if any, and return its report; the models go into `folder`."""
    result = invoke(arrangement, folder, out, words)
    if result.exit_code != 0:
        raise AssertionError(f"exit {result.exit_code}: {result.output}") from result.exception
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def invoke(arrangement: Arrangement, folder: Path, out: Path, words: Sequence[str] = ()) -> Result:
    """Run a merge in this process, whatever its end."""
    return CliRunner().invoke(app, command(arrangement, folder, out, words))


def command(
    arrangement: Arrangement, folder: Path, out: Path, words: Sequence[str] = ()
) -> list[str]:
    """Return the words of the command line; make the models in `folder` unless they are there."""
    sources = save_models(arrangement, folder)
    weighted = [
        f"{source}={weight}" for source, weight in zip(sources, arrangement.weights, strict=True)
    ]
    donor = [_CONFIG_FROM, str(_donor(folder))] if arrangement.config_from is not None else []
    return ["merge", *weighted, "-o", str(out), *arrangement.words, *donor, *_ALL_WAYS, *words]


def save_models(arrangement: Arrangement, folder: Path) -> list[Path]:
    """Make the models in `folder`, unless they are there; return what the merge names."""
    if arrangement.config_from is not None:
        arrangement.config_from.save(_donor(folder))
    saved = [
        model.save(folder / f"model {number}") for number, model in enumerate(arrangement.models)
    ]
    return [path / "model.safetensors" for path in saved] if arrangement.as_files else saved


def _donor(folder: Path) -> Path:
    """Return where the model is that gives the config, if it is none of the sources."""
    return folder / "config from"


def sources_digest(arrangement: Arrangement, folder: Path) -> str:
    """Return the SHA-256 of all files of an arrangement's models, which are made in `folder`."""
    save_models(arrangement, folder)
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(folder).as_posix()}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def output_digests(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an output, but for those that tell of the merge."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and (name := path.relative_to(out).as_posix()) not in _NOT_RECORDED
    }


def read_record() -> dict[str, dict[str, Any]]:
    """Return what is on record, by arrangement."""
    record: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())
    return record
