"""The weight-sharing supernet: adapters trained once, under many plans, that every plan is then scored with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_autoqra.dense_layers import dense_shape
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.evaluation.shared_adapter import SharedAdapter, nested_scaling
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.dense_adapter import add_dense_adapter

_ADAPTER = "default"

RunTraining = Callable[[PeftModel, TrainerCallback], None]
"""Trains what has gradients, with the recipe, and calls the callback at every step."""


class Supernet:
    """Trains one adapter of the largest rank in every module while the plan changes from step to step.

    A plan's model has its quantized weights, plus its own initial correction, plus the shared adapter at its ranks::

        W(plan) = Q(bits) + correction(bits)[:rank] + 4 * lora_alpha / rank * B[:, :rank] A[:rank]

    Corrections belong to a (module, bits) and stay frozen; what is shared is what training adds to them, starting at
    zero as plain LoRA does. After training a plan costs forward passes alone (:class:`SharedAdapter`). What was
    decided, and after whom:

    - One plan per step (Guo et al. 2020, "Single Path One-Shot Neural Architecture Search"), so that a step costs
      about what an ordinary one does. The sandwich rule (Yu & Huang 2019, "Universally Slimmable Networks": largest,
      smallest and random subnetworks in every step) would multiply that, for extremes that plans of equal memory do
      not have: each trades bits for ranks.
    - Every plan once before any plan twice, in an order drawn from the seed: equally many updates for all (Chu et al.
      2021, "FairNAS").
    - The caller gives the plans, near the budget: random ones of a whole search space have 2 bits in places where no
      search leaves them, and their gradients would drown the others'. The base is trained already and frozen, as
      under the elastic adapters of LoNAS and Shears (Muñoz et al. 2024), so nothing shrinks step by step from the
      largest network to the smallest (Cai et al. 2020, "Once-for-All").
    - Ranks are nested, and a step trains the first r components only (Valipour et al. 2023, "DyLoRA"). Adam moves
      every entry of B by about the learning rate, and the scaling is such that this moves the product as it moves that
      of an ordinary adapter of rank r (:func:`~peft_autoqra.evaluation.shared_adapter.nested_scaling`): a constant one
      would make the adapters of small ranks smaller than those that a trial trains.

    Shared adapters are no plan's best ones, and momentum goes on moving components that a step leaves out. The scores
    are for ranking plans, not for reporting.

    Args:
        resident: the model.
        plans: drawn from in training; of all targeted modules. Those without an adapter are left out.
        lora_alpha: of the scaling.
        max_rank: of the shared adapter; a plan above it cannot be scored.

    Raises:
        InvalidPlanError: no plans, or not an adapter in any.
    """

    def __init__(self, resident: ResidentModel, plans: Sequence[BitRankPlan], lora_alpha: int, max_rank: int) -> None:
        """Nothing is trained yet."""
        self._plans = tuple(plan for plan in plans if any(layer.rank for layer in plan.values()))
        if not self._plans:
            raise InvalidPlanError(
                f"A supernet was given {len(plans)} plans with an adapter in none, so it has nothing to train; give "
                "SFTEvaluator shared_plans near the budget, or a fidelity with shared_steps=0."
            )
        self._resident, self._lora_alpha, self._max_rank = resident, lora_alpha, max_rank

    def train(self, run_training: RunTraining, seed: int) -> SharedAdapter:
        """Train a new shared adapter; the same seed gives the same one.

        The caller takes the adapter off the model again, which is left with the weights of some plan. The random state
        of the process is as before.

        Args:
            run_training: the training.
            seed: of the initial adapter and of the order of plans.
        """
        with _random_state_kept(self._resident.model):
            torch.manual_seed(seed)
            peft_model = add_dense_adapter(self._resident.model, self._largest())
            layers = _nested_layers(peft_model)
            run_training(peft_model, _PlanPerStep(self._resident, layers, self._order(seed), self._lora_alpha))
        return SharedAdapter({name: layer.factors() for name, layer in layers.items()}, self._lora_alpha)

    def _largest(self) -> AutoQRAConfig:
        """One of the largest rank, or of a module's own limit, in every module; rows of A as PEFT starts them."""
        ranks = {}
        for name in self._plans[0]:
            layer = self._resident.model.get_submodule(name)
            ranks[name] = LayerPlan(DENSE_BITS, min(self._max_rank, *dense_shape(layer)))
        return AutoQRAConfig(plan=BitRankPlan(ranks), use_rslora=False, task_type="CAUSAL_LM")

    def _order(self, seed: int) -> Iterator[BitRankPlan]:
        """Plans without end: all of them in random order, then again in another."""
        rng = np.random.default_rng(seed)
        while True:
            for index in rng.permutation(len(self._plans)):
                yield self._plans[index]


class _PlanPerStep(TrainerCallback):  # type: ignore[misc]
    """Before each step: the weights of the next plan, with its correction, and the shared adapter at its ranks."""

    def __init__(
        self,
        resident: ResidentModel,
        layers: dict[str, _NestedLayer],
        plans: Iterator[BitRankPlan],
        lora_alpha: int,
    ) -> None:
        self._resident, self._layers, self._plans, self._lora_alpha = resident, layers, plans, lora_alpha

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Transformers' hook; a step may accumulate several batches."""
        plan = next(self._plans)
        self._resident.load(plan, with_corrections=True)
        for name, layer in self._layers.items():
            layer.set_rank(plan[name].rank, nested_scaling(self._lora_alpha, plan[name].rank))


class _NestedLayer:
    """PEFT's layer, made to use the first components of its adapter only.

    Args:
        layer: of the largest rank.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self._layer = layer
        self._lora_a, self._lora_b = (
            _FirstComponents(side[_ADAPTER].weight, dim) for side, dim in ((layer.lora_A, 0), (layer.lora_B, 1))
        )
        layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER] = self._lora_a, self._lora_b

    def set_rank(self, rank: int, scaling: float) -> None:
        """Use this many components; with 0 the layer is the base layer, and costs the optimizer nothing, either."""
        self._layer.enable_adapters(rank > 0)
        self._lora_a.size = self._lora_b.size = rank
        self._layer.scaling[_ADAPTER] = scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        """``lora_B`` and ``lora_A`` in the dtype of the weight that they are added to."""
        dtype = self._layer.get_base_layer().weight.dtype
        return self._lora_b.weight.detach().to(dtype), self._lora_a.weight.detach().to(dtype)


class _FirstComponents(nn.Module):
    """``x W^T`` with the first rows (``dim`` 0) or columns (1) of a weight alone."""

    def __init__(self, weight: nn.Parameter, dim: int) -> None:
        super().__init__()
        self.weight, self._dim = weight, dim
        self.size = weight.shape[dim]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, one of them ``size``."""
        return nn.functional.linear(x, self.weight.narrow(self._dim, 0, self.size))


def _nested_layers(model: PeftModel) -> dict[str, _NestedLayer]:
    modules = model.get_base_model().named_modules()
    adapted = [(name, module) for name, module in modules if isinstance(module, LoraLayer)]
    return {name: _NestedLayer(layer) for name, layer in adapted}


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """What follows a training must not depend on whether it took place now or before a search was resumed."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the trainer seeds this one, too)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
