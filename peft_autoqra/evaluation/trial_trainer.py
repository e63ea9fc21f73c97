"""The trainer of a trial."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import SFTTrainer


class TrialTrainer(SFTTrainer):  # type: ignore[misc]
    """Stops at the first loss that is not finite, where transformers' trainer would go on to the end."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if not loss.isfinite():  # as often as transformers' own check, which leaves such losses out of its mean
            raise ArithmeticError(
                f"the training loss is {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps}; "
                "lower learning_rate, or use bf16 in place of fp16"
            )
        return loss
