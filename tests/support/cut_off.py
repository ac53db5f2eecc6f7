"""Merges that are cut off in the middle, and models large enough to have one."""

from contextlib import contextmanager

import pytest
import torch

import shardmix
from shardmix.output.journal import Journal
from tests.support.models import random_tensor, save_model


def large_models(folder, *, num_models=2, shards=True, scale=1.0):
    """Save models of 28 MB, seven leaves in two files; return (folder, weight) pairs."""
    names = [f"layer{number}.weight" for number in range(7)]
    models = []
    for number in range(num_models):
        tensors = {
            name: (random_tensor((1000, 1000), seed=10 * number + row) * scale).float()
            for row, name in enumerate(names)
        }
        tensors["steps"] = torch.arange(10) + number
        split = [[*names[:4]], [*names[4:], "steps"]] if shards else None
        folder_of = save_model(folder / f"m{number}", tensors, shards=split)
        models.append((folder_of, (0.6, 0.4)[number] if num_models == 2 else 1 / num_models))
    return models


@contextmanager
def cut_off_after(num_leaves, error=KeyboardInterrupt):
    """Let merges fail once they have claimed this many leaves."""
    add = Journal.add
    count = 0

    def add_or_fail(self, *args):
        nonlocal count
        if count == num_leaves:
            raise error
        count += 1
        add(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", add_or_fail)
        yield


def cut_off(models, out, *, num_leaves=3, **options):
    """Begin a merge and cut it off."""
    with cut_off_after(num_leaves), pytest.raises(KeyboardInterrupt):
        shardmix.merge(models, out, workers=1, **options)
    assert (out.parent / f".{out.name}.shardmix" / "journal").exists()


def folder_bytes(folder):
    """Return path → content of all files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
