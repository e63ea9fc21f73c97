"""A model as a chain of blocks, so that one block after the other can be run over all data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_autoqra.dense_layers import dense_shape, is_dense_layer

_HIDDEN = "hidden_states"


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What a block is called with beside its hidden states.

    Attributes:
        args: positional arguments after the first; the first is the hidden states unless they came by keyword.
        kwargs: keyword arguments.
        by_keyword: whether the hidden states are the keyword ``hidden_states``.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    by_keyword: bool

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
        """Hidden states and the rest of a call."""
        if args:
            return args[0], cls(args[1:], dict(kwargs), by_keyword=False)
        rest = {key: value for key, value in kwargs.items() if key != _HIDDEN}
        return kwargs[_HIDDEN], cls((), rest, by_keyword=True)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's new hidden states, ``[batch, seq, hidden_size]``."""
        if self.by_keyword:
            output = block(hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        new: Tensor = _hidden(output)
        return new


@dataclass(frozen=True, eq=False)
class BlockChain:
    """Blocks of a model, each of which reads what the one before wrote and nothing else of it.

    Attributes:
        model: the whole model.
        names: of the blocks, in the order they run.
        blocks: the blocks.
        returns_tuple: whether a block returns its hidden states in a tuple of one.
    """

    model: nn.Module
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    returns_tuple: bool

    @classmethod
    def find(cls, model: nn.Module, module_names: list[str], inputs: Mapping[str, Any]) -> BlockChain | None:
        """The chain that holds the given modules, if the model is one; found by running it once on ``inputs``.

        None where modules lie outside the blocks, where blocks have hooks, or where a run around the blocks is not
        what a true run is: blocks are called with something else, or the logits depend on more than the last block.
        """
        names = _block_names(model, module_names)
        if names is None:
            return None
        blocks = tuple(model.get_submodule(name) for name in names)
        if any(block._forward_hooks or block._forward_pre_hooks for block in blocks):
            return None
        with torch.no_grad():
            calls, outputs, logits = _watch(model, blocks, inputs)
            if not _are_chained(blocks, calls, outputs):
                return None
            chain = cls(model, names, blocks, isinstance(outputs[0], tuple))
            try:
                first, again, result = chain.around(inputs, _hidden(outputs[-1]))
            except Exception:  # the rest of the model wants something of the blocks that a stand-in does not have
                return None
        same_calls = all(_equal(call, other) for (_, call), other in zip(calls, again, strict=True))
        same_ends = torch.equal(first, calls[0][0]) and _identical(result.logits, logits)
        return chain if same_calls and same_ends else None

    def around(self, inputs: Mapping[str, Any], last: Tensor | None = None) -> tuple[Tensor, list[BlockCall], Any]:
        """Run everything but the blocks.

        Args:
            inputs: of the model.
            last: hidden states that the last block shall seem to return; None where the output does not matter.
              Then a linear head does not run either: at a large vocabulary it costs as much as many blocks.

        Returns:
            The hidden states that the first block reads, what else each block is called with, the model's output.
        """
        seen: list[tuple[Tensor, BlockCall]] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden, call = BlockCall.split(args, kwargs)
            seen.append((hidden, call))
            result = hidden if last is None or len(seen) < len(self.blocks) else last
            return (result,) if self.returns_tuple else result

        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(forward_replaced(block, stand_in))
            if last is None:
                _leave_out_head(self.model, stack)
            output = self.model(**inputs, use_cache=False)
        return seen[0][0].detach(), [call for _, call in seen], output


def _leave_out_head(model: nn.Module, stack: ExitStack) -> None:
    """Let a linear head give zeros until the stack is left."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is not None and is_dense_layer(head):
        num_tokens, _ = dense_shape(head)
        zeros = lambda hidden: hidden.new_zeros(*hidden.shape[:-1], num_tokens)  # noqa: E731
        stack.enter_context(forward_replaced(head, zeros))


def _block_names(model: nn.Module, module_names: list[str]) -> tuple[str, ...] | None:
    """Names of the blocks of the outermost ``ModuleList`` that all modules lie in."""
    for list_name, blocks in model.named_modules():
        inside = [name.removeprefix(f"{list_name}.") for name in module_names if name.startswith(f"{list_name}.")]
        if isinstance(blocks, nn.ModuleList) and len(inside) == len(module_names) and all("." in n for n in inside):
            return tuple(f"{list_name}.{index}" for index in range(len(blocks)))
    return None


def _watch(
    model: nn.Module, blocks: tuple[nn.Module, ...], inputs: Mapping[str, Any]
) -> tuple[list[tuple[Tensor, BlockCall]], list[Any], Tensor]:
    """Calls and outputs of the blocks in one true run, nothing where one ran out of order; and the logits."""
    order: list[nn.Module] = []
    calls: list[tuple[Tensor, BlockCall]] = []
    outputs: list[Any] = []

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        order.append(block)
        if args or _HIDDEN in kwargs:
            calls.append(BlockCall.split(args, kwargs))
        outputs.append(output)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        logits = model(**inputs, use_cache=False).logits
    return (calls, outputs, logits) if order == list(blocks) else ([], [], logits)


def _are_chained(blocks: tuple[nn.Module, ...], calls: list[tuple[Tensor, BlockCall]], outputs: list[Any]) -> bool:
    """Whether every block ran once, in order, on what the one before returned."""
    if not len(blocks) == len(calls) == len(outputs):
        return False
    if any(isinstance(output, tuple) and len(output) != 1 for output in outputs):
        return False
    hidden = [_hidden(output) for output in outputs]
    if not all(isinstance(tensor, Tensor) for tensor in (calls[0][0], *hidden)):
        return False
    return all(read is wrote for (read, _), wrote in zip(calls[1:], hidden, strict=False))


def _hidden(output: Any) -> Any:
    """Hidden states of what a block returned."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def forward_replaced(block: nn.Module, forward: Any) -> Iterator[None]:
    """A forward of the instance's own, which an offloaded block has already."""
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _identical(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, or both not a number: the pass itself says more clearly what is not finite."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _equal(call: BlockCall, other: BlockCall) -> bool:
    """Whether two calls pass the same values; an object that cannot be looked into counts as another one."""
    return _same(call.args, other.args) and _same(dict(call.kwargs), dict(other.kwargs))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, (bool, int, float, str, torch.dtype, torch.device, type(None))) and one == other
