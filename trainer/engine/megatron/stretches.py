"""What megatron-core's distributed optimizer keeps on a rank, and how it is told to go on.

Parameters lie behind each other in a buffer, the last ones first, which is cut into buckets, and
each bucket into equal stretches: a rank reduces, updates and sends out its own. The names of
attributes are megatron-core's own business and move with its versions; they are read here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kinodit.trainer.engine.megatron.core import DistributedDataParallel, DistributedOptimizer
from kinodit.trainer.engine.megatron.elsewhere import named_as_cuda
from kinodit.trainer.engine.partitioned import Place
from kinodit.trainer.engine.spans import Span, overlap


class Stretches:
    """Implements `Partitions`: a group for each parameter, empty where the rank has none of it."""

    def __init__(
        self,
        parallel: DistributedDataParallel,
        optimizer: DistributedOptimizer,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of masters."""
        self._parallel, self._optimizer = parallel, optimizer
        self._device, self._dtype = device, dtype
        _leave_history(optimizer)
        self._parameters = dict(model.named_parameters())
        spans = {
            parameter: _spans(buffer, *found)
            for buffer in parallel.buffers
            for parameter, found in buffer.param_index_map.items()
        }
        self.places: dict[str, Place] = {}
        for name, parameter in self._parameters.items():
            all_spans = spans[parameter]
            own = all_spans[parallel.dp_cp_group.rank()]
            self.places[name] = Place(name, 0, own, all_spans)
        masters = _by_parameter(optimizer)
        self._masters = {
            name: masters.get(id(parameter), parameter.new_empty(0, dtype=dtype))
            for name, parameter in self._parameters.items()
        }
        for name, place in self.places.items():
            assert self._masters[name].numel() == place.own[1] - place.own[0], name

    def masters(self) -> dict[str, Tensor]:
        """See `Partitions`."""
        return dict(self._masters)

    def gradients(self) -> dict[str, Tensor]:
        """See `Partitions`."""
        parameters: Mapping[str, Any] = self._parameters
        return {
            name: parameters[name].main_grad.view(-1)[slice(*place.own)]
            for name, place in self.places.items()
        }

    def drop_gradients(self) -> None:
        """See `Partitions`."""
        self._parallel.zero_grad_buffer()

    def finish(self) -> None:
        """Wait for gathers that are still on their way."""
        for group in self._parallel.bucket_groups:
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """See `Partitions`."""
        self.finish()
        self._optimizer._copy_main_params_to_model_params()
        self._parallel.start_param_sync(force_sync=True)

    def update(self) -> None:
        """Masters from gradients, and parameters from masters; both gradients are dropped."""
        with named_as_cuda(self._device, self._dtype):
            self._optimizer.prepare_grads()
        self._optimizer.step_with_ready_grads()
        self._optimizer.zero_grad()
        self.drop_gradients()


def _spans(buffer: Any, start: int, stop: int, bucket: int) -> tuple[Span, ...]:
    """Each rank's span of the parameter at [start, stop) of a buffer, in a bucket of it."""
    first, size = buffer.bucket_indices[bucket][0], buffer.bucket_indices[bucket][1]
    num_ranks = buffer.data_parallel_world_size
    share = (size - first) // num_ranks
    found = []
    for rank in range(num_ranks):
        own = overlap((start, stop), (first + rank * share, first + (rank + 1) * share))
        found.append((own[0] - start, own[1] - start) if own[1] > own[0] else (0, 0))
    return tuple(found)


def _leave_history(optimizer: DistributedOptimizer) -> None:
    """Let stretches be no views of parameters to autograd: both are written to, each by itself."""
    groups = optimizer.optimizer.param_groups
    for group, own, narrow in zip(
        groups, optimizer.shard_fp32_groups, optimizer.shard_fp32_from_float16_groups, strict=True
    ):
        own[:] = [stretch.detach() for stretch in own]
        group["params"] = [*own, *narrow]


def _by_parameter(optimizer: DistributedOptimizer) -> dict[int, Tensor]:
    """id of a parameter -> its stretch here, as the optimizer updates it."""
    pairs = (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    )
    return {
        id(parameter): stretch
        for models, stretches in pairs
        for parameters, own in zip(models, stretches, strict=True)
        for parameter, stretch in zip(parameters, own, strict=True)
    }
