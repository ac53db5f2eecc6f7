"""What bench.py measures, part by part: which tools merge which checkpoints, and how often.

Each part makes its checkpoints itself, so that only one part's need room at a time.
"""

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import model_sets
import shardmix_command
import tools
from checkpoint_shapes import PRESETS
from harness import Workspace
from measurement import Case
from model_sets import ModelSet
from tools import Tool

MIB = 1024**2
ALL_TOOLS = tuple(tool for tool in tools.EVERYTHING if tool != tools.SD_MECHA)
FOR_SHAPES = (tools.FLOOR, tools.SHARDMIX, tools.NAIVE, tools.MERGEKIT)
FOR_SMALL_TENSORS = (tools.FLOOR, tools.SHARDMIX, tools.NAIVE)
"""Not mergekit, which must know the architecture of a model."""
FOR_PAIRS = (tools.COPY, tools.FLOOR, tools.SHARDMIX, tools.NAIVE, tools.SD_MECHA)
FOR_SIZES = (
    *(tools.COPY, tools.FLOOR, tools.SHARDMIX),
    *(tools.NAIVE, tools.MERGEKIT, tools.MIX_MODELS),
)
FOR_PEAKS = (
    *(tools.SHARDMIX, tools.SHARDMIX_MMAP, tools.SHARDMIX_TORCH),
    *(tools.NAIVE, tools.MERGEKIT, tools.MIX_MODELS),
)

NUM_MODELS = (2, 4, 8)
TENSOR_SIZES = (64 * MIB, 256 * MIB, 1024 * MIB)
SHARES_OF_LAYERS = (0.2, 0.5)
"""Of the preset's layers, in the smaller models; the embeddings stay."""
BUDGETS_BEYOND_LEAST = (16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)


@dataclass(frozen=True, slots=True)
class Part:
    """One group of measurements, whose cases take turns."""

    name: str
    cases: Callable[[argparse.Namespace, Mapping[str, Tool], Workspace], list[Case]]
    """Writes the checkpoints."""
    caches: tuple[str, ...] = ("warm",)
    synced: tuple[bool, ...] = (False,)
    max_rounds: int = 1000
    """For what doesn't vary."""
    merges_preset: bool = True
    """Whether it has the preset's whole Llamas among its checkpoints, as several parts have."""


def _by_tool(found: Mapping[str, Tool], names: tuple[str, ...], model_set: ModelSet) -> list[Case]:
    return [Case(found[name], model_set) for name in names if name in found]


def _tools(args: argparse.Namespace, found: Mapping[str, Tool], workspace: Workspace) -> list[Case]:
    return _by_tool(found, ALL_TOOLS, model_sets.llamas(workspace, args.preset))


def _pairs(args: argparse.Namespace, found: Mapping[str, Tool], workspace: Workspace) -> list[Case]:
    return _by_tool(found, FOR_PAIRS, model_sets.single_files(workspace, args.preset))


def _shapes(
    args: argparse.Namespace, found: Mapping[str, Tool], workspace: Workspace
) -> list[Case]:
    large = model_sets.llamas(workspace, args.preset)
    small = model_sets.small_tensors(workspace, args.num_tensors, large, args.preset)
    giant = model_sets.giants(workspace, args.tensor_size)
    few = [case for one in (large, giant) for case in _by_tool(found, FOR_SHAPES, one)]
    return few + _by_tool(found, FOR_SMALL_TENSORS, small)


def _sizes(args: argparse.Namespace, found: Mapping[str, Tool], workspace: Workspace) -> list[Case]:
    whole = PRESETS[args.preset][0].num_hidden_layers
    layers = [*(max(1, round(share * whole)) for share in SHARES_OF_LAYERS), None]
    sets = [model_sets.llamas(workspace, args.preset, num_layers=number) for number in layers]
    return [case for one in sets for case in _by_tool(found, FOR_SIZES, one)]


def _peaks_by_models(
    args: argparse.Namespace, found: Mapping[str, Tool], workspace: Workspace
) -> list[Case]:
    layers = max(1, round(SHARES_OF_LAYERS[0] * PRESETS[args.preset][0].num_hidden_layers))
    originals = model_sets.llamas(workspace, args.preset, num_layers=layers)
    longest = model_sets.many(workspace, originals, max(NUM_MODELS))
    return [
        case for number in NUM_MODELS for case in _by_tool(found, FOR_PEAKS, longest.first(number))
    ]


def _peaks_by_tensor(
    args: argparse.Namespace, found: Mapping[str, Tool], workspace: Workspace
) -> list[Case]:
    sets = [model_sets.giants(workspace, nbytes) for nbytes in TENSOR_SIZES]
    return [case for one in sets for case in _by_tool(found, FOR_PEAKS, one)]


def _budgets(
    args: argparse.Namespace, found: Mapping[str, Tool], workspace: Workspace
) -> list[Case]:
    if tools.SHARDMIX not in found:
        return []
    one = model_sets.llamas(workspace, args.preset)
    options = shlex.split(args.shardmix_options)
    output = workspace.scratch("trial")
    least = shardmix_command.least_budget(args.python, one.models, output, extra=options)
    budgets = [least, *(least + beyond for beyond in BUDGETS_BEYOND_LEAST), 0]
    return [Case(found[tools.SHARDMIX], one, budget) for budget in budgets]


BOTH = (False, True)
PARTS = (
    Part("tools", _tools, caches=("warm", "cold"), synced=BOTH),
    Part("pairs", _pairs, synced=BOTH, merges_preset=False),
    Part("shapes", _shapes),
    Part("sizes", _sizes),
    Part("models", _peaks_by_models, max_rounds=1, merges_preset=False),
    Part("tensors", _peaks_by_tensor, max_rounds=1, merges_preset=False),
    Part("budgets", _budgets),
)
