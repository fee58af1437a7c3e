"""A peer on the same nets: PyTorch's own FSDP with parameters, gradients and optimizer on the host.

Run on a machine with a GPU: EDGETRAIN_DATA=... python benchmarks/peers/fsdp.py [--depths 2,8,32] [--width 1000]

Every layer is a unit of its own (``fully_shard`` with ``CPUOffloadPolicy``), the leanest form there is; Adam steps
on the host. Beside it backpropagation, its remedies and Mono-Forward by ``edgetrain profile``, measured on the same
device. Reserved memory is what PyTorch's allocator took at most.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from reporting import edgetrain, publish

_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", default="2,8,32")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--try-on-cpu", action="store_true", help="See whether it runs; the CPU's figures mean nothing."
    )
    parser.add_argument("--out")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.try_on_cpu:
        raise SystemExit("no CUDA device on this machine: there is nothing to compare")
    device = "cpu" if asked.try_on_cpu else "cuda"
    with_group(device)
    rows = [sharded(device, int(depth), asked.width, asked.batch_size) for depth in asked.depths.split(",")]
    flags = f"--data mnist --depths {asked.depths} --widths {asked.width} --batch-size {asked.batch_size}"
    found = edgetrain(f"profile {flags} --device {device} --methods mf,bp,bp-checkpoint,bp-offload")
    rows += [
        {"method": row["method"], "depth": row["depth"], "reserved MiB": row["peak_mb"], "s/step": None}
        for row in found["rows"]
    ]
    publish(asked.out, "FSDP with everything on the host, beside edgetrain", {"Peak of the device": rows})


def with_group(device: str) -> None:
    """A process group of one."""
    import torch.distributed as dist

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def sharded(device: str, depth: int, width: int, batch: int) -> dict[str, Any]:
    """Peak and time of a net of which one layer at a time is on the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device, (1,))
    policy = CPUOffloadPolicy() if device == "cuda" else OffloadPolicy()
    sizes = [784, *[width] * depth]
    layers = [nn.Sequential(nn.Linear(*pair, bias=False), nn.ReLU()) for pair in pairwise(sizes)]
    net = nn.Sequential(*layers, nn.Linear(width, 10, bias=False))
    for part in (*net, net):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    optimizer = torch.optim.Adam(net.parameters())
    x, y = torch.rand(batch, 784, device=device), torch.randint(10, (batch,), device=device)
    began = 0.0
    for step in range(_STEPS + 1):
        if step == 1:  # the first makes the optimizer's state
            began = time.perf_counter()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    reserved = None
    if device == "cuda":
        torch.cuda.synchronize()
        reserved = torch.cuda.max_memory_reserved() / (1 << 20)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = (time.perf_counter() - began) / _STEPS
    return {"method": "fsdp, on the host", "depth": depth, "reserved MiB": reserved, "s/step": seconds}


if __name__ == "__main__":
    main()
