"""LoRA adapters merged into a base: shardmix beside PEFT's merge_and_unload, and a plain merge.

The plain merge is a linear one of the base's bytes alone. Warm, by turns, nobody forces files to
disk; whole processes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.by_turns import Way, by_turns, print_ways
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.tables import Row
from benchmarks.lib.workspace import Workspace, benchmark

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAKE = """
import json, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
base, folder, rank, seed, names = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:5]), sys.argv[5:]
torch.manual_seed(seed)
tensors = {}
for path in base.glob("*.safetensors"):
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in names:
                rows, columns = file.get_slice(name).get_shape()
                start = f"base_model.model.{module}.lora_"
                tensors[f"{start}A.weight"] = (torch.randn(rank, columns) / 50).bfloat16()
                tensors[f"{start}B.weight"] = (torch.randn(rows, rank) / 50).bfloat16()
folder.mkdir()
save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
config |= {"target_modules": names, "base_model_name_or_path": str(base)}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, output, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapters[0]).merge_and_unload()
model.save_pretrained(output)
"""


def adapters(args: argparse.Namespace, workspace: Workspace, base: Path) -> list[Path]:
    """Make the adapters that are not there yet."""
    found = []
    for seed in range(args.adapters):
        folder = workspace.lasting(f"rank-{args.rank}-{seed}")
        if not folder.exists():
            words = [base, folder, str(args.rank), str(seed), *PROJECTIONS]
            run_or_exit([workspace.python("shardmix"), "-c", MAKE, *words])
        found.append(folder)
    return found


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[Sequence[Row], bool]:
    """Measure everything, and print."""
    base = workspace.checkpoint(f"{args.preset}-a", args.preset)
    (copy,) = workspace.linked_copies([base], args.preset, 1)
    made, output = adapters(args, workspace, base), workspace.scratch("merged")
    shardmix = [workspace.python("shardmix"), "-m", "shardmix", "merge"]
    rest = ["-o", str(output), "--no-fsync", "--json", "--quiet"]
    share = 1 / len(made)
    several = [f"{base}+{each}={share}" for each in made]
    peft, models = [workspace.python("peft"), "-c", PEFT], [base, *made]
    ways = {
        "shardmix, the base alone": Way([*shardmix, f"{base}=1", f"{copy}=0", *rest], models),
        "shardmix, an adapter": Way([*shardmix, f"{base}+{made[0]}", *rest], models),
        f"shardmix, {len(made)} adapters": Way([*shardmix, *several, *rest], models),
        "PEFT, an adapter": Way([*peft, base, output, made[0]], models),
    }
    rows = by_turns(ways, output, args.rounds)
    print_ways(rows, "best / best alone")
    return rows, True


if __name__ == "__main__":
    benchmark(
        measure,
        environments=("shardmix", "peft"),
        preset=("llama-1b", "shape of the base"),
        rank=(16, "of the adapters"),
        adapters=(8, "merged at once"),
        rounds=(5, "of each"),
        csv=(Path("adapters.csv"), "raw figures"),
    )
