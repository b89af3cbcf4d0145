"""Rows to their experts and back by megatron-core's token dispatchers.

A dispatcher takes tokens and a map of the experts that each goes to, sorts them by expert, sends
them to the ranks that have these, and brings results back. Here every row is a token that goes to
one expert and counts 1: which rows there are, and what they count, the model has decided before.

`alltoall` is an exchange between all ranks, and runs anywhere (`elsewhere`); `flex` leaves it to
the kernels of DeepEP, which need CUDA.

Shape legend: E experts, R rows here, d width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.experts import Beside
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.core import (
    ProcessGroupCollection,
    TransformerConfig,
    token_dispatcher,
)
from kinodit.trainer.parallel.mesh import Mesh


@dataclass(frozen=True)
class TokenDispatch:
    """Implements `ExpertOp` where the ranks of `group` have the experts between them.

    dispatchers: megatron-core's, by E; each keeps what it needs between a dispatch and a combine
    """

    kind: Literal["alltoall", "flex"]
    group: ProcessGroup
    dispatchers: dict[int, Any] = field(default_factory=dict)

    def __call__(
        self, experts: nn.Module, x: Tensor, counts: Tensor, beside: Beside | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `ExpertOp`. Collective over the ranks of the group, with any rows or none.

        The host waits for counts. What is computed beside comes after rows were sent.
        """
        dispatcher = self._dispatcher(len(counts))
        number = torch.arange(len(counts), device=counts.device)
        owner = torch.repeat_interleave(number, counts, output_size=len(x))
        chosen = owner.unsqueeze(1) == number
        sent, ones = dispatcher.dispatch_preprocess(x, chosen, chosen.to(torch.float32))
        came, ones = dispatcher.token_dispatch(sent, ones)
        made_beside = None if beside is None else beside()
        rows, arrived, _ = dispatcher.dispatch_postprocess(came, ones)
        made = experts(rows, arrived.to(x.device, non_blocking=True))
        back = dispatcher.token_combine(dispatcher.combine_preprocess(made))
        out: Tensor = dispatcher.combine_postprocess(back)
        return out, made_beside

    def _dispatcher(self, num_experts: int) -> Any:
        if num_experts not in self.dispatchers:
            degree, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
            own = num_experts // degree
            kinds = {
                "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
                "flex": token_dispatcher.MoEFlexTokenDispatcher,
            }
            self.dispatchers[num_experts] = kinds[self.kind](
                own,
                list(range(rank * own, (rank + 1) * own)),
                TransformerConfig(
                    num_layers=1,
                    hidden_size=1,
                    num_attention_heads=1,
                    num_moe_experts=num_experts,
                    moe_ffn_hidden_size=1,
                    moe_router_topk=1,
                    moe_router_pre_softmax=True,
                    moe_token_dispatcher_type=self.kind,
                    add_bias_linear=False,
                    cuda_graph_scope=[],
                ),
                # tp ranks see the same rows, and have parts of the same experts.
                ProcessGroupCollection(ep=self.group, tp_ep=self.group, expt_tp=None),
            )
        return self.dispatchers[num_experts]


def use_dispatcher(model: nn.Module, mesh: Mesh, engine: MegatronConfig) -> None:
    """Let a dispatcher of the library take rows to experts of a laid out model, if asked to."""
    if engine.dispatcher != "own":
        assert isinstance(model, MMDiT) and mesh.expert_mesh is not None
        # Its own calls, by names that torch has given up.
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
        model.apply_experts = TokenDispatch(engine.dispatcher, mesh.expert_mesh.get_group("ep"))
