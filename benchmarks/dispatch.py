"""What ranks receive when tokens travel to their experts, and the least that it takes."""

from __future__ import annotations

import torch

from kinodit.models.moe.experts import Experts
from kinodit.trainer.parallel.expert import EXPERTS, ExpertExchange
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.traffic import Traffic

NUM_EXPERTS, ROWS, WIDTH = 8, 600, 32


def dispatch(rank: int, world_size: int) -> tuple[int, int]:
    """(bytes received, least) of this rank, for rows that a skewed router gave out."""
    mesh = build_mesh(ParallelConfig(ep=world_size), world_size, rank, torch.device("cpu"))
    assert mesh.expert_mesh is not None
    source = torch.Generator().manual_seed(rank)
    chances = torch.linspace(1, 3, NUM_EXPERTS)
    chosen = [
        torch.multinomial(chances, ROWS, True, generator=torch.Generator().manual_seed(r))
        for r in range(world_size)
    ]
    counts = torch.stack([torch.bincount(one, minlength=NUM_EXPERTS) for one in chosen])
    x = torch.randn(ROWS, WIDTH, generator=source).requires_grad_()
    experts = Experts(NUM_EXPERTS // world_size, WIDTH, 64, "silu", bias=False)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    with Traffic() as traffic:
        made, _ = ExpertExchange(mesh.expert_mesh.get_group("ep"))(experts, x, counts[rank])
        made.backward(torch.randn_like(made))  # type: ignore[no-untyped-call]
    by_owner = counts.view(world_size, world_size, -1).sum(-1)
    others = [r for r in range(world_size) if r != rank]
    arriving = sum(int(by_owner[r, rank]) for r in others)
    returning = sum(int(by_owner[rank, r]) for r in others)
    # Inputs come and results return; in the backward their gradients do.
    return traffic.total(EXPERTS)[1], 2 * (arriving + returning) * WIDTH * x.itemsize
