"""Distributed checkpoints by four processes, as programs that train write them.

    python -m tests.support.dcp_ranks FOLDER

Makes a folder for each way of distributing a model, and beside it `NAME.bin`, joined by torch.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

NUM_RANKS = 4
SHAPES = {"a": (7, 10), "b": (6,), "c": (3, 5, 4), "d": (1, 3), "e": (129, 33)}
PLACEMENTS = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "both": (Shard(0), Shard(1)),
    "nested": (Shard(0), Shard(0)),
    "whole": (Replicate(), Replicate()),
}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=number == 0) for number in range(3)])
        self.norm = nn.BatchNorm1d(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def _save_placed(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for way, placements in PLACEMENTS.items():
        generator = torch.Generator().manual_seed(len(way))
        state = {}
        for name, shape in SHAPES.items():
            full = torch.randn(shape, generator=generator)
            full = full.bfloat16() if name == "e" else full
            fitting = [
                each if each.is_replicate() or each.dim < len(shape) else Replicate()
                for each in placements
            ]
            state[name] = distribute_tensor(full, mesh, fitting)
        state["step"] = torch.tensor(3)
        dcp.save({"model": state, "epoch": 2}, checkpoint_id=str(folder / way))


def _save_fsdp(folder: Path) -> None:
    torch.manual_seed(0)
    net = _Net()
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.arange(8)).square().sum().backward()
    optimizer.step()
    model, optim = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=str(folder / "fsdp"))
    # As torchtitan: the model's tensors at the top.
    dcp.save({**model, "optimizer": optim}, checkpoint_id=str(folder / "flat"))


def _run(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    torch.set_num_threads(1)
    _save_placed(folder)
    _save_fsdp(folder)
    dist.destroy_process_group()


def main() -> None:
    """Make all of them."""
    folder = Path(sys.argv[1])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    mp.spawn(_run, (folder,), nprocs=NUM_RANKS)
    for name in (*PLACEMENTS, "fsdp", "flat"):
        dcp_to_torch_save(str(folder / name), folder / f"{name}.bin")


if __name__ == "__main__":
    main()
