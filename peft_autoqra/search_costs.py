"""What trials and calibration cost in units of one full fine-tune, from counts alone: the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_autoqra.trial import Fidelity

FORWARD_SHARE = 0.5
"""Of a training token's cost, for a token that is only scored: the backward pass through frozen weights costs as much
as the forward pass. Measured on a CPU, a scored token takes a quarter, and a trial's start the rest."""

CALIBRATION_PASSES = 2.5
"""Training tokens that a calibration token costs: forward, forward again and backward block by block, and Grams."""

FIT_OPERATIONS = 12.0
"""Floating-point operations of one (module, bits) fit, in units of ``out * in * min(out, in)``; measured as time on a
CPU beside that of a training step."""

TRAINING_OPERATIONS = 4.0
"""Floating-point operations of a training token, in units of the weights it passes: twice two."""


@dataclass(frozen=True, kw_only=True)
class SearchCosts:
    """Costs in units of one full fine-tune with the recipe.

    Attributes:
        full_steps: optimizer steps of the full fine-tune.
        step_tokens: tokens of one step on average.
        eval_tokens: tokens that scoring one held-out sequence passes forward on average, those of an objective other
            than the held-out loss included.
        calibration_tokens: tokens that are calibrated on.
        fit_tokens: training tokens that cost as much as fitting all modules at all bit-widths.
    """

    full_steps: int
    step_tokens: float
    eval_tokens: float
    calibration_tokens: float
    fit_tokens: float

    @property
    def calibration(self) -> float:
        """Cost of a calibration; counted for every search, also where a cache saves it."""
        return self._of_tokens(CALIBRATION_PASSES * self.calibration_tokens + self.fit_tokens)

    def steps(self, num_steps: float) -> float:
        """Cost of training steps."""
        return num_steps / self.full_steps

    def scoring(self, num_eval_sequences: int) -> float:
        """Cost of scoring held-out sequences."""
        return self._of_tokens(FORWARD_SHARE * num_eval_sequences * self.eval_tokens)

    def trial(self, fidelity: Fidelity) -> float:
        """Cost of one trial, without the supernet that it may borrow from."""
        return self.steps(fidelity.num_steps) + self.scoring(fidelity.num_eval_sequences)

    def _of_tokens(self, tokens: float) -> float:
        return tokens / (self.step_tokens * self.full_steps)


def fit_tokens(shapes: Iterable[tuple[int, int]], num_bits: int) -> float:
    """Training tokens that cost as much as fitting all modules at all bit-widths.

    Args:
        shapes: ``(out_features, in_features)`` of every module.
        num_bits: bit-widths that are fitted.
    """
    sizes = [(n * k, min(n, k)) for n, k in shapes]
    operations = FIT_OPERATIONS * num_bits * sum(weights * side for weights, side in sizes)
    return operations / (TRAINING_OPERATIONS * sum(weights for weights, _ in sizes))
