"""A model as a chain of blocks, so that one block after the other can be run over all data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        return output if isinstance(output, Tensor) else output[0]


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

        None where modules lie outside the blocks, or where blocks share more than their hidden states.
        """
        names = _block_names(model, module_names)
        if names is None:
            return None
        blocks = tuple(model.get_submodule(name) for name in names)
        calls, outputs = _watch(model, blocks, inputs)
        if not _are_chained(blocks, calls, outputs):
            return None
        chain = cls(model, names, blocks, isinstance(outputs[0], tuple))
        first, again, _ = chain.around(inputs)
        same_calls = all(_equal(call, other) for (_, call), other in zip(calls, again, strict=True))
        return chain if same_calls and torch.equal(first, calls[0][0]) else None

    def around(self, inputs: Mapping[str, Any], last: Tensor | None = None) -> tuple[Tensor, list[BlockCall], Any]:
        """Run everything but the blocks.

        Args:
            inputs: of the model.
            last: hidden states that the last block shall seem to return.

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
                stack.enter_context(_forward_replaced(block, stand_in))
            output = self.model(**inputs, use_cache=False)
        return seen[0][0].detach(), [call for _, call in seen], output


def _block_names(model: nn.Module, module_names: list[str]) -> tuple[str, ...] | None:
    """Names of the blocks of the outermost ``ModuleList`` that all modules lie in."""
    for list_name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and all(name.startswith(f"{list_name}.") for name in module_names):
            return tuple(f"{list_name}.{index}" for index in range(len(blocks)))
    return None


def _watch(
    model: nn.Module, blocks: tuple[nn.Module, ...], inputs: Mapping[str, Any]
) -> tuple[list[tuple[Tensor, BlockCall]], list[Any]]:
    """Calls and outputs of the blocks in one true run, in the order they ran; nothing where one ran out of order."""
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
        with torch.no_grad():
            model(**inputs, use_cache=False)
    return (calls, outputs) if order == list(blocks) else ([], [])


def _are_chained(blocks: tuple[nn.Module, ...], calls: list[tuple[Tensor, BlockCall]], outputs: list[Any]) -> bool:
    """Whether every block ran once, in order, on what the one before returned."""
    if not len(blocks) == len(calls) == len(outputs):
        return False
    hidden = []
    for output in outputs:
        if isinstance(output, tuple) and len(output) != 1:
            return False
        hidden.append(output[0] if isinstance(output, tuple) else output)
    if not all(isinstance(tensor, Tensor) for tensor in (calls[0][0], *hidden)):
        return False
    return all(read is wrote for (read, _), wrote in zip(calls[1:], hidden, strict=False))


@contextmanager
def _forward_replaced(block: nn.Module, forward: Any) -> Iterator[None]:
    """A forward of the instance's own, which an offloaded block has already."""
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _equal(call: BlockCall, other: BlockCall) -> bool:
    """Whether two calls pass the same values, as far as tensors show."""
    mine, theirs = list(_tensors((call.args, call.kwargs))), list(_tensors((other.args, other.kwargs)))
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
