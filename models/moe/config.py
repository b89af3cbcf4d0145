"""Which feed-forwards are mixtures of experts, and how tokens find theirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinodit.models.errors import ConfigError


@dataclass(frozen=True)
class RouterConfig:
    """Which experts a token goes to, and what each of them counts.

    kind:        "token": scores are a linear map of the token (Shazeer et al., arXiv 1701.06538);
                 "timestep": of the activated embedding of the token's noise level, so that all
                 tokens of one level have the same experts (Switch-DiT, arXiv 2403.09176, section
                 3.2, which does not renormalise);
                 "noise_level": expert i has the tokens of noise level t in [i / E, (i + 1) / E)
                 (one expert per range of noise, as in eDiff-I, arXiv 2211.01324); "modality":
                 expert i has the tokens of stream i, in blocks that all streams share
                 (modality-aware sparsity, arXiv 2411.04996)
    scores:      softmax over the experts, or sigmoid of each
    renormalise: divide the chosen experts' scores by their sum; not with top_k = 1, whose gates
                 would all be 1, so that a router learned from auxiliary losses alone
    scale:       multiplies what the experts give
    balance:     "loss": an auxiliary loss; "bias": no loss, but a correction of the scores by which
                 experts are chosen (Wang et al., arXiv 2408.15664); "none"
    loss_weight: of the auxiliary loss
    bias_rate:   by how much a step moves the correction of each expert
    z_weight:    of the mean squared log-sum-exp of the logits (Zoph et al., arXiv 2202.08906,
                 equation 5)
    """

    kind: Literal["token", "timestep", "noise_level", "modality"] = "token"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    balance: Literal["loss", "bias", "none"] = "loss"
    loss_weight: float = 0.01
    bias_rate: float = 0.001
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if min(self.loss_weight, self.bias_rate, self.z_weight) < 0 or self.scale <= 0:
            raise ConfigError(
                f"router: loss_weight = {self.loss_weight}, bias_rate = {self.bias_rate} and "
                f"z_weight = {self.z_weight} must not be negative, scale = {self.scale} positive"
            )

    @property
    def is_learned(self) -> bool:
        """Whether there is anything to learn; otherwise the place of a token decides alone."""
        return self.kind in ("token", "timestep")

    @property
    def is_by_noise(self) -> bool:
        """Whether the noise level of a token decides alone."""
        return self.kind in ("timestep", "noise_level")


@dataclass(frozen=True)
class ExpertsConfig:
    """A pool of experts in place of one feed-forward, in each of `blocks`.

    num_experts:  E
    top_k:        experts that a token goes to
    expert_ratio: hidden width of one expert over the model's width, as `model.mlp_ratio`; many
                  narrow experts are fine-grained ones (Dai et al., arXiv 2401.06066, section 3.1)
    shared_ratio: the same of an expert that every token goes to besides (section 3.2); 0: none
    blocks:       indices of the blocks; empty: all that have a feed-forward
    """

    num_experts: int = 8
    top_k: int = 2
    expert_ratio: float = 2.0
    shared_ratio: float = 0.0
    blocks: tuple[int, ...] = ()
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"experts: top_k = {self.top_k} must lie between 1 and num_experts = "
                f"{self.num_experts}"
            )
        if self.expert_ratio <= 0 or self.shared_ratio < 0:
            raise ConfigError(
                f"experts: expert_ratio = {self.expert_ratio} must be positive, shared_ratio = "
                f"{self.shared_ratio} not negative"
            )
        if not self.router.is_learned and self.top_k != 1:
            raise ConfigError(
                f"experts: router.kind = {self.router.kind} gives each token one expert, but "
                f"top_k = {self.top_k}: set it to 1"
            )
        if self.router.is_learned and self.top_k == 1 and self.router.renormalise:
            raise ConfigError(
                "experts: top_k = 1 with router.renormalise = true makes every gate 1, so that no "
                "loss of the model's output reaches the router: set router.renormalise = false, or "
                "top_k = 2"
            )

    def is_in(self, block: int) -> bool:
        """Whether block number `block` has the experts."""
        return not self.blocks or block in self.blocks
