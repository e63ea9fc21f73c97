"""Estimated loss rise of every (module, bits, rank), from one decomposition per module and bit-width."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peft_autoqra.errors import CalibrationError
from peft_autoqra.plan import DENSE_BITS
from peft_autoqra.replaced_file import replaced_file
from peft_autoqra.search_space import SearchSpace

FORMAT_VERSION = 2

_HEADER = "autoqra_error_table"


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Estimated loss rise, in nats per token, of quantizing one module and compensating it at a rank.

    ``rise(bits, rank) = 1/2 sum over i > rank of sigma_i^2``, with sigma the singular values of the whitened
    quantization error (see :class:`ModuleStatistics` for why that is a loss). The estimates of modules add up.

    Attributes:
        module_names: the modules, in the order of the first axis.
        bit_choices: the bit-widths, in the order of the second axis; 16 is none of them, since it costs nothing.
        rises: ``[num_modules, num_bits, max_rank + 1]``, float64; last axis is the rank.
        fingerprint: names the model, data, quantizer and settings they were measured with.

    Raises:
        CalibrationError: no modules, or values that are not finite or of another shape.
    """

    module_names: tuple[str, ...]
    bit_choices: tuple[int, ...]
    rises: npt.NDArray[np.float64]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Check the shape."""
        shape = (len(self.module_names), len(self.bit_choices))
        if not self.module_names or self.rises.shape[:-1] != shape or not np.isfinite(self.rises).all():
            raise CalibrationError(
                f"An error table of shape {self.rises.shape} must be finite and of shape {(*shape, 'ranks')}."
            )

    @property
    def max_rank(self) -> int:
        """Largest rank that was measured."""
        return int(self.rises.shape[-1]) - 1

    def rise(self, module_name: str, bits: int, rank: int) -> float:
        """Estimated loss rise of one module, nats per token; 0 at 16 bits."""
        return float(self._rises(module_name, (bits,), (rank,))[0, 0])

    def loss_table(self, space: SearchSpace) -> npt.NDArray[np.float64]:
        """Sums over the modules of each group, ``[num_groups, num_bits, num_ranks]``, nats per token.

        Raises:
            CalibrationError: the space has modules, bits or ranks that the table lacks.
        """
        return np.stack(
            [
                sum(
                    (self._rises(name, space.bit_choices, space.rank_choices) for name in group.modules),
                    start=np.zeros((len(space.bit_choices), len(space.rank_choices))),
                )
                for group in space.groups
            ]
        )

    def _rises(
        self, module_name: str, bit_choices: tuple[int, ...], rank_choices: tuple[int, ...]
    ) -> npt.NDArray[np.float64]:
        """Rises of one module, ``[len(bit_choices), len(rank_choices)]``."""
        measured = self.bit_choices
        missing = [bits for bits in bit_choices if bits not in measured and bits != DENSE_BITS]
        if module_name not in self._positions or missing or max(rank_choices) > self.max_rank:
            raise CalibrationError(
                f"{module_name!r} at bits {bit_choices} and ranks {rank_choices} is not in the error table, which has "
                f"bits {measured} and ranks up to {self.max_rank}; build it with these choices."
            )
        rises = self.rises[self._positions[module_name]][:, list(rank_choices)]
        zero = np.zeros(len(rank_choices))
        return np.stack([zero if bits == DENSE_BITS else rises[measured.index(bits)] for bits in bit_choices])

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.module_names)}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; names go into its header."""
        content = {
            "version": FORMAT_VERSION,
            "modules": self.module_names,
            "bit_choices": self.bit_choices,
            "fingerprint": self.fingerprint,
        }
        with replaced_file(Path(path)) as partial:
            save_file({"rises": np.ascontiguousarray(self.rises)}, partial, metadata={_HEADER: json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path) -> ErrorTable:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: the file is damaged or of another format.
        """
        try:
            with safe_open(path, framework="np") as file:
                content = json.loads((file.metadata() or {})[_HEADER])
                rises = file.get_tensor("rises")
        except (SafetensorError, KeyError, ValueError) as error:
            raise CalibrationError(f"{path} is no error table or damaged ({error}); delete it and rebuild.") from error
        if content["version"] != FORMAT_VERSION:
            raise CalibrationError(f"{path} has format {content['version']!r}, not {FORMAT_VERSION}; rebuild it.")
        return cls(tuple(content["modules"]), tuple(content["bit_choices"]), rises, content["fingerprint"])
