"""Calibration of a chain of blocks: one block at a time over all data, forward and then back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.activation_store import ActivationStore
from peft_autoqra.importance.block_chain import BlockCall, BlockChain, forward_replaced
from peft_autoqra.importance.calibration_batch import CalibrationBatch
from peft_autoqra.importance.recorder import StatisticsRecorder
from peft_autoqra.importance.statistics import StatisticsStore
from peft_autoqra.terminal_bar import terminal_bar


class BlockCalibration:
    """Passes a chain of blocks forward and back.

    What lies between the blocks is kept: ``hidden.i`` is what block i reads, ``gradient.i`` the loss's gradient with
    respect to it. With a directory that is on disk, and a calibration that was stopped goes on from there. What blocks
    are called with beside it (masks, position embeddings) stays in memory.

    Args:
        chain: the model.
        batches: all data.
        modules: name to module, all inside the blocks.
        make_recorder: of the statistics of some modules.
        store: takes the statistics, block by block.
        directory: of the activations; None keeps them in memory.
    """

    def __init__(
        self,
        chain: BlockChain,
        batches: list[CalibrationBatch],
        modules: Mapping[str, nn.Module],
        make_recorder: Callable[[Mapping[str, nn.Module]], StatisticsRecorder],
        store: StatisticsStore,
        directory: Path | None,
    ) -> None:
        """Sort the modules by block."""
        self._chain, self._batches = chain, batches
        self._make_recorder, self._statistics = make_recorder, store
        self._modules = [
            {name: module for name, module in modules.items() if name.startswith(f"{block_name}.")}
            for block_name in chain.names
        ]
        self._lowest = min(index for index, inside in enumerate(self._modules) if inside)
        self._num_predictions = sum(batch.num_predictions for batch in batches)
        self._activations = ActivationStore(directory)

    def run(self, *, seed: int, show_progress: bool) -> None:
        """Measure the blocks that are not measured yet.

        Args:
            seed: of the sampled tokens.
            show_progress: show a progress bar.
        """
        depth = len(self._chain.blocks)
        with terminal_bar(total=2 * depth - self._lowest, desc="calibrating", show=show_progress) as steps:
            calls = self._start()
            if self._next_back() is None:
                for index in range(depth):
                    self._forward(index, calls)
                    steps.update()
                self._head(seed)
            steps.update(2 * depth - 1 - (self._next_back() or 0) - steps.n)
            while (block := self._next_back()) is not None and block >= self._lowest:
                self._backward(block, calls)
                steps.update()
        self._activations.clear()

    def _start(self) -> list[list[BlockCall]]:
        """What the blocks are called with, by batch; keeps what the first one reads."""
        first, calls = [], []
        with torch.no_grad():
            for batch in self._batches:
                hidden, batch_calls, _ = self._chain.around(batch.inputs)
                first.append(hidden)
                calls.append(batch_calls)
        if "hidden.0" not in self._activations and self._next_back() is None:
            self._activations.put("hidden.0", first)
        return calls

    def _next_back(self) -> int | None:
        """The block to go back through next; -1 after the first one, None while the forward pass is not done."""
        depth = len(self._chain.blocks)
        return next((index - 1 for index in range(depth + 1) if f"gradient.{index}" in self._activations), None)

    def _forward(self, index: int, calls: list[list[BlockCall]]) -> None:
        if f"hidden.{index + 1}" in self._activations:
            return
        block, outputs = self._chain.blocks[index], []
        stored = zip(self._batches, self._activations.get(f"hidden.{index}"), calls, strict=True)
        with torch.no_grad(), _read_once(block):
            for batch, hidden, batch_calls in stored:
                x, call = hidden.to(batch.device), batch_calls[index]
                output = call.run(block, x)
                if not torch.isfinite(output.sum(dtype=torch.float32)):
                    self._name_the_culprit(index, batch, x, call)
                outputs.append(output.to("cpu"))
        self._activations.put(f"hidden.{index + 1}", outputs)

    def _name_the_culprit(self, index: int, batch: CalibrationBatch, x: Tensor, call: BlockCall) -> None:
        """Run a block again with the hooks that raise at the first module whose outputs are not finite."""
        recorder = self._make_recorder(self._modules[index])
        recorder.start_batch(batch.mask)
        with recorder.attached():
            call.run(self._chain.blocks[index], x)
        raise CalibrationError(
            f"The outputs of {self._chain.names[index]!r} hold NaN or infinity during calibration; check its weights, "
            "or load the model in bfloat16 or float32."
        )

    def _head(self, seed: int) -> None:
        """Gradients with respect to what the last block wrote."""
        depth = len(self._chain.blocks)
        generator = torch.Generator(self._batches[0].device).manual_seed(seed)
        gradients = []
        for batch, hidden in zip(self._batches, self._activations.get(f"hidden.{depth}"), strict=True):
            last = hidden.to(batch.device).detach().requires_grad_()
            batch.back_propagate(self._chain.around(batch.inputs, last)[2].logits, generator)
            gradients.append(_gradient(last))
        self._activations.put(f"gradient.{depth}", gradients)
        self._activations.drop(f"hidden.{depth}")

    def _backward(self, index: int, calls: list[list[BlockCall]]) -> None:
        recorder = self._make_recorder(self._modules[index])
        stored = zip(
            self._activations.get(f"hidden.{index}"), self._activations.get(f"gradient.{index + 1}"), strict=True
        )
        block, gradients = self._chain.blocks[index], []
        with recorder.attached(), _read_once(block):
            for batch, (hidden, gradient), batch_calls in zip(self._batches, stored, calls, strict=True):
                recorder.start_batch(batch.mask)
                x = hidden.to(batch.device).detach().requires_grad_()
                output = batch_calls[index].run(block, x)
                output.backward(gradient.to(output.device))
                gradients.append(_gradient(x))
        if self._modules[index]:
            self._statistics.add(index, recorder.statistics(self._num_predictions))
        self._activations.put(f"gradient.{index}", gradients)
        self._activations.drop(f"gradient.{index + 1}")
        self._activations.drop(f"hidden.{index}")


def _gradient(x: Tensor) -> Tensor:
    """Of a leaf, on the CPU; zero where the loss does not depend on it."""
    return torch.zeros_like(x, device="cpu") if x.grad is None else x.grad.to("cpu")


@contextmanager
def _read_once(block: nn.Module) -> Iterator[None]:
    """Hold the weights of a block that accelerate keeps on disk; by itself it reads them at every call."""
    with ExitStack() as stack:
        for module in block.modules():
            if has_offloaded_params(module):
                stack.enter_context(align_module_device(module))
                stack.enter_context(forward_replaced(module, module._old_forward))
        yield
