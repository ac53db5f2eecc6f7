"""Says what machine and which versions a benchmark ran with. Reads files and asks pythons."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from harness import run

PACKAGES = (
    "shardmix",
    "mergekit",
    "LM_Cocktail",
    "sd-mecha",
    "torch",
    "safetensors",
    "transformers",
    "accelerate",
    "numpy",
    "llvmlite",
)

VERSIONS_PROGRAM = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def field(path: str, key: str) -> str:
    """The value of the first `key : value` line of a file in /proc; empty where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def file_system(folder: Path) -> str:
    """Type of the file system that holds `folder`."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    holding = [words for words in mounts if folder.resolve().is_relative_to(words[1])]
    return max(holding, key=lambda words: len(words[1]))[2] if holding else "unknown"


def versions(python: str) -> dict[str, str]:
    """Versions of python and of the packages that matter, in that python's environment."""
    answer = run([python, "-c", VERSIONS_PROGRAM, *PACKAGES])
    return dict(json.loads(answer.stdout)) if answer.returncode == 0 else {"python": "not found"}


def facts(work_dir: Path, *, pythons: Sequence[str]) -> list[str]:
    """The machine's facts and the versions in each python, one line each."""
    memory_kib = int(field("/proc/meminfo", "MemTotal").split()[0] or 0)
    free = os.statvfs(work_dir)
    lines = [
        f"cpu      {field('/proc/cpuinfo', 'model name') or platform.machine()}",
        f"cores    {len(os.sched_getaffinity(0))}, load {os.getloadavg()[0]:.2f}",
        f"memory   {memory_kib / 1024**2:.1f} GiB",
        f"kernel   {platform.system()} {platform.release()}",
        f"disk     {file_system(work_dir)}, {free.f_bavail * free.f_frsize / 1e9:.0f} GB free",
    ]
    for python in dict.fromkeys(pythons):
        found = versions(python)
        lines.append("versions " + ", ".join(f"{name} {number}" for name, number in found.items()))
    return lines


def print_facts(work_dir: Path, *, pythons: Sequence[str]) -> None:
    """Print the facts, and an empty line."""
    print("\n".join(facts(work_dir, pythons=pythons)), end="\n\n")
