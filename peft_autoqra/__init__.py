"""Choose weight bits and LoRA rank of every layer together; fine-tune with PEFT."""

from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.model import QuantLoRAModel
from peft_autoqra.tuner.registration import register

register()
