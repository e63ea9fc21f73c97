"""Trials on a tiny model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel
from trl import SFTConfig

from peft_autoqra import BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.evaluation.sft import SFTData, SFTEvaluator
from peft_autoqra.importance.calibration_bank import BankSettings, CalibrationBank, build_calibration_bank
from peft_autoqra.importance.module_fit import FitSettings
from peft_autoqra.target_modules import linear_targets
from tests.tiny_data import token_dataset, word_tokenizer

QUANTIZER = QuantizerSettings(group_size=32)


@dataclass(frozen=True)
class TinyTrials:
    """What trials on one model need, and a plan to try."""

    args: SFTConfig
    data: SFTData
    bank: CalibrationBank
    resident: ResidentModel
    plan: BitRankPlan

    def evaluator(self, **settings: object) -> SFTEvaluator:
        return SFTEvaluator(self.resident, self.data, self.bank, self.args, lora_alpha=8, **settings)


def tiny_args(output_dir: object, **changes: object) -> SFTConfig:
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_length": 16,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "use_cpu": True,
    }
    return SFTConfig(**settings | changes)


def tiny_trials(model: PreTrainedModel, args: SFTConfig) -> TinyTrials:
    data = SFTData(model, args, token_dataset(seed=0), token_dataset(seed=1), word_tokenizer())
    linears = linear_targets(model)
    settings = BankSettings(
        module_names=tuple(linears), bit_choices=(2, 4), quantizer=QUANTIZER, fit=FitSettings(max_rank=4)
    )
    bank = build_calibration_bank(model, data.batches(data.train, 4), settings)
    plan = BitRankPlan(
        {name: LayerPlan(2 + 2 * (i % 2), 4) for i, name in enumerate(linears)},
        quantizer=QUANTIZER,
        initialization="compensate",
    )
    return TinyTrials(args, data, bank, ResidentModel(model, linears, bank), plan)


def model_state(model: PreTrainedModel) -> tuple[object, ...]:
    """What a trial must leave as it was."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.detach().sum().item()) for name, p in model.named_parameters()],
        [list(module._forward_hooks) for module in model.modules()],
        model.is_activation_checkpointing,
        model.config.use_cache,
        hasattr(model, "peft_config"),
    )
