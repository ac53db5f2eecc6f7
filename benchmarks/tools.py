"""The tools that bench.py compares: what each is called, and its command line for a merge."""

import argparse
import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lm_cocktail_command
import mergekit_command
import sd_mecha_command
import shardmix_command
from harness import BENCHMARKS, Workspace

FLOOR = "floor"
SHARDMIX = "shardmix"
SHARDMIX_MMAP = "shardmix-mmap"
SHARDMIX_TORCH = "shardmix-torch"
COPY = "cp"
NAIVE = "naive"
MERGEKIT = "mergekit"
MIX_MODELS = "mix_models"
MIX_MODELS_BY_LAYERS = "mix_models_by_layers"
SD_MECHA = "sd-mecha"
EVERYTHING = (
    COPY,
    FLOOR,
    SHARDMIX,
    SHARDMIX_MMAP,
    SHARDMIX_TORCH,
    NAIVE,
    MERGEKIT,
    MIX_MODELS,
    MIX_MODELS_BY_LAYERS,
    SD_MECHA,
)
"""In the order of the tables."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What a tool is to do."""

    models: tuple[Path, ...]
    """Averaged with equal weights."""
    output: Path
    """Folder that the tool makes."""
    fsync: bool
    """Whether the tool is to put its output on the disk itself, where it can."""
    budget_bytes: int = 0
    """`--max-memory`; 0 for none. Only shardmix has one."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One way to merge."""

    name: str
    command: Callable[[Merge], list[str]]
    reports: bool = True
    """Whether it prints one JSON object with its `seconds` beyond start-up."""
    is_slow: bool = False
    """Takes minutes: fewer rounds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which tools take part, where they are and how they run."""
    parser.add_argument("--tools", nargs="+", choices=EVERYTHING, default=list(EVERYTHING))
    parser.add_argument("--shardmix-options", default="", help="as one string")
    parser.add_argument("--floor-options", default="", help="as one string")
    mergekit_command.add_arguments(parser)
    lm_cocktail_command.add_arguments(parser)
    sd_mecha_command.add_arguments(parser)


def find_pythons(args: argparse.Namespace, workspace: Workspace) -> list[str]:
    """Install what is missing of the tools that take part; all their pythons, shardmix's first."""
    pythons = [args.python]
    if MERGEKIT in args.tools:
        args.mergekit_python = mergekit_command.mergekit_python(args.mergekit_python, workspace)
        pythons.append(args.mergekit_python)
    if MIX_MODELS in args.tools or MIX_MODELS_BY_LAYERS in args.tools:
        args.lm_cocktail_python = lm_cocktail_command.lm_cocktail_python(
            args.lm_cocktail_python, workspace
        )
        pythons.append(args.lm_cocktail_python)
    if SD_MECHA in args.tools:
        args.sd_mecha_python = sd_mecha_command.sd_mecha_python(args.sd_mecha_python, workspace)
        pythons.append(args.sd_mecha_python)
    return pythons


def all_tools(args: argparse.Namespace, recipe: Path) -> dict[str, Tool]:
    """Every tool that takes part, by name; mergekit's recipe is written to `recipe`."""

    def floor(merge: Merge) -> list[str]:
        fsync = "--fsync" if merge.fsync else "--no-fsync"
        options = ["-o", str(merge.output), fsync, *shlex.split(args.floor_options)]
        return [args.python, str(BENCHMARKS / "floor.py"), *map(str, merge.models), *options]

    def shardmix(merge: Merge, *, options: Sequence[str] = ()) -> list[str]:
        extra = [*options, *shlex.split(args.shardmix_options)]
        extra += [] if merge.fsync else ["--no-fsync"]
        extra += ["--max-memory", f"{merge.budget_bytes}B"] if merge.budget_bytes else []
        return shardmix_command.merge_command(args.python, merge.models, merge.output, extra=extra)

    def naive(merge: Merge) -> list[str]:
        script = str(BENCHMARKS / "naive_merge.py")
        return [args.python, script, *map(str, merge.models), "-o", str(merge.output)]

    def copy(merge: Merge) -> list[str]:
        # A reflink would move no bytes.
        return ["cp", "-r", "--reflink=never", str(merge.models[0]), str(merge.output)]

    def mergekit(merge: Merge) -> list[str]:
        mergekit_command.write_recipe(recipe, merge.models)
        options = shlex.split(args.mergekit_options)
        return mergekit_command.merge_command(args.mergekit_python, recipe, merge.output, options)

    def lm_cocktail(merge: Merge, *, function: str) -> list[str]:
        return lm_cocktail_command.merge_command(
            args.lm_cocktail_python, function, merge.models, merge.output
        )

    def sd_mecha(merge: Merge) -> list[str]:
        return sd_mecha_command.merge_command(args.sd_mecha_python, merge.models, merge.output)

    by_layers = functools.partial(lm_cocktail, function="mix_models_by_layers")
    everyone = (
        Tool(COPY, copy, reports=False),
        Tool(FLOOR, floor),
        Tool(SHARDMIX, shardmix),
        Tool(SHARDMIX_MMAP, functools.partial(shardmix, options=["--io", "mmap"])),
        Tool(SHARDMIX_TORCH, functools.partial(shardmix, options=["--backend", "torch"])),
        Tool(NAIVE, naive),
        Tool(MERGEKIT, mergekit, reports=False),
        Tool(MIX_MODELS, functools.partial(lm_cocktail, function="mix_models")),
        Tool(MIX_MODELS_BY_LAYERS, by_layers, is_slow=True),
        Tool(SD_MECHA, sd_mecha),
    )
    return {tool.name: tool for tool in everyone if tool.name in args.tools}
