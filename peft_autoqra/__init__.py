"""Choose weight bits and LoRA rank of every layer together; fine-tune with PEFT.

Importing this package registers the method with PEFT and transformers; do it before an adapter or a quantized model is
loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft_autoqra.folder_card import complete_model_card
from peft_autoqra.memory import MemoryModel
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.pushed_card import register as register_cards
from peft_autoqra.search_config import AutoQRASearchConfig
from peft_autoqra.search_space import SearchSpace
from peft_autoqra.streaming.hf_quantizer import register as register_with_transformers
from peft_autoqra.streaming.quant_config import AutoQRAQuantConfig
from peft_autoqra.trial import Fidelity, Trial, TrialResult, TrialStatus
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.model import QuantLoRAModel
from peft_autoqra.tuner.registration import register
from peft_autoqra.uniform_plan import uniform_plan

if TYPE_CHECKING:
    from peft_autoqra.importance.calibrated_plan import calibrate_plan
    from peft_autoqra.memory_callback import MemoryBudgetCallback
    from peft_autoqra.search_result import SearchResult
    from peft_autoqra.searcher import AutoQRASearcher

__all__ = [
    "AutoQRAConfig",
    "AutoQRAQuantConfig",
    "AutoQRASearchConfig",
    "AutoQRASearcher",
    "BaseModelInfo",
    "BitRankPlan",
    "Fidelity",
    "LayerPlan",
    "MemoryBudgetCallback",
    "MemoryEstimate",
    "MemoryModel",
    "QuantLoRAModel",
    "QuantizerSettings",
    "SearchResult",
    "SearchSpace",
    "Trial",
    "TrialResult",
    "TrialStatus",
    "calibrate_plan",
    "complete_model_card",
    "uniform_plan",
]

# Imported at first use: who only loads an adapter needs neither TRL nor BoTorch.
_LAZY = {
    "AutoQRASearcher": "peft_autoqra.searcher",
    "MemoryBudgetCallback": "peft_autoqra.memory_callback",
    "SearchResult": "peft_autoqra.search_result",
    "calibrate_plan": "peft_autoqra.importance.calibrated_plan",
}


def __getattr__(name: str) -> Any:
    """Import the heavier names when they are asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


register()
register_with_transformers()
register_cards()
