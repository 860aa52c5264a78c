"""Experts spread over processes, everything else under DDP: every process trains on its own tokens, as one model.

torchrun --nproc-per-node 2 examples/expert_parallel.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import sparseffn
from sparseffn.ffn import BatchGroup, replicate_rest, set_batch_group, shard_experts


def main(steps: int = 40) -> None:
    """Learn a fixed function of random tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh, rank = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("ep",)), dist.get_rank()
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(32, 32), nn.Tanh()).to(device)
    model = nn.Sequential(nn.LayerNorm(32), sparseffn.SigmaMoE(d_model=32, n_experts=8, expert_size=32, k=2)).to(device)
    sharded = shard_experts(model, mesh)
    set_batch_group(model, BatchGroup(even=True))
    wrapped = replicate_rest(model)
    named = dict(model.named_parameters())
    experts, rest = [named[n] for n in sharded], [p for n, p in named.items() if n not in sharded]
    optimizer = torch.optim.Adam([{"params": experts}, {"params": rest}], lr=3e-3)
    tokens = torch.Generator(device).manual_seed(rank)
    for step in range(steps):
        x = torch.randn(256, 32, device=device, generator=tokens)
        with sparseffn.collect_stats(model) as stats:
            loss = (wrapped(x) - target(x)).square().mean()
        optimizer.zero_grad()
        (loss + stats.balance_loss).backward()
        clip(experts, rest, most=1.0)
        optimizer.step()
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, tokens of each expert {stats['1'][0].counts.tolist()}")


@torch.no_grad()
def clip(experts: list[nn.Parameter], rest: list[nn.Parameter], most: float) -> None:
    """Clip by the norm of all gradients; PyTorch does it for sharded and for whole ones apart."""
    parts = [[p.grad for p in part if p.grad is not None] for part in (experts, rest)]
    norms = [torch.nn.utils.get_total_norm(part) for part in parts]
    whole = torch.stack([norms[0].full_tensor(), norms[1]]).norm()
    for grad in (*parts[0], *parts[1]):
        grad.mul_((most / whole).clamp(max=1.0).item())


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.barrier()
    dist.destroy_process_group()
