"""What is compared, part by part: which tools merge which checkpoints, and how often.

Each part makes its checkpoints itself, so that only one part's need room at a time.
"""

import argparse
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.lib.programs import MERGES, least_budget, merge_command, split_options
from benchmarks.lib.shapes import PRESETS
from benchmarks.lib.workspace import Workspace

MIB = 1024**2
OFFSETS = re.compile(rb'"data_offsets":\[([0-9]+),([0-9]+)\]')
NUM_MODELS = (2, 4, 8)
TENSOR_SIZES = (64 * MIB, 256 * MIB, 1024 * MIB)
SHARES_OF_LAYERS = (0.2, 0.5)
"""Of the preset's layers, in the smaller models; the embeddings stay."""
BUDGETS_BEYOND_LEAST = (16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)


@dataclass(frozen=True, slots=True)
class ModelSet:
    """Checkpoints of one layout."""

    name: str
    models: Sequence[Path]

    def figures(self) -> dict[str, Any]:
        """Return what a row of bench.csv tells of them, by the first one's headers."""
        files = sorted(self.models[0].glob("*.safetensors"))
        sizes = [size for path in files for size in _tensor_sizes(path)]
        return {
            "num_models": len(self.models),
            "model_bytes": sum(path.stat().st_size for path in files),
            "num_tensors": len(sizes),
            "largest_tensor_bytes": max(sizes),
        }


def _tensor_sizes(path: Path) -> Iterator[int]:
    """Yield the bytes of each tensor in a file that `lib.checkpoints` wrote.

    Not by `json`: as objects a long header takes memory, which would count for what is measured.
    """
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = file.read(header_bytes)
    for entry in OFFSETS.finditer(header):
        yield int(entry[2]) - int(entry[1])


@dataclass(frozen=True, slots=True)
class Case:
    """A tool merges a set within a budget."""

    tool: str
    model_set: ModelSet
    budget_bytes: int = 0
    """`--max-memory`; 0 for none."""

    def __str__(self) -> str:
        budget = f", {self.budget_bytes // MIB} MiB" if self.budget_bytes else ""
        return f"{self.tool}: {len(self.model_set.models)} x {self.model_set.name}{budget}"


Sets = Iterable[ModelSet]


@dataclass(frozen=True, slots=True)
class Part:
    """One group of measurements, whose cases take turns."""

    name: str
    tools: str
    """Those that take part, if they are asked for."""
    sets: Callable[[argparse.Namespace, Workspace], Sets]
    """Writes the checkpoints."""
    caches: tuple[str, ...] = ("warm",)
    synced: tuple[bool, ...] = (False,)
    max_rounds: int = 1000
    """For what doesn't vary."""
    merges_preset: bool = True
    """Whether it has the preset's whole Llamas among its checkpoints, as several parts have."""

    def cases(self, args: argparse.Namespace, workspace: Workspace) -> list[Case]:
        """Return what is measured; writes the checkpoints."""
        cases = [
            Case(tool, one)
            for one in self.sets(args, workspace)
            for tool in self.tools.split()
            # mergekit must know the architecture of a model.
            if tool in args.tools and (tool, one.name[:3]) != ("mergekit", "moe")
        ]
        if self.name != "budgets" or not cases:
            return cases
        models, output = cases[0].model_set.models, workspace.scratch("trial")
        options = split_options(args, "shardmix")
        command = merge_command("shardmix", args.python, models, output, options=options)
        least = least_budget(command, output)
        budgets = [least, *(least + beyond for beyond in BUDGETS_BEYOND_LEAST), 0]
        return [replace(cases[0], budget_bytes=budget) for budget in budgets]


def llamas(workspace: Workspace, preset: str, *, share_of_layers: float = 1.0) -> ModelSet:
    """Return three sharded Llamas, or such of fewer layers."""
    if share_of_layers == 1:
        return ModelSet(preset, workspace.checkpoints(preset, "abc", preset))
    layers = max(1, round(share_of_layers * PRESETS[preset]["sizes"]["num_hidden_layers"]))
    name = f"{preset}-{layers}-layers"
    made = workspace.checkpoints(name, "abc", preset, "--num-hidden-layers", layers)
    return ModelSet(name, made)


def giants(workspace: Workspace, tensor_bytes: int) -> ModelSet:
    """Return two one-layer Llamas whose embedding alone has `tensor_bytes` or a little more."""
    name = f"giant-{tensor_bytes // MIB}MiB"
    return ModelSet(name, workspace.checkpoints(name, "ab", "giant", "--tensor-size", tensor_bytes))


def _preset(args: argparse.Namespace, workspace: Workspace) -> Sets:
    yield llamas(workspace, args.preset)


def _pairs(args: argparse.Namespace, workspace: Workspace) -> Sets:
    name, one_file = f"{args.preset}-single-file", ("--max-shard-size", "100GB")
    yield ModelSet(name, workspace.checkpoints(name, "ab", args.preset, *one_file))


def _shapes(args: argparse.Namespace, workspace: Workspace) -> Sets:
    large = llamas(workspace, args.preset)
    yield large
    yield giants(workspace, args.tensor_size)
    # As many bytes as the Llamas have, in shards as large, as experts of 64 KiB to 4 MiB.
    name, nbytes = f"moe-{args.num_tensors}", large.figures()["model_bytes"]
    options = ["--num-tensors", args.num_tensors, "--total-size", nbytes]
    options += ["--max-shard-size", PRESETS[args.preset]["shard_bytes"]]
    yield ModelSet(name, workspace.checkpoints(name, "abc", "mixed-moe", *options))


def _sizes(args: argparse.Namespace, workspace: Workspace) -> Sets:
    for share in (*SHARES_OF_LAYERS, 1.0):
        yield llamas(workspace, args.preset, share_of_layers=share)


def _by_models(args: argparse.Namespace, workspace: Workspace) -> Sets:
    originals = llamas(workspace, args.preset, share_of_layers=SHARES_OF_LAYERS[0])
    models = list(originals.models)
    for number in range(len(models), max(NUM_MODELS)):
        # Hard links: other checkpoints of the same bytes.
        source = originals.models[number % len(originals.models)]
        models.append(workspace.linked_copy(source, f"{originals.name}-copy-{number}"))
    for number in NUM_MODELS:
        yield ModelSet(originals.name, models[:number])


def _by_tensor(args: argparse.Namespace, workspace: Workspace) -> Sets:
    for nbytes in TENSOR_SIZES:
        yield giants(workspace, nbytes)


BOTH = (False, True)
FOR_A_GPU = ("shardmix-cpu", "shardmix-gpu")
"""Who takes part only if asked for by name: elsewhere shardmix chooses the device."""
ALL = " ".join(tool for tool in MERGES if tool != "sd-mecha")
FOR_PEAKS = "shardmix shardmix-mmap shardmix-torch naive mergekit mix_models"
PARTS = (
    Part("tools", ALL, _preset, caches=("warm", "cold"), synced=BOTH),
    Part("pairs", "cp floor shardmix naive sd-mecha", _pairs, synced=BOTH, merges_preset=False),
    Part("shapes", "floor shardmix naive mergekit", _shapes),
    Part("sizes", "cp floor shardmix naive mergekit mix_models", _sizes),
    Part("models", FOR_PEAKS, _by_models, max_rounds=1, merges_preset=False),
    Part("tensors", FOR_PEAKS, _by_tensor, max_rounds=1, merges_preset=False),
    Part("budgets", "shardmix", _preset),
)
