"""Choose weight bits and LoRA rank of every layer together; fine-tune with PEFT.

Importing this package registers the method with PEFT and transformers; do it before an adapter or a quantized model is
loaded.
"""

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# PEFT imports bitsandbytes, which warns that it lacks a kernel for the repacked CPU layout; NF4Linear never uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

if TYPE_CHECKING:
    from peft_autoqra.folder_card import complete_model_card
    from peft_autoqra.importance.calibrated_plan import calibrate_plan
    from peft_autoqra.memory import MemoryModel
    from peft_autoqra.memory_callback import MemoryBudgetCallback
    from peft_autoqra.memory_estimate import MemoryEstimate
    from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
    from peft_autoqra.search_config import AutoQRASearchConfig
    from peft_autoqra.search_result import SearchResult
    from peft_autoqra.search_space import SearchSpace
    from peft_autoqra.searcher import AutoQRASearcher
    from peft_autoqra.streaming.quant_config import AutoQRAQuantConfig
    from peft_autoqra.trial import Fidelity, Trial, TrialResult, TrialStatus
    from peft_autoqra.tuner.config import AutoQRAConfig
    from peft_autoqra.tuner.model import QuantLoRAModel
    from peft_autoqra.uniform_plan import uniform_plan

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
_MODULES = {
    "AutoQRAConfig": "tuner.config",
    "AutoQRAQuantConfig": "streaming.quant_config",
    "AutoQRASearchConfig": "search_config",
    "AutoQRASearcher": "searcher",
    "BaseModelInfo": "plan",
    "BitRankPlan": "plan",
    "Fidelity": "trial",
    "LayerPlan": "plan",
    "MemoryBudgetCallback": "memory_callback",
    "MemoryEstimate": "memory_estimate",
    "MemoryModel": "memory",
    "QuantLoRAModel": "tuner.model",
    "QuantizerSettings": "plan",
    "SearchResult": "search_result",
    "SearchSpace": "search_space",
    "Trial": "trial",
    "TrialResult": "trial",
    "TrialStatus": "trial",
    "calibrate_plan": "importance.calibrated_plan",
    "complete_model_card": "folder_card",
    "uniform_plan": "uniform_plan",
}


def __getattr__(name: str) -> Any:
    """Import names when they are asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """For completion at a prompt."""
    return sorted({*globals(), *__all__})


if not getattr(sys.modules.get("autoqra_command"), "is_running", False):  # the command registers when it needs it
    import_module(f"{__name__}.registration").register()
    from peft_autoqra.uniform_plan import uniform_plan  # its module has the same name, and would be found first
