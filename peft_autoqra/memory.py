"""Exact bytes of a plan on a model, without building it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from peft_autoqra.dense_layers import dense_shape
from peft_autoqra.errors import InvalidPlanError, MemoryBudgetError, PlanMismatchError
from peft_autoqra.memory_estimate import MemoryEstimate, MemoryScope
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.quant.backends import QuantBackend, make_backend
from peft_autoqra.search_space import SearchSpace
from peft_autoqra.target_modules import linear_targets

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Those whose states are known."""

_STATES_PER_PARAMETER = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
_STEP_BYTES = {"adamw_torch": 4, "adamw_torch_fused": 4, "sgd": 0}
_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclass(frozen=True)
class ModuleShape:
    """A targeted linear layer.

    Attributes:
        out_features: rows of its weight.
        in_features: columns of its weight.
        weight_itemsize: bytes of one unquantized weight.
    """

    out_features: int
    in_features: int
    weight_itemsize: int

    @property
    def num_weights(self) -> int:
        """Size of the weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class MemoryModel:
    """Knows the shapes of a model and from them the bytes of any plan.

    Example:
        ```python
        memory = MemoryModel.from_model(base)
        print(memory.estimate(memory.uniform(bits=3, rank=16)).total_bytes)
        ```

    Attributes:
        modules: targeted module name to shape.
        untouched_bytes: all other parameters and buffers, shared ones counted once.
        optimizer: ``"adamw_torch"`` (or fused; two float32 states a parameter, one step count a tensor) or ``"sgd"``.
        adapter_itemsize: bytes of an adapter parameter; 4, since PEFT keeps adapters of 16-bit bases in float32.

    Raises:
        InvalidPlanError: an optimizer whose states are not known.
    """

    modules: Mapping[str, ModuleShape]
    untouched_bytes: int
    optimizer: str = "adamw_torch"
    adapter_itemsize: int = 4

    def __post_init__(self) -> None:
        """Check the optimizer."""
        if self.optimizer not in OPTIMIZERS:
            raise InvalidPlanError(
                f"The memory of optimizer {self.optimizer!r} is not known; use one of {OPTIMIZERS}."
            )

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        target_modules: str | Iterable[str] = "all-linear",
        optimizer: str = "adamw_torch",
    ) -> MemoryModel:
        """Read the shapes of an unquantized model.

        Args:
            model: may be on the meta device.
            target_modules: as in ``LoraConfig``; a plan may only name these.
            optimizer: of the fine-tune.

        Raises:
            InvalidPlanError: no linear layer matches, or one is quantized already.
        """
        targets = linear_targets(model, target_modules)
        modules = {
            name: ModuleShape(*dense_shape(layer), layer.weight.element_size()) for name, layer in targets.items()
        }
        target_weights = {id(layer.weight) for layer in targets.values()}
        others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in target_weights}
        untouched = sum(tensor.numel() * tensor.element_size() for tensor in others.values())
        return cls(modules, untouched, optimizer)

    @property
    def num_weights(self) -> int:
        """Weights of all targeted modules."""
        return sum(shape.num_weights for shape in self.modules.values())

    def estimate(self, plan: Mapping[str, LayerPlan], quantizer: QuantizerSettings | None = None) -> MemoryEstimate:
        """Bytes of a plan; targeted modules that it leaves out stay unquantized and without adapter.

        Args:
            plan: a :class:`BitRankPlan`, or any mapping from module names to layer plans.
            quantizer: the plan's by default.

        Raises:
            PlanMismatchError: the plan names a module that this model does not have.
        """
        if quantizer is None:
            quantizer = plan.quantizer if isinstance(plan, BitRankPlan) else QuantizerSettings()
        unknown = [name for name in plan if name not in self.modules]
        if unknown:
            raise PlanMismatchError(
                f"The plan names {unknown[:3]}, which are no targeted linear layers of this model."
            )
        backend = make_backend(quantizer)
        weight = metadata = parameters = tensors = 0
        for name, shape in self.modules.items():
            layer = plan[name] if name in plan else LayerPlan(DENSE_BITS, 0)
            codes, scales = self._weight_bytes(name, shape, layer.bits, backend)
            weight, metadata = weight + codes, metadata + scales
            parameters += layer.rank * (shape.out_features + shape.in_features)
            tensors += 2 if layer.rank else 0
        return MemoryEstimate(
            weight_bytes=weight,
            metadata_bytes=metadata,
            untouched_bytes=self.untouched_bytes,
            adapter_bytes=parameters * self.adapter_itemsize,
            gradient_bytes=parameters * self.adapter_itemsize,
            optimizer_bytes=parameters * 4 * _STATES_PER_PARAMETER[self.optimizer]
            + tensors * _STEP_BYTES[self.optimizer],
        )

    @staticmethod
    def _weight_bytes(name: str, shape: ModuleShape, bits: int, backend: QuantBackend) -> tuple[int, int]:
        if bits == DENSE_BITS:
            return shape.num_weights * shape.weight_itemsize, 0
        return backend.num_bytes(shape.out_features, shape.in_features, bits, name)

    def bytes_table(
        self, space: SearchSpace, quantizer: QuantizerSettings, scope: MemoryScope
    ) -> npt.NDArray[np.int64]:
        """Bytes of every (group, bits, rank) of a search space, ``[num_groups, num_bits, num_ranks]``.

        Their sum over groups plus the bytes of everything outside the space is :meth:`estimate` in that scope.
        """
        table = np.zeros((space.num_groups, len(space.bit_choices), len(space.rank_choices)), dtype=np.int64)
        for group_index, group in enumerate(space.groups):
            part = MemoryModel(
                {name: self.modules[name] for name in group.modules}, 0, self.optimizer, self.adapter_itemsize
            )
            for bit_index, bits in enumerate(space.bit_choices):
                for rank_index, rank in enumerate(space.rank_choices):
                    layers = {name: LayerPlan(bits, rank) for name in group.modules}
                    table[group_index, bit_index, rank_index] = part.estimate(layers, quantizer).in_scope(scope)
        return table

    def uniform(self, bits: int, rank: int) -> dict[str, LayerPlan]:
        """The same bits and rank for every targeted module; rank is capped at the smaller side of a weight."""
        return {
            name: LayerPlan(bits, min(rank, shape.out_features, shape.in_features))
            for name, shape in self.modules.items()
        }


@dataclass(frozen=True)
class MemoryBudget:
    """A limit in bytes and what it limits."""

    limit_bytes: int
    scope: MemoryScope


def resolve_budget(budget: int | str, memory_model: MemoryModel, scope: MemoryScope | None = None) -> MemoryBudget:
    """Turn a budget as users write it into bytes.

    Args:
        budget: bytes as an integer; ``"6GB"`` (10^9), ``"6GiB"`` (2^30) and other units; ``"qlora-4bit-r16"``: what
            uniform NF4 with double quantization and that rank on the same modules takes; ``"3.2bit"``: untouched
            modules plus that many bits per targeted weight for codes, metadata and adapters together, as stored. Each
            may be scaled: ``"0.75*qlora-4bit-r16"``.
        memory_model: of the model to be fine-tuned.
        scope: ``"training"`` counts weights, adapters, gradients and optimizer states, ``"stored"`` weights and
            adapters. None means ``"training"``, for ``"3.2bit"`` ``"stored"``.

    Raises:
        MemoryBudgetError: the budget cannot be read, or contradicts the scope.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise MemoryBudgetError(f"memory_budget={budget!r} must be bytes as an integer or text such as '6GB'.")
    match = re.fullmatch(r"(?:([0-9.]+)\s*\*\s*)?(.+)", str(budget).strip().lower())
    factor, text = (match.group(1), match.group(2)) if match else (None, str(budget))
    scale = _positive(factor, budget) if factor else 1.0
    if qlora := re.fullmatch(r"qlora-4bit-r(\d+)", text):
        scope = scope or "training"
        plan = memory_model.uniform(4, int(qlora.group(1)))
        limit = memory_model.estimate(plan, QuantizerSettings(backend="bitsandbytes")).in_scope(scope)
    elif bits := re.fullmatch(r"([0-9.]+)\s*bits?", text):
        if scope == "training":
            raise MemoryBudgetError(
                f"memory_budget={budget!r} counts what is stored; leave scope out, or give training memory in bytes."
            )
        scope = "stored"
        limit = memory_model.untouched_bytes + math.floor(
            _positive(bits.group(1), budget) * memory_model.num_weights / 8
        )
    elif number := re.fullmatch(r"([0-9.]+)\s*([kmgt]i?b|b)?", text):
        scope = scope or "training"
        limit = math.floor(_positive(number.group(1), budget) * _UNITS[number.group(2) or "b"])
    else:
        raise MemoryBudgetError(
            f"memory_budget={budget!r} cannot be read; write bytes, '6GB', '3.2bit' or 'qlora-4bit-r16', each with an "
            "optional factor such as '0.75*qlora-4bit-r16'."
        )
    return MemoryBudget(math.floor(limit * scale), scope)


def _positive(text: str, budget: int | str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise MemoryBudgetError(f"memory_budget={budget!r}: {text!r} is not a positive number.")
    return value
