"""Making PEFT, transformers and their model cards know the method."""

from __future__ import annotations

from peft_autoqra import pushed_card
from peft_autoqra.streaming import hf_quantizer
from peft_autoqra.tuner import registration as tuner_registration


def register() -> None:
    """Register everything; calling it again changes nothing."""
    tuner_registration.register()
    hf_quantizer.register()
    pushed_card.register()
