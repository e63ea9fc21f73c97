"""What a worker is, and what the fine-tune is that a search prepares; every assumption has its source beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.scale.models import ModelSize
from peft_autoqra.importance.calibration_bank import BankSettings
from peft_autoqra.importance.module_fit import FitSettings
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.search_config import SearchArguments
from peft_autoqra.search_costs import TRAINING_OPERATIONS, SearchCosts, fit_tokens
from peft_autoqra.search_setup import calibration_bytes

DENSE_ITEMSIZE = 2  # bytes of a weight of the resident model and of its copies
TRAINED_RANK = 16  # that the adapters' memory is counted at; QLoRA's budget is
LAYER_ACTIVATION_BYTES = (
    34  # a token and hidden feature of the layer that is recomputed (Korthikanti et al. 2022, (2))
)
LOGIT_BYTES = 8  # a token and word: float32 logits and their gradient


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: for the table.
        memory_bytes: NVIDIA's data sheet.
        peak_flops: dense bfloat16 operations per second, of the same sheet.
        utilisation: share of it that a trial's useful operations reach. Llama 3 was pretrained at 0.38 to 0.43 (Dubey
            et al. 2024, table 4); short runs with small batches reach less. An assumption, not a measurement.
        hour_price: dollars; an assumption, since offers differ by a factor of three.
    """

    name: str = "H100 80 GB"
    memory_bytes: float = 80e9
    peak_flops: float = 989e12
    utilisation: float = 0.35
    hour_price: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The full fine-tune, in whose units searches are paid.

    Attributes:
        num_tokens: that it trains on, all epochs together; 100 million are three epochs of some 65,000 sequences.
        step_sequences: of one optimizer step.
        sequence_tokens: of one sequence.
        device_sequences: passed at once; the others of a step follow.
    """

    num_tokens: float = 100e6
    step_sequences: int = 64
    sequence_tokens: int = 512
    device_sequences: int = 4

    @property
    def full_steps(self) -> int:
        """Optimizer steps."""
        return max(1, round(self.num_tokens / (self.step_sequences * self.sequence_tokens)))

    def costs(self, size: ModelSize, search: SearchArguments) -> SearchCosts:
        """As ``SearchSetup.costs`` counts them."""
        shapes = [(shape.out_features, shape.in_features) for shape in size.memory.modules.values()]
        return SearchCosts(
            full_steps=self.full_steps,
            step_tokens=self.step_sequences * self.sequence_tokens,
            eval_tokens=self.sequence_tokens,
            calibration_tokens=search.num_calibration_sequences * self.sequence_tokens,
            fit_tokens=fit_tokens(shapes, len(bank_settings(size, search).bit_choices)),
        )

    def full_seconds(self, size: ModelSize, gpu: Gpu) -> float:
        """Time of the full fine-tune on one worker; what attention does between tokens is left out."""
        operations = TRAINING_OPERATIONS * size.multiplied_weights * self.num_tokens
        return operations / (gpu.utilisation * gpu.peak_flops)


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Bytes of one worker.

    Attributes:
        model_bytes: the resident unquantized model.
        copy_bytes: its planned weights once more, as the plan at hand has them.
        training_bytes: adapters, gradients, optimizer states and activations of a trial.
        materialized_bytes: what every bit-width's weights take in place of the one copy, where they fit.
        bank_bytes: quantized layers and initial adapters, in files.
        statistics_bytes: of a calibration, in files.
    """

    model_bytes: int
    copy_bytes: int
    training_bytes: int
    materialized_bytes: int
    bank_bytes: int
    statistics_bytes: int

    @property
    def device_bytes(self) -> int:
        """What has to fit at least."""
        return self.model_bytes + self.copy_bytes + self.training_bytes

    def materializes(self, gpu: Gpu) -> bool:
        """Whether ``ResidentModel`` would keep every bit-width's weights: in half of what the model leaves free."""
        return self.materialized_bytes <= (gpu.memory_bytes - self.model_bytes) / 2

    def num_gpus(self, gpu: Gpu) -> int:
        """GPUs that hold it."""
        return math.ceil(self.device_bytes / gpu.memory_bytes)


def bank_settings(size: ModelSize, search: SearchArguments) -> BankSettings:
    """Of a search's calibration."""
    return BankSettings(
        module_names=tuple(size.linears),
        bit_choices=tuple(search.bit_choices),
        quantizer=QuantizerSettings(backend=search.quantizer, group_size=search.group_size),
        fit=FitSettings(max_rank=max(search.rank_choices)),
    )


def worker_memory(size: ModelSize, recipe: Recipe, search: SearchArguments) -> WorkerMemory:
    """What ``ResidentModel`` and a trial hold, and what a calibration leaves on disk."""
    settings = bank_settings(size, search)
    adapters = size.memory.estimate(size.memory.uniform(4, TRAINED_RANK), settings.quantizer)
    trained = adapters.adapter_bytes + adapters.gradient_bytes + adapters.optimizer_bytes
    tokens, config = recipe.device_sequences * recipe.sequence_tokens, size.config
    kept = DENSE_ITEMSIZE * config.num_hidden_layers * config.hidden_size  # with gradient checkpointing
    activations = tokens * (kept + LAYER_ACTIVATION_BYTES * config.hidden_size + LOGIT_BYTES * config.vocab_size)
    copy = DENSE_ITEMSIZE * size.memory.num_weights
    bank, statistics = calibration_bytes(size.linears, settings)
    return WorkerMemory(
        model_bytes=size.model_bytes,
        copy_bytes=copy,
        training_bytes=trained + activations,
        materialized_bytes=copy * len(settings.bit_choices),
        bank_bytes=bank,
        statistics_bytes=statistics,
    )
