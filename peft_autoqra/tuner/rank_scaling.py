"""Adapters of a plan are scaled so that the best learning rate does not depend on their rank.

With ``scaling = lora_alpha / sqrt(rank)`` (rsLoRA, Kalajdzievski 2023) and Adam, whose steps have the size of the
learning rate whatever the gradients are, the best learning rate falls as about ``1 / sqrt(rank)``: measured -0.51 (95%
interval -0.55 to -0.47) on SmolLM2 at 3 bits, ``benchmarks/results/learning-rates.json``. Adapters that start at the
correction of the quantization error leave no room to mend that by the scaling alone, since it also divides their B.
What does is to make A's rows longer as well:

    scaling = lora_alpha / sqrt(rank) * 16 / rank,    A and B start sqrt(rank / 16) times as long as under rsLoRA

To Adam that is rsLoRA with the learning rate times ``sqrt(16 / rank)``, at every rank: the products start the same and
move the same, but for Adam's epsilon, and for weight decay, which goes by the learning rate. Nothing changes at rank
16. The best learning rate then goes with the rank's power of +0.01 (-0.03 to +0.06), measured in the same way.
"""

from __future__ import annotations

import math

REFERENCE_RANK = 16
"""The rank that the learning rate of a recipe is meant for."""


def alpha_of_rank(lora_alpha: float, rank: int) -> float:
    """What a module of this rank has as its alpha under rsLoRA.

    Args:
        lora_alpha: of the configuration, which modules of rank 16 have.
        rank: at least 1.
    """
    return lora_alpha * REFERENCE_RANK / rank


def row_factor(rank: int) -> float:
    """How much longer the rows of A start than PEFT's."""
    return math.sqrt(rank / REFERENCE_RANK)
