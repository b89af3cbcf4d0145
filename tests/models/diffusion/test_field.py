from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kinodit.models.diffusion.field import velocity_field
from kinodit.models.diffusion.objective import RectifiedFlowConfig, build_objective
from kinodit.models.diffusion.samplers import sample, time_grid
from kinodit.models.random import generator, normal
from kinodit.models.tokens import Role, TokenBatch
from tests.support.packs import Part, Sample, build_pack, clean, noised


def test_a_network_that_knows_the_data_generates_it_and_clean_tokens_stay() -> None:
    frame = Part([Role.CLEAN] * 3 + [Role.NOISED] * 5, levels=[1] * 3 + [0] * 5)
    batch = build_pack(
        [
            Sample("a", {"video": frame, "text": clean(2)}, level_t=(1.0, 0.0)),
            Sample("b", {"video": noised(4), "text": clean(1)}, level_t=(1.0,)),
        ],
        {"text": 3, "video": 6},
    )
    data = batch.modalities["video"].latents
    levels: list[list[float]] = []

    def network(seen: TokenBatch) -> Mapping[str, Tensor]:
        levels.append(seen.level_t.tolist())
        assert torch.equal(seen.modalities["video"].latents[:3], data[:3])
        assert torch.equal(seen.modalities["text"].latents, batch.modalities["text"].latents)
        return {"video": torch.where(is_noised, data, torch.full_like(data, 7.0))}

    is_noised = (batch.modalities["video"].role == Role.NOISED).unsqueeze(-1)
    objective = build_objective(RectifiedFlowConfig(prediction="x0"))
    noise = normal(generator("noise"), (12, 6))
    start = {"video": torch.where(is_noised, noise, data)}
    out = sample(velocity_field(network, objective, batch), start, time_grid(2))["video"]
    assert torch.equal(out[:3], data[:3])
    torch.testing.assert_close(out, data, rtol=1e-5, atol=1e-5)
    assert levels == [[1.0, 0.0, 1.0], [0.5, 0.0, 0.5]]
