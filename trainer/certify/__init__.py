"""Certificates: proofs that a layout trains as one process does, for recipes and any modules."""

from kinodit.trainer.certify.modules import StepOutcome, compare

__all__ = ["StepOutcome", "compare"]
