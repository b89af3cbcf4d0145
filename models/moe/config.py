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
    choice:      "token": each token chooses `top_k` experts; "expert": each expert chooses the
                 top_k N / E tokens of a sample's N that score highest, so that a token may have any
                 number of experts (Zhou et al., arXiv 2202.09368, section 3.2; within a sample, as
                 EC-DiT, arXiv 2410.02098). With kind = "token"
    capacity_factor: a token's choices beyond `capacity_factor` top_k N / E of a sample's N tokens
                 for one expert are dropped, those that score lowest (Riquelme et al., "batch
                 prioritized routing", arXiv 2106.05974, section 4.1); 0: none is. With kind =
                 "token"
    hidden_ratio: hidden units of the router over its inputs, between which GELU stands; 0: none, a
                 linear map. 2 with kind = "timestep" is MoDE's (arXiv 2412.12953, section 3.2)
    draw:        in training, draw the experts by their scores, without putting back, instead of
                 taking the best (MoDE): one draw for each sample. With kind = "timestep"
    scores:      softmax over the experts, or sigmoid of each
    renormalise: divide the chosen experts' scores by their sum. With top_k = 1 gates are then all
                 1, and a router learns from its auxiliary losses alone: there must be one
    scale:       multiplies what the experts give
    balance:     "loss": an auxiliary loss; "bias": no loss, but a correction of the scores by which
                 experts are chosen (Wang et al., arXiv 2408.15664); "prior": the diffusion prior
                 loss with its matching (Switch-DiT, arXiv 2403.09176, sections 3.3 and 3.4), with
                 kind = "timestep"; "none"
    loss_weight: of the auxiliary loss; 1 in Switch-DiT
    bias_rate:   by how much a step moves the correction of each expert
    z_weight:    of the mean squared log-sum-exp of the logits (Zoph et al., arXiv 2202.08906,
                 equation 5)
    """

    kind: Literal["token", "timestep", "noise_level", "modality"] = "token"
    choice: Literal["token", "expert"] = "token"
    capacity_factor: float = 0.0
    hidden_ratio: float = 0.0
    draw: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    balance: Literal["loss", "bias", "prior", "none"] = "loss"
    loss_weight: float = 0.01
    bias_rate: float = 0.001
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = self.loss_weight, self.bias_rate, self.z_weight, self.hidden_ratio
        if min(weights) < 0 or self.scale <= 0:
            raise ConfigError(
                f"router: loss_weight = {self.loss_weight}, bias_rate = {self.bias_rate}, "
                f"z_weight = {self.z_weight} and hidden_ratio = {self.hidden_ratio} must not be "
                f"negative, scale = {self.scale} positive"
            )
        if self.kind != "timestep" and (self.draw or self.balance == "prior"):
            asked = "draw = true" if self.draw else "balance = prior"
            raise ConfigError(
                f"router.{asked} is for experts that the noise level decides, but router.kind = "
                f"{self.kind}: set router.kind = timestep"
            )
        if self.draw and self.balance == "bias":
            raise ConfigError(
                "router.draw = true draws by logarithms of scores, which balance = bias corrects "
                "as they are: set router.balance = loss, prior or none"
            )
        if self.capacity_factor and self.capacity_factor < 1:
            raise ConfigError(
                f"router.capacity_factor = {self.capacity_factor} would drop tokens however even "
                "the load: set it to 1 or more, or to 0 to drop none"
            )
        if self.kind != "token" and not self.is_dropless:
            raise ConfigError(
                f"router.kind = {self.kind} sends all tokens of a noise level, or of a stream, to "
                "the same experts, so that none can choose among them: set router.kind = token, or "
                "router.choice = token and router.capacity_factor = 0"
            )
        if self.choice == "expert" and (
            self.capacity_factor or self.renormalise or self.balance != "none"
        ):
            raise ConfigError(
                "router.choice = expert gives every expert the same load by itself: set "
                "router.balance = none, router.renormalise = false and router.capacity_factor = 0; "
                f"found {self.balance}, {str(self.renormalise).lower()} and {self.capacity_factor}"
            )

    @property
    def is_dropless(self) -> bool:
        """Whether every token has `top_k` experts, whatever the others choose."""
        return self.choice == "token" and not self.capacity_factor

    @property
    def is_learned(self) -> bool:
        """Whether there is anything to learn; otherwise the place of a token decides alone."""
        return self.kind in ("token", "timestep")

    @property
    def has_loss(self) -> bool:
        """Whether an auxiliary loss reaches the router, or there is none to be learned."""
        return not self.is_learned or self.balance in ("loss", "prior") or self.z_weight > 0

    @property
    def is_by_noise(self) -> bool:
        """Whether the noise level of a token decides alone."""
        return self.kind in ("timestep", "noise_level")


@dataclass(frozen=True)
class ExpertsConfig:
    """A pool of experts in place of one feed-forward, in each of `blocks`.

    num_experts:  E
    top_k:        experts that a token goes to; where experts choose, on average
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
        if self.top_k == 1 and self.router.renormalise and not self.router.has_loss:
            raise ConfigError(
                "experts: top_k = 1 with router.renormalise = true makes every gate 1, so that no "
                "loss of the model's output reaches the router, and none of its own does: set "
                "router.renormalise = false, top_k = 2, or router.balance = loss"
            )

    def is_in(self, block: int) -> bool:
        """Whether block number `block` has the experts."""
        return not self.blocks or block in self.blocks
