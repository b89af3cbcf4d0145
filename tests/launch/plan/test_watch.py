"""The counter that plans are held to is held to torch's own, and to hooks on kept tensors."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from kinodit.launch.plan.activations import MODES
from kinodit.launch.plan.measure import families, pretended_pack, squared_error
from kinodit.launch.plan.watch import Watch
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.parallel.apply import model_blocks
from kinodit.trainer.parallel.deferred import initial_values, materialize
from kinodit.trainer.parallel.remat import RematConfig, apply_remat
from tests.support.quick import quick
from tests.support.ranks import Ranks

MAX_DIFFERENCE = 0.02
"""Of the most bytes at once: torch's tracker lets go of one tensor of a block later."""
MAX_KEPT_DIFFERENCE = 0.005
"""Of what is kept: a loss, and what the model derives from the batch."""
WORKLOAD = families()["next_dit"]


def model_under(mode: str) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(WORKLOAD.model)
    apply_remat(RematConfig(mode), model_blocks(model))  # type: ignore[arg-type]
    materialize(model, initial_values(0), torch.device("cpu"))
    return model


def storage_bytes(model: MMDiT) -> int:
    storages = {
        p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()
    }
    return sum(storages.values())


@pytest.mark.parametrize("mode", quick(MODES, "none"))
def test_the_most_at_once_is_what_torch_s_tracker_says(mode: str) -> None:
    """A forward and backward with its gradients, under each policy of recomputation."""
    batch = pretended_pack(WORKLOAD)
    model = model_under(mode)
    watch = Watch()
    watch.leave_out(model.parameters())
    with watch:
        squared_error(model(batch)).backward()
    again = model_under(mode)
    tracker = MemTracker()
    tracker.track_external(again)
    with tracker:
        squared_error(again(batch)).backward()
    totals = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    theirs = totals["Total"] - storage_bytes(again)
    assert watch.peak() == pytest.approx(theirs, rel=MAX_DIFFERENCE)


def test_what_is_kept_is_what_hooks_on_kept_tensors_see() -> None:
    """At the end of a forward that recomputes nothing."""
    batch = pretended_pack(WORKLOAD)
    model = model_under("none")
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    given = [tokens.latents for tokens in batch.modalities.values()]
    known |= {x.untyped_storage()._cdata for x in (*given, *batch.conditions.values())}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    watch = Watch()
    watch.leave_out(model.parameters())
    with watch, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = squared_error(model(batch))
        level = watch.level()
    total = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)
    assert loss.requires_grad
    assert level == pytest.approx(total, rel=MAX_KEPT_DIFFERENCE)


def most_while_sending(rank: int, world_size: int, count: int, num_messages: int) -> int:
    """The most bytes at once, of messages that nobody keeps; `count` numbers in each."""
    watch = Watch()
    with watch:
        for _ in range(num_messages):
            dist.all_to_all_single(torch.empty(count), torch.ones(count))
    return watch.peak()


@pytest.mark.gloo
def test_what_was_sent_counts_no_longer_than_it_is_held() -> None:
    """Threads that send let go of a message when they can, which must not decide a peak."""
    with closing(Ranks(2)) as ranks:
        assert ranks.run(most_while_sending, 1000, 100) == [2 * 4000] * 2
