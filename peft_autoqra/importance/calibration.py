"""One forward and backward pass over calibration data that measures every linear module's statistics."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.statistics import CalibrationStatistics, ModuleStatistics

IGNORED_LABEL = -100


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    module_names: Sequence[str],
    *,
    seed: int = 0,
    fingerprint: str = "",
) -> CalibrationStatistics:
    """Measure input and output-gradient second moments; see :class:`ModuleStatistics` for what they estimate.

    Gradients are those of tokens sampled from the model's predictions (the Fisher matrix), not of the data's tokens
    (the empirical one, which overestimates wherever the model predicts the data badly: Kunstner, Balles & Hennig
    2019). On SmolLM2 and reviews, rank 16, the estimates came to 0.9 to 1.1 times the divergence from the 16-bit model
    at 2, 3 and 4 bits (empirical: 1.4 to 1.7 times), without correction to 1.0, 1.3 and 1.4 times (1.5, 2.0, 2.0).

    The model is left as it was, also after an error: modes, ``requires_grad`` flags, hooks, gradients. It runs in
    evaluation mode with frozen parameters, so backward keeps gradients of activations only. Wrap ``batches`` in
    ``tqdm`` to see progress.

    Args:
        model: a causal language model of any floating dtype.
        batches: ``input_ids`` ``[batch, seq]``; optional ``attention_mask`` (0 excludes a position) and ``labels``
            (-100 excludes a prediction, other values do not matter); other entries go to the model.
        module_names: dotted names of ``nn.Linear`` or transformers' ``Conv1D`` modules.
        seed: of the sampled tokens.
        fingerprint: kept with the statistics; names the model, data and settings.

    Returns:
        Statistics of the modules in the order given, on the CPU.

    Raises:
        CalibrationError: no data, nothing to predict, an unknown, non-linear or never reached module, or
            activations or gradients that are not finite.
    """
    recorder = _Recorder(_find_linear_modules(model, module_names))
    generator = torch.Generator(model.get_input_embeddings().weight.device).manual_seed(seed)
    num_predictions = 0
    with ExitStack() as stack:
        stack.enter_context(flags_kept(model))
        model.eval().requires_grad_(False)
        stack.enter_context(recorder.attached())
        stack.enter_context(_gradients_from(model.get_input_embeddings()))
        stack.enter_context(torch.enable_grad())
        for batch in batches:
            num_predictions += _forward_backward(model, batch, recorder, generator)
    if num_predictions == 0:
        raise CalibrationError("The calibration data holds no token to predict; give non-empty texts with labels.")
    return CalibrationStatistics(recorder.statistics(num_predictions), fingerprint=fingerprint)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; a padding-free one holds integers too, which stay as they are."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Every module's mode and every parameter's ``requires_grad`` come back, also after an error."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter, required_grad in trainable:
            parameter.requires_grad_(required_grad)


def linear_weight(module: nn.Module) -> Tensor:
    """Weight of an ``nn.Linear`` or ``Conv1D`` as ``[out_features, in_features]``, detached, not copied.

    Raises:
        CalibrationError: the module is neither.
    """
    if isinstance(module, Conv1D):
        return module.weight.detach().T  # type: ignore[no-any-return]
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    raise CalibrationError(f"A {type(module).__name__} cannot be calibrated; target nn.Linear or Conv1D modules.")


def linear_weights(model: nn.Module, module_names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and weights ``[out_features, in_features]`` of linear modules, as :func:`build_error_table` takes them.

    Raises:
        CalibrationError: an unknown or non-linear module.
    """
    for name, module in _find_linear_modules(model, list(module_names)).items():
        yield name, linear_weight(module)


def _find_linear_modules(model: nn.Module, module_names: Sequence[str]) -> dict[str, nn.Module]:
    available = dict(model.named_modules())
    found = {}
    for name in module_names:
        if name not in available:
            close = difflib.get_close_matches(name, available, n=3)
            raise CalibrationError(f"The model has no module {name!r}. Close names: {close}.")
        linear_weight(available[name])
        found[name] = available[name]
    if not found:
        raise CalibrationError("There are no modules to calibrate; check target_modules.")
    return found


def _forward_backward(
    model: PreTrainedModel, batch: Mapping[str, Any], recorder: _Recorder, generator: torch.Generator
) -> int:
    """Back-propagate the summed token losses of one batch; the hooks do the measuring.

    Returns:
        Number of predicted tokens.
    """
    inputs = to_device(batch, model.get_input_embeddings().weight.device)
    labels = inputs.pop("labels", inputs["input_ids"])
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    # A prediction counts when both its position and its target are real tokens (left padding has neither).
    targets = labels[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED_LABEL)
    num_predictions = int((targets != IGNORED_LABEL).sum())
    if num_predictions == 0:
        return 0
    recorder.start_batch(mask)
    logits = model(**inputs, use_cache=False).logits[:, :-1][targets != IGNORED_LABEL].float()  # [predictions, vocab]
    sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
    functional.cross_entropy(logits, sampled, reduction="sum").backward()
    return num_predictions


@contextmanager
def _gradients_from(embeddings: nn.Module) -> Iterator[None]:
    """Start the autograd graph at the embeddings' output, since no parameter does."""
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Sums:
    """Running sums of one module.

    Attributes:
        gram_owner: module that sums the Gram of the input this one reads; its own name unless it is shared.
        gram: sum of ``x x^T``, ``[in, in]``, float32 on the module's device; None in modules that are not owners.
        squared_gradients: sum of ``g_i^2``, ``[out]``, float64 on the CPU.
        num_tokens: positions seen.
    """

    gram_owner: str | None = None
    gram: Tensor | None = None
    squared_gradients: Tensor | None = None
    num_tokens: int = 0


class _Recorder:
    """Forward hooks that sum Grams of inputs, and tensor hooks that sum squares of output gradients."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
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
        """Sums turned into means."""
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
        if sums.gram is None:
            sums.gram = x.new_zeros(x.shape[1], x.shape[1])
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
