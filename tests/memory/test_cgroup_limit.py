"""A merge inside a memory control group: a hard limit, page cache included, of 512 MiB."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shardmix.system.units import MIB
from tests.support.models import load_model, save_model

pytestmark = pytest.mark.machine

LIMIT = 512 * MIB


@pytest.fixture
def memory_group():
    """Make a control group (version 1 or 2), and remove it afterwards."""
    root = Path("/sys/fs/cgroup")
    version_1 = root / "memory"
    name = f"shardmix-test-{os.getpid()}"
    group = (version_1 if version_1.is_dir() else root) / name
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no memory control group can be made here ({error.strerror})")
    yield group
    for _ in range(100):  # the kernel takes a moment to let go of a process that has ended
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.02)
    raise AssertionError(f"{group} cannot be removed")


def test_merge_completes_within_the_limit(memory_group, tmp_path):
    """A merge of more than the limit completes inside it."""
    block = torch.randn(1_000_000).bfloat16()
    models = [
        save_model(tmp_path / name, {f"t{i}": block.repeat(100) for i in range(3)}, config={})
        for name in "ab"
    ]
    words = [f"{model}=0.5" for model in models]
    join = f"open({str(memory_group / 'cgroup.procs')!r}, 'w').write('0')"
    code = (
        f"{join}\nimport sys\nsys.argv = ['shardmix', 'merge', *{words!r}, '-o', "
        f"{str(tmp_path / 'out')!r}, '--quiet', '--max-memory', '400MiB']\n"
        "from shardmix.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged = load_model(tmp_path / "out")
    assert torch.equal(merged["t2"][:1_000_000], (block.float() * 0.5 * 2).bfloat16())
