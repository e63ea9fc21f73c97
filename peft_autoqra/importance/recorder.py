"""Hooks that sum what calibration wants to know of linear modules while data flows through them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.statistics import ModuleStatistics


@dataclass
class _Sums:
    """Running sums of one module.

    Attributes:
        gram_owner: module that sums the Gram of the input this one reads; its own name unless it is shared.
        gram: sum of ``x x^T``, ``[in, in]``, or of ``x^2``, ``[in]``, where the input is wide; float32 on the module's
            device; None in modules that are not owners.
        squared_gradients: sum of ``g_i^2``, ``[out]``, float64 on the CPU.
        num_tokens: positions seen.
    """

    gram_owner: str | None = None
    gram: Tensor | None = None
    squared_gradients: Tensor | None = None
    num_tokens: int = 0


class StatisticsRecorder:
    """Forward hooks that sum Grams of inputs, and tensor hooks that sum squares of output gradients.

    Args:
        modules: name to linear module.
        max_gram_features: inputs that are wider get the diagonal of their Gram only.
    """

    def __init__(self, modules: Mapping[str, nn.Module], max_gram_features: int) -> None:
        """Nothing is summed yet."""
        self._modules = modules
        self._max_gram_features = max_gram_features
        self._sums = {name: _Sums() for name in modules}
        self._keep: Tensor | None = None
        self._inputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on all modules, removed at the end."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_hook(self._forward_hook(name)).remove)
            yield

    def start_batch(self, mask: Tensor) -> None:
        """Positions to count from now on, ``[batch, seq]``, bool."""
        self._keep = None if bool(mask.all()) else mask.flatten()
        self._inputs.clear()

    def statistics(self, num_predictions: int) -> dict[str, ModuleStatistics]:
        """Sums turned into means.

        Raises:
            CalibrationError: a module that no input or no gradient reached.
        """
        grams: dict[str, Tensor] = {}
        result = {}
        for name, sums in self._sums.items():
            if sums.gram_owner is None or sums.squared_gradients is None:
                what = "data" if sums.gram_owner is None else "gradients"
                raise CalibrationError(f"The calibration {what} never reached {name!r}; leave it out of the targets.")
            owner = self._sums[sums.gram_owner]
            if sums.gram_owner not in grams and owner.gram is not None:
                grams[sums.gram_owner] = owner.gram.div_(owner.num_tokens).cpu()
            result[name] = ModuleStatistics(
                input_gram=grams[sums.gram_owner],
                output_gradient_second_moment=(sums.squared_gradients / num_predictions).float(),
                num_tokens=sums.num_tokens,
            )
        return result

    def _forward_hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # Inputs that are not finite give outputs that are not; a sum is the cheapest test, and catches both.
            _check_finite(name, output.detach().sum(dtype=torch.float32), "outputs")
            self._add_input(name, args[0])
            if output.requires_grad:
                output.register_hook(lambda gradient: self._add_gradient(name, gradient))

        return hook

    def _add_input(self, name: str, tensor: Tensor) -> None:
        sums, owner = self._sums[name], self._owner(name, tensor)
        if sums.gram_owner not in (None, owner):
            raise CalibrationError(
                f"{name!r} shares its input with {owner!r} in some batches only; calibrate it alone."
            )
        sums.gram_owner = owner
        x = self._positions(name, tensor.detach())
        sums.num_tokens += len(x)
        if owner != name:
            return
        size = x.shape[1]
        if size > self._max_gram_features:
            squares = x.square().sum(0)
            sums.gram = squares if sums.gram is None else sums.gram.add_(squares)
            return
        if sums.gram is None:
            sums.gram = x.new_zeros(size, size)
        sums.gram.addmm_(x.T, x)

    def _owner(self, name: str, tensor: Tensor) -> str:
        """First module that read this tensor object in this batch."""
        reference, owner = self._inputs.get(id(tensor), (None, name))
        if reference is not None and reference() is tensor:
            return owner
        self._inputs[id(tensor)] = (weakref.ref(tensor), name)
        return name

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        total = self._positions(name, gradient).square().sum(0).to("cpu", torch.float64)
        _check_finite(name, total, "gradients")
        previous = self._sums[name].squared_gradients
        self._sums[name].squared_gradients = total if previous is None else previous + total

    def _positions(self, name: str, tensor: Tensor) -> Tensor:
        """Values at the positions that count, ``[num_positions, features]``, float32."""
        values = tensor.flatten(0, -2)
        if self._keep is not None:
            if len(values) != len(self._keep):
                raise CalibrationError(
                    f"{name!r} sees {len(values)} positions of a batch of {len(self._keep)}, so padding cannot be "
                    "told apart; calibrate with sequences of one length, without padding."
                )
            values = values[self._keep.to(values.device)]
        return values.float()


def _check_finite(name: str, values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise CalibrationError(
            f"The {what} of {name!r} hold NaN or infinity during calibration; check its weights, or load the model in "
            "bfloat16 or float32."
        )
