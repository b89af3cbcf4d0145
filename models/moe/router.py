"""Routers: which experts each token goes to, in at least float32.

Shape legend: M tokens seen, T tokens of the whole pack, E experts, k experts that a token asks for
(all of them where experts choose), R pairs of a token and an expert, S samples, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.modulation import per_token
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.random import hashed_uniform

Gather = Callable[[Tensor], tuple[Tensor, Tensor]]
"""[M, ...] of the tokens seen -> [T, ...] of all tokens of the pack, in its order, and [M] int64,
which of them are seen. Without gradients."""


def all_seen(seen: Tensor) -> tuple[Tensor, Tensor]:
    """The `Gather` of one process, which sees all tokens, [M, ...]: T = M."""
    return seen, torch.arange(len(seen), device=seen.device)


@dataclass(frozen=True)
class Seen:
    """What a router may look at besides the tokens.

    level_t: [M] float, noise level of each token
    stream:  [M] int64, index of each token's stream; None in blocks of one stream
    level:   [M] int64, the row of each token in the table of noise levels
    time:    [K, c], activated embedding of the noise level of each row; these two are there for
             routers by timestep
    segment: [M] int64, the sample of each token, of `num_segments` in the pack; for routers that
             compare the tokens of a sample, or draw for it
    draws:   [S] int64, what draws for each sample are keyed by; None: nothing is drawn
    tasks:   [G, c], as `time`, of noise levels that tell routers apart; None: nobody asks
    gather:  from the tokens seen to those of the pack; for these, too
    """

    level_t: Tensor
    stream: Tensor | None = None
    level: Tensor | None = None
    time: Tensor | None = None
    segment: Tensor | None = None
    draws: Tensor | None = None
    tasks: Tensor | None = None
    num_segments: int = 1
    gather: Gather = all_seen


@dataclass(frozen=True)
class Choice:
    """Where tokens go.

    index:  [M, k] int64, experts that the token may go to
    gates:  [M, k], what each of them counts
    shares: [M, E], scores that sum to 1 for each token
    logits: [M, E]; None if nothing was learned
    kept:   [M, k] bool, which of them it goes to; None: to all
    """

    index: Tensor
    gates: Tensor
    shares: Tensor
    logits: Tensor | None = None
    kept: Tensor | None = None


class Router(nn.Module):
    """The router of one pool of experts.

    Buffers, moved at the end of a step by whoever balances the pool, and part of a checkpoint:
    correction: [E], added to the scores by which experts are chosen, and to nothing else
    load:       [E], share of the tokens' choices that each expert had in the step before
    unit:       [E], whole numbers, what the experts have been matched with; with a prior loss alone

    key:   what its draws are keyed by, besides the sample; set by the model
    masks: [G, E] uint8, which experts each task has; what the last pass in training has found
    """

    correction: Tensor
    load: Tensor
    unit: Tensor

    def __init__(self, width: int, config: ExpertsConfig, condition_width: int = 0) -> None:
        """`width` of tokens, and of the embedding of their noise level."""
        super().__init__()
        self.config = config.router
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.key = 0
        self.masks: Tensor | None = None
        self.weight: nn.Parameter | None = None
        self.hidden: nn.Parameter | None = None
        self.hidden_bias: nn.Parameter | None = None
        inputs = condition_width if config.router.kind == "timestep" else width
        if config.router.is_learned:
            if config.router.hidden_ratio:
                hidden = round(config.router.hidden_ratio * inputs)
                self.hidden = nn.Parameter(torch.empty(hidden, inputs))
                self.hidden_bias = nn.Parameter(torch.zeros(hidden))
                inputs = hidden
            self.weight = nn.Parameter(torch.empty(config.num_experts, inputs))
            self.register_buffer("correction", torch.zeros(config.num_experts))
            self.register_buffer("load", torch.zeros(config.num_experts))
        if config.router.balance == "prior":
            self.register_buffer("unit", torch.zeros(config.num_experts))

    def forward(self, x: Tensor, seen: Seen) -> Choice:
        """`x` [M, d] -> the choice of each token."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None:
            return self._placed(seen, dtype)
        if self.config.kind == "timestep":
            assert seen.time is not None and seen.level is not None, "no embedding of noise levels"
            by_level = self._logits(seen.time, dtype)
            logits = per_token(by_level, seen.level).expand(len(seen.level), -1)
            self._look_at_tasks(seen, dtype)
        else:
            logits = self._logits(x, dtype)
        scores = self._scores(logits)
        shares = (
            scores / scores.sum(-1, keepdim=True) if self.config.scores != "softmax" else scores
        )
        asked = scores.detach()
        if self.config.draw and seen.draws is not None:
            # The best of log scores with Gumbel noise are a draw without putting back (Kool et
            # al., arXiv 1903.06059).
            assert seen.segment is not None, "no samples to draw for"
            noise = gumbel(seen.draws, self.key, self.num_experts).to(dtype)
            asked = asked.log() + noise.index_select(0, seen.segment)
        asked = asked + self.correction.to(dtype)
        if self.config.choice == "expert":
            index = torch.arange(self.num_experts, device=x.device).expand(len(x), -1)
        else:
            index = best(asked, self.top_k)
        gates = scores.gather(-1, index)
        if self.config.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)
        kept = None if self.config.is_dropless else self._kept(index, asked, seen)
        return Choice(index, gates * self.config.scale, shares, logits, kept)

    def _kept(self, index: Tensor, asked: Tensor, seen: Seen) -> Tensor:
        """[M, k] bool: which of the experts `index` [M, k] keep a token that scored `asked` [M, E].

        Decided among all tokens of a sample, wherever they are.
        """
        assert seen.segment is not None, "no samples to choose within"
        candidates = torch.full_like(asked, -torch.inf).scatter(-1, index, asked.gather(-1, index))
        # One message: a segment's number is small enough for any float.
        segment = seen.segment.to(asked.dtype).unsqueeze(-1)
        whole, rows = seen.gather(torch.cat([candidates, segment], -1))
        whole, sample = whole.split([self.num_experts, 1], -1)
        share = (self.config.capacity_factor or 1.0) * self.top_k / self.num_experts
        owner = sample.squeeze(-1).long()
        kept = best_of_sample(whole, owner, share, seen.num_segments)
        return kept.index_select(0, rows).gather(-1, index)

    def _logits(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.weight is not None
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            if self.hidden is not None and self.hidden_bias is not None:
                x = F.gelu(F.linear(x, self.hidden.to(dtype), self.hidden_bias.to(dtype)))
            return F.linear(x, self.weight.to(dtype))

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.config.scores == "softmax" else logits.sigmoid()

    @torch.no_grad()
    def _look_at_tasks(self, seen: Seen, dtype: torch.dtype) -> None:
        if self.config.balance == "prior" and seen.tasks is not None:
            asked = self._scores(self._logits(seen.tasks, dtype)) + self.correction.to(dtype)
            chosen = best(asked, self.top_k)
            self.masks = torch.zeros_like(asked, dtype=torch.uint8).scatter(-1, chosen, 1)

    def _placed(self, seen: Seen, dtype: torch.dtype) -> Choice:
        """The choice that noise level or modality decides alone."""
        if self.config.kind == "noise_level":
            chosen = (seen.level_t * self.num_experts).long().clamp(0, self.num_experts - 1)
        else:
            assert seen.stream is not None, "experts by modality in a block of one stream"
            chosen = seen.stream
        gates = torch.full((len(chosen), 1), self.config.scale, dtype=dtype, device=chosen.device)
        shares = F.one_hot(chosen, self.num_experts).to(dtype)
        return Choice(chosen.unsqueeze(-1), gates, shares)


def gumbel(draws: Tensor, key: int, num_experts: int) -> Tensor:
    """[S] int64 -> [S, E] float64: Gumbel noise for each sample and expert, by their keys alone."""
    return -(-hashed_uniform(draws, key, num_experts).log()).log()


def best(scores: Tensor, k: int) -> Tensor:
    """[M, E] -> [M, k] int64, indices of the largest; of equal ones the lowest index comes first.

    (`topk` leaves open which of equal scores it takes, and does it differently by device.)
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, k)


def best_of_sample(scores: Tensor, sample: Tensor, share: float, num_samples: int) -> Tensor:
    """[T, E] -> [T, E] bool: the tokens of each sample that score highest, expert by expert.

    sample: [T] int64. Each expert gets at most ceil(share N) of a sample's N tokens, at least one;
    of equal ones the first. The host does not wait.
    """
    sizes = sample.new_zeros(num_samples).index_add_(0, sample, torch.ones_like(sample))
    limit = (sizes.double() * share).ceil().long()
    by_score = scores.sort(dim=0, descending=True, stable=True).indices
    by_sample = sample.take(by_score).sort(dim=0, stable=True).indices
    order = by_score.gather(0, by_sample)
    # Samples are runs of the order now, in every column the same.
    owner = sample.sort(stable=True).values
    place = torch.arange(len(sample), device=sample.device) - (sizes.cumsum(0) - sizes).take(owner)
    is_kept = (place < limit.take(owner)).unsqueeze(-1).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, is_kept)
