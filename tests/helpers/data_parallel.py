"""A quantization-aware training by several processes; prints its losses.

Run as `python -m helpers.data_parallel FILE WORLD RANK`, FILE a new one, in which the processes meet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import nn

import bitmill
from helpers.tiny_models import tiny_model

STEPS = 6
IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(5))


def alone(model: nn.Module) -> nn.Module:
    """Return a model as it is."""
    return model


def replicated(model: nn.Module) -> nn.Module:
    """Return a model whose gradients are averaged over the processes."""
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    """Return a model of whose tensors each process holds a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def losses(wrap: Callable[[nn.Module], nn.Module], world: int = 1, rank: int = 0) -> list[float]:
    """Train on this process's share of every batch; return the mean losses over all processes."""
    model = wrap(bitmill.prepare_qat(tiny_model("llama"), "rtn", bits=2, group_size=32).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    found = []
    for _ in range(STEPS):
        share = IDS[rank::world]
        loss = model(input_ids=share, labels=share).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        if world > 1:
            torch.distributed.all_reduce(mean)
        found.append(mean.item())
    return found


def main() -> None:
    """Print the losses of the replicated and of the sharded model."""
    file, world, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {wrap.__name__: losses(wrap, world, rank) for wrap in (replicated, sharded)}
    print(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
