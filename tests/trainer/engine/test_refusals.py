from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinodit.models.errors import ConfigError, MissingExtraError
from kinodit.trainer.config import load_config
from kinodit.trainer.engine.config import DeepSpeedConfig, MegatronConfig, NativeConfig
from kinodit.trainer.engine.refusals import Wish, check_wish, refusal
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.optim.config import MuonConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig

PLAIN = Wish(
    NativeConfig(), OptimConfig(), ParallelConfig(), PrecisionConfig(), RematConfig(), world_size=4
)
BF16 = PrecisionConfig(compute="bfloat16")


def zero(**settings: Any) -> Wish:
    return replace(PLAIN, engine=DeepSpeedConfig(**settings))


def megatron(**settings: Any) -> Wish:
    return replace(PLAIN, engine=MegatronConfig(**settings))


DISTRIBUTED = megatron(data_parallel="distributed_optimizer")


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (replace(zero(stage=0), precision=BF16), "off by a tenth"),
        (zero(stage=0), "the native engine does"),
        (replace(zero(), parallel=ParallelConfig(dp_replicate=2)), "dp_replicate=1"),
        (replace(zero(), parallel=ParallelConfig(cpu_offload=True)), "engine.offload_optimizer"),
        (zero(compile=True), "engine.compile=false"),
        (zero(stage=2, hpz=2), "engine.stage=3"),
        (zero(stage=1, offload_params="cpu"), "engine.stage=3"),
        (replace(zero(stage=3, hpz=2), parallel=ParallelConfig(tp=2)), "those are tp ranks"),
        (zero(stage=3, hpz=3), "does not divide the 4 ranks"),
        (zero(stage=3, offload_optimizer="nvme"), "set engine.nvme_path"),
        (zero(stage=2, offload_params="nvme", nvme_path="/disk"), "engine.stage=3"),
        (zero(offload_optimizer="cpu", nvme_path="/disk"), "nothing is offloaded there"),
        (
            zero(
                offload_optimizer="nvme",
                nvme_path="/disk",
                extra={"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ),
            "offload_optimizer.device=nvme contradicts cpu",
        ),
        (zero(extra={"gradient_clipping": 1.0}), "contradicts 0.0"),
        (zero(extra={"zero_optimization": {"stage": 3}}), "zero_optimization.stage=3 contradicts"),
        (zero(extra={"optimizer": {"type": "Adam"}}), "section optim decides that"),
        (zero(extra={"data_efficiency": {"enabled": True}}), "section data decides that"),
        (zero(extra={"prescale_gradients": True}), "contradicts False"),
        (zero(extra={"wall_clock_breakdwn": True}), "no such key that a recipe may pass on"),
        (zero(extra={"data_types": {"param_dtype": "fp16"}}), "no such key"),
        (zero(extra={"progressive_layer_drop": {"enabled": True}}), "no such key"),
        (
            zero(extra={"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}),
            "set engine.offload_optimizer",
        ),
        (zero(stage=3, extra={"zero_optimization": {"mics_shard_size": 2}}), "what is partitioned"),
        (
            zero(extra={"zero_optimization": {"zero_quantized_weights": True}}),
            "zero_quantized_weights=True contradicts",
        ),
        (
            replace(zero(stage=3, hpz=2), parallel=ParallelConfig(ep=2)),
            "which have different experts; set engine.hpz=1",
        ),
        (
            replace(
                zero(stage=1, extra={"zero_optimization": {"contiguous_gradients": False}}),
                parallel=ParallelConfig(ep=2),
            ),
            "which have different experts; leave it out",
        ),
        (zero(extra={"expert_parallel": {"enabled": True}}), "parallel.ep decides that"),
        (megatron(bucket_numel=7), "engine.data_parallel=distributed_optimizer"),
        (megatron(overlap=False), "always overlaps"),
        (replace(DISTRIBUTED, parallel=ParallelConfig(dp_replicate=2)), "dp_replicate=1"),
        (replace(DISTRIBUTED, parallel=ParallelConfig(ep=2)), "parallel.ep=1"),
        (replace(DISTRIBUTED, parallel=ParallelConfig(cpu_offload=True)), "cpu_offload=false"),
        (replace(DISTRIBUTED, optim=MuonConfig()), "optim.name=adamw"),
        (
            replace(DISTRIBUTED, precision=replace(BF16, reduce="bfloat16")),
            "precision.reduce=float32",
        ),
    ],
)
def test_refused_with_the_reason_and_what_to_change(wish: Wish, reason: str) -> None:
    assert reason in refusal(wish)
    with pytest.raises(ConfigError, match="engine"):
        check_wish(wish)


@pytest.mark.parametrize(
    "wish",
    [
        PLAIN,
        *(zero(stage=stage) for stage in (1, 2, 3)),
        zero(stage=3, hpz=2, offload_params="cpu"),
        zero(stage=3, offload_params="nvme", offload_optimizer="nvme", nvme_path="/disk"),
        zero(extra={"zero_optimization": {"reduce_bucket_size": 1000}}),
        zero(extra={"wall_clock_breakdown": True, "comms_logger": {"enabled": True}}),
        zero(extra={"gradient_clipping": 0.0}),
        zero(
            offload_optimizer="cpu",
            extra={"zero_optimization": {"offload_optimizer": {"buffer_count": 5}}},
        ),
        replace(zero(stage=3), parallel=ParallelConfig(cp=2, tp=2), precision=BF16),
        *(replace(zero(stage=stage), parallel=ParallelConfig(ep=2)) for stage in (1, 2, 3)),
        zero(stage=2, extra={"zero_optimization": {"contiguous_gradients": False}}),
        replace(megatron(), parallel=ParallelConfig(ep=2)),
        replace(DISTRIBUTED, parallel=ParallelConfig(cp=2, tp=2), precision=BF16),
        megatron(data_parallel="distributed_optimizer", bucket_numel=7, overlap=False),
    ],
)
def test_what_works_is_not_refused(wish: Wish) -> None:
    assert refusal(wish) == ""


@pytest.mark.parametrize("engine", [DeepSpeedConfig(), MegatronConfig()])
def test_a_missing_library_says_how_to_get_it(
    engine: DeepSpeedConfig | MegatronConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'kinodit\[{engine.name}\]'"):
        check_wish(replace(PLAIN, engine=engine))
    check_wish(PLAIN)


def test_the_name_selects_the_settings_of_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("engine: {name: deepspeed, stage: 3, micro_batches: 1}\n")
    assert load_config(path).engine == DeepSpeedConfig(stage=3, micro_batches=1)
    assert load_config(path, ["engine.extra={steps_per_print: 7}"]).engine == DeepSpeedConfig(
        stage=3, micro_batches=1, extra={"steps_per_print": 7}
    )
    with pytest.raises(ConfigError, match="deepspeed, megatron, native"):
        load_config(path, ["engine.name=fairscale"])
    path.write_text("engine: {stage: 3}\n")
    with pytest.raises(ConfigError, match="stage"):
        load_config(path)
