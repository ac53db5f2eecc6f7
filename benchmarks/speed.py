"""Times shardmix, the floor and mergekit side by side, shuffled, with warm and cold caches.

    python benchmarks/speed.py --work-dir WORK --rounds 5

Beside the whole process' wall time it gives the time beyond start-up: for shardmix the `seconds`
of its own report, for the floor its own, for mergekit the wall time less its median import time.
"""

import argparse
import itertools
import json
import os
import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mergekit_command
import shardmix_command
from harness import (
    BENCHMARKS,
    OFFLINE,
    Workspace,
    remove,
    run_or_exit,
    wait_until_idle,
    workspace_arguments,
    write_csv,
)
from machine import print_facts
from page_cache import Filler, can_drop_caches, drop_caches, read_into_cache
from speed_report import TOOLS, Sample, print_report

WEIGHTS = (0.5, 0.3, 0.2)
SHUFFLE_SEED = 7


@dataclass(frozen=True, slots=True)
class Contestant:
    """A tool in one mode: what to run, and how to read the time beyond start-up off it."""

    tool: str
    fsync: bool
    command: Callable[[Path], Sequence[str]]
    """Output folder -> command line."""
    seconds: Callable[[str], float | None]
    """Standard output -> seconds beyond start-up, where the tool reports them."""
    python: str
    """The python whose libraries must be in the cache before it is timed."""
    writes: bool = True
    """Whether it is a merge."""


def contestants(args: argparse.Namespace, models: Sequence[Path], recipe: Path) -> list[Contestant]:
    """Everything that takes part, in the order of the first round."""

    def reported(text: str) -> float:
        return float(json.loads(text)["seconds"])

    def unreported(_text: str) -> None:
        return None

    def floor(fsync: bool) -> Contestant:
        options = ["--fsync" if fsync else "--no-fsync", *shlex.split(args.floor_options)]
        command = [args.python, str(BENCHMARKS / "floor.py"), *map(str, models)]
        return Contestant(
            "floor",
            fsync,
            lambda output: [*command, "-o", str(output), *options],
            reported,
            args.python,
        )

    def shardmix(fsync: bool) -> Contestant:
        extra = [*([] if fsync else ["--no-fsync"]), *shlex.split(args.shardmix_options)]
        return Contestant(
            "shardmix",
            fsync,
            lambda output: shardmix_command.merge_command(
                args.python, models, output, weights=WEIGHTS, extra=extra
            ),
            reported,
            args.python,
        )

    def imports(python: str, module: str) -> Contestant:
        command = [python, "-c", f"import {module}"]
        tool = f"import {module.split('.')[0]}"
        return Contestant(tool, False, lambda _: command, unreported, python, writes=False)

    options = shlex.split(args.mergekit_options)
    everyone = [floor(False), shardmix(False), floor(True), shardmix(True)]
    everyone.append(imports(args.python, "torch"))
    if "mergekit" in args.tools:
        python = args.mergekit_python
        everyone.append(imports(python, "mergekit.scripts.run_yaml"))
        everyone.append(
            Contestant(
                "mergekit",
                False,
                lambda output: mergekit_command.merge_command(python, recipe, output, options),
                unreported,
                python,
            )
        )
    return [one for one in everyone if one.tool in args.tools]


def prepare(
    cache: str, contestant: Contestant, models: Sequence[Path], output: Path, filler: Filler
) -> float:
    """Bring caches and disk to the same state; how busy others keep the cores, from 0 to 1."""
    remove(output)
    os.sync()
    if cache == "cold":
        drop_caches()
        # Cold are the checkpoints, not the tools: start-up from disk is not what is compared.
        module = "mergekit.scripts.run_yaml" if contestant.tool.endswith("mergekit") else "torch"
        run_or_exit([contestant.python, "-c", f"import {module}"])
    filler.fill()
    if cache == "warm":
        read_into_cache(models)
    return wait_until_idle()


def measure(
    contestant: Contestant,
    *,
    cache: str,
    number: int,
    models: Sequence[Path],
    output: Path,
    filler: Filler,
) -> Sample:
    """Run one contestant once and check that it wrote as many bytes as a model has."""
    busy = prepare(cache, contestant, models, output, filler)
    finished = run_or_exit(contestant.command(output), environment=OFFLINE)
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    expected = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    # Headers differ with the number of shards; the data do not.
    if contestant.writes and abs(written - expected) > 1024**2:
        raise SystemExit(f"{contestant.tool} wrote {written} bytes of about {expected}")
    return Sample(
        cache=cache,
        fsync=contestant.fsync,
        tool=contestant.tool,
        round=number,
        wall_s=round(finished.wall_s, 3),
        seconds=contestant.seconds(finished.stdout),
        user_s=round(finished.user_s, 3),
        system_s=round(finished.system_s, 3),
        peak_bytes=finished.peak_bytes,
        written_bytes=written if contestant.writes else 0,
        busy_before=busy,
    )


def measure_all(
    everyone: Sequence[Contestant],
    *,
    caches: Sequence[str],
    rounds: int,
    models: Sequence[Path],
    output: Path,
    filler: Filler,
) -> list[Sample]:
    """All rounds, each in an order of its own. Round 0 warms up and is not kept.

    Shuffled, not rotated: in a rotation each tool would have the same one before it every time.
    """
    samples = []
    shuffler = random.Random(SHUFFLE_SEED)
    for cache, number in itertools.product(caches, range(rounds + 1)):
        for contestant in shuffler.sample(everyone, len(everyone)):
            if number == 0 and contestant.tool != "floor":
                continue
            sample = measure(
                contestant,
                cache=cache,
                number=number,
                models=models,
                output=output,
                filler=filler,
            )
            mode = "fsync" if sample.fsync else "-"
            print(f"{cache} round {number}: {sample.tool:16}{mode:6}{sample.wall_s:8.2f} s wall")
            if number:
                samples.append(sample)
    return samples


def main() -> None:
    """Measure and report."""
    parser = workspace_arguments("Time shardmix, the floor and mergekit side by side.")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--preset", default="llama-1b", help="shape of the checkpoints")
    parser.add_argument("--shardmix-options", default="", help="as one string")
    parser.add_argument("--floor-options", default="", help="as one string")
    parser.add_argument("--csv", type=Path, default=Path("speed.csv"), help="raw figures")
    mergekit_command.add_arguments(parser)
    args = parser.parse_args()
    caches = list(args.cache)
    if "cold" in caches and not can_drop_caches():
        print("cold cache: skipped, only root may write /proc/sys/vm/drop_caches\n")
        caches.remove("cold")
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        pythons = [args.python]
        if "mergekit" in args.tools:
            args.mergekit_python = mergekit_command.mergekit_python(args.mergekit_python, workspace)
            pythons.append(args.mergekit_python)
        print_facts(args.work_dir, pythons=pythons)
        models = [
            workspace.checkpoint(
                f"{args.preset}-{name}", "llama", "--preset", args.preset, "--seed", str(seed)
            )
            for seed, name in enumerate("abc")
        ]
        recipe = workspace.scratch("mergekit.yaml")
        mergekit_command.write_recipe(recipe, models, WEIGHTS)
        samples = measure_all(
            contestants(args, models, recipe),
            caches=caches,
            rounds=args.rounds,
            models=models,
            output=workspace.scratch("merged"),
            filler=Filler(workspace.scratch("filler")),
        )
    print_report(samples)
    write_csv(args.csv, [asdict(sample) for sample in samples])


if __name__ == "__main__":
    main()
