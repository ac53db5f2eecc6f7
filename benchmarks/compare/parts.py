"""What is compared, part by part: which tools merge which checkpoints, and how often.

Each part makes its checkpoints itself, so that only one part's need room at a time.
"""

import argparse
import re
import shlex
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.lib.programs import MERGE, MERGES, command
from benchmarks.lib.promises import least_budget
from benchmarks.lib.workspace import PRESETS, Workspace

MIB = 1024**2
OFFSETS = re.compile(rb'"data_offsets":\[([0-9]+),([0-9]+)\]')
NUM_MODELS = (2, 4, 8)
TENSOR_SIZES = (64 * MIB, 256 * MIB, 1024 * MIB)
SHARES_OF_LAYERS = (0.2, 0.5, 1.0)
"""Of the preset's layers, in models of several sizes; the embeddings stay."""
BUDGETS_BEYOND_LEAST = (0, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)


@dataclass(frozen=True, slots=True)
class ModelSet:
    """Checkpoints of one layout."""

    name: str
    models: Sequence[Path]

    def figures(self) -> dict[str, Any]:
        """Return what a row of bench.csv tells of them, by the first one's headers."""
        files = sorted(self.models[0].glob("*.safetensors"))
        # Not by `json`: objects of a long header take memory, which would count in measurements.
        offsets = (found for path in files for found in OFFSETS.finditer(header_of(path)))
        sizes = [int(found[2]) - int(found[1]) for found in offsets]
        return {
            "num_models": len(self.models),
            "model_bytes": sum(path.stat().st_size for path in files),
            "num_tensors": len(sizes),
            "largest_tensor_bytes": max(sizes),
        }


def header_of(path: Path) -> bytes:
    """Return the header of a safetensors file."""
    with path.open("rb") as file:
        return file.read(*struct.unpack("<Q", file.read(8)))


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


@dataclass(frozen=True, slots=True)
class Part:
    """One group of measurements, whose cases take turns."""

    name: str
    tools: str
    """Those that take part, if they are asked for."""
    sets: Callable[[argparse.Namespace, Workspace], list[ModelSet]]
    """Writes the checkpoints."""
    caches: tuple[str, ...] = ("warm",)
    synced: tuple[bool, ...] = (False,)
    max_rounds: int = 1000
    """For what doesn't vary."""

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
        how = {"output": output, "options": shlex.split(args.shardmix_options)}
        least = least_budget(command(MERGE, args.python, models, **how), output)
        budgets = [*(least + beyond for beyond in BUDGETS_BEYOND_LEAST), 0]
        return [replace(cases[0], budget_bytes=budget) for budget in budgets]


def llamas(workspace: Workspace, preset: str, share_of_layers: float = 1.0) -> ModelSet:
    """Return three sharded Llamas, or such of fewer layers."""
    name, options = preset, ()
    if share_of_layers < 1:
        layers = max(1, round(share_of_layers * PRESETS[preset]["sizes"]["num_hidden_layers"]))
        name, options = f"{preset}-{layers}-layers", ("--num-hidden-layers", layers)
    return ModelSet(name, workspace.checkpoints(name, "abc", preset, *options))


def giants(workspace: Workspace, tensor_bytes: int) -> ModelSet:
    """Return two one-layer Llamas whose embedding alone has `tensor_bytes` or a little more."""
    name = f"giant-{tensor_bytes // MIB}MiB"
    return ModelSet(name, workspace.checkpoints(name, "ab", "giant", "--tensor-size", tensor_bytes))


def whole(args: argparse.Namespace, workspace: Workspace) -> list[ModelSet]:
    """Return the preset's Llamas."""
    return [llamas(workspace, args.preset)]


def pairs(args: argparse.Namespace, workspace: Workspace) -> list[ModelSet]:
    """Return two of them, each in one file."""
    name, one_file = f"{args.preset}-single-file", ("--max-shard-size", "100GB")
    return [ModelSet(name, workspace.checkpoints(name, "ab", args.preset, *one_file))]


def shapes(args: argparse.Namespace, workspace: Workspace) -> list[ModelSet]:
    """Return the Llamas, giants, and the Llamas' bytes as experts of 64 KiB to 4 MiB."""
    large = llamas(workspace, args.preset)
    name, nbytes = f"moe-{args.num_tensors}", large.figures()["model_bytes"]
    options = ["--num-tensors", args.num_tensors, "--total-size", nbytes]
    options += ["--max-shard-size", PRESETS[args.preset]["shard_bytes"]]
    small = ModelSet(name, workspace.checkpoints(name, "abc", "mixed-moe", *options))
    return [large, giants(workspace, args.tensor_size), small]


def sizes(args: argparse.Namespace, workspace: Workspace) -> list[ModelSet]:
    """Return Llamas of several sizes."""
    return [llamas(workspace, args.preset, share) for share in SHARES_OF_LAYERS]


def by_tensor(_args: argparse.Namespace, workspace: Workspace) -> list[ModelSet]:
    """Return giants of several sizes."""
    return [giants(workspace, nbytes) for nbytes in TENSOR_SIZES]


def by_models(args: argparse.Namespace, workspace: Workspace) -> list[ModelSet]:
    """Return several numbers of small Llamas; those beyond three are copies."""
    few = llamas(workspace, args.preset, SHARES_OF_LAYERS[0])
    copies = workspace.linked_copies(few.models, few.name, max(NUM_MODELS) - len(few.models))
    return [ModelSet(few.name, [*few.models, *copies][:number]) for number in NUM_MODELS]


FOR_A_GPU = ("shardmix-cpu", "shardmix-gpu")
"""Who takes part only if asked for by name: elsewhere shardmix chooses the device."""
ALL = " ".join(tool for tool in MERGES if tool != "sd-mecha")
FOR_PEAKS = "shardmix shardmix-mmap shardmix-torch naive mergekit mix_models"
PARTS = (
    Part("tools", ALL, whole, caches=("warm", "cold"), synced=(False, True)),
    Part("pairs", "cp floor shardmix naive sd-mecha", pairs, synced=(False, True)),
    Part("shapes", "floor shardmix naive mergekit", shapes),
    Part("sizes", "cp floor shardmix naive mergekit mix_models", sizes),
    Part("models", FOR_PEAKS, by_models, max_rounds=1),
    Part("tensors", FOR_PEAKS, by_tensor, max_rounds=1),
    Part("budgets", "shardmix", whole),
)
