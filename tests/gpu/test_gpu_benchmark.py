"""The benchmark of merges on a GPU, with the CPU in the GPU's place."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.gpu import __main__ as gpu
from benchmarks.lib.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


def test_gpu_benchmark_measures(tmp_path, monkeypatch, capsys):
    """All cases are merged by turns, and each has a rate beside the floor's and the link's."""
    monkeypatch.setattr(gpu, "GPU", "cpu")
    monkeypatch.setattr(gpu, "wait_until_idle", lambda: None)
    args = SimpleNamespace(
        work_dir=tmp_path / "work",
        keep=False,
        python=sys.executable,
        preset="tiny",
        output=None,
        rounds=1,
        chunks=[1024**2],
        workers=[1],
        budgets=[],
    )
    link = dict(zip(gpu.LINK, (8.0, 4.0, 12.0), strict=True))
    vram = iter(range(10**6))
    with Workspace(args) as workspace:
        rows, is_as_promised = gpu.measure(args, workspace, lambda: link, lambda: next(vram))
    assert is_as_promised
    merges = [row for row in rows if row["device"] not in gpu.LINK]
    assert len(merges) == 6  # cpu, floor, with chunks, with one worker, two other methods
    assert all(row["gb_per_s"] > 0 and row["driver_bytes"] >= 0 for row in merges)
    assert {row["method"] for row in merges} == {"linear", "task_arithmetic", "slerp"}
    assert [row["report_workers"] for row in merges if row["workers"]] == [1]
    told = capsys.readouterr().out
    assert "link, both at once" in told
    (line,) = (line for line in told.splitlines() if line.startswith("link, to the host"))
    assert line.split()[-1] == "0.500"
    assert not list(tmp_path.iterdir())


def test_gpu_benchmark_needs_a_gpu(tmp_path):
    """It says in one line that there is no CUDA device."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--work-dir", tmp_path / "work"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=hidden)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: torch ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "work").exists()
