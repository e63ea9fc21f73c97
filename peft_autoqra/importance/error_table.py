"""Estimated loss rise of every (module, bits, rank), from one decomposition per module and bit-width."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.compensation import InputMetric, output_scale, whiten_error
from peft_autoqra.importance.statistics import CalibrationStatistics, ModuleStatistics
from peft_autoqra.plan import DENSE_BITS
from peft_autoqra.search_space import SearchSpace

FORMAT_VERSION = 1

_HEADER = "autoqra_error_table"

Quantize = Callable[[Tensor, int, Tensor], Tensor]
"""(weight ``[N, K]`` float32, bits, input second moment ``[K]``) to the dequantized weight ``[N, K]``."""

CorrectionSink = Callable[[str, int, Tensor, Tensor], None]
"""Receives (module name, bits, left ``[N, r]``, right ``[r, K]``), float32, with ``r = min(max_rank, N, K)``."""


@dataclass(frozen=True, kw_only=True)
class ErrorTableSettings:
    """Everything that the values of an error table depend on, beside the statistics and the weights.

    Attributes:
        bit_choices: bit-widths to measure; 16 may be among them and costs nothing.
        max_rank: largest rank; all smaller ones come with it.
        fingerprint: names the model, the calibration data and the quantizer.
        damping: see :class:`InputMetric`.
        gradient_floor: see :func:`output_scale`.

    Raises:
        CalibrationError: a negative rank or no bit-widths.
    """

    bit_choices: tuple[int, ...]
    max_rank: int
    fingerprint: str = ""
    damping: float = 1e-3
    gradient_floor: float = 1e-2

    def __post_init__(self) -> None:
        """Check; drop the bit-width that needs no measuring."""
        if not self.bit_choices or self.max_rank < 0:
            raise CalibrationError(f"bit_choices={self.bit_choices}, max_rank={self.max_rank}: nothing to measure.")
        object.__setattr__(self, "bit_choices", tuple(bits for bits in self.bit_choices if bits != DENSE_BITS))


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Estimated loss rise, in nats per token, of quantizing one module and compensating it at a rank.

    ``rise(bits, rank) = 1/2 sum over i > rank of sigma_i^2``, with sigma the singular values of the whitened
    quantization error (see :class:`ModuleStatistics` for why that is a loss). The estimates of modules add up.

    Attributes:
        module_names: the modules, in the order of the first axis.
        rises: ``[num_modules, len(settings.bit_choices), settings.max_rank + 1]``, float64; last axis is the rank.
        settings: what they were measured with.
    """

    module_names: tuple[str, ...]
    rises: npt.NDArray[np.float64]
    settings: ErrorTableSettings

    def __post_init__(self) -> None:
        """Check the shape."""
        shape = (len(self.module_names), len(self.settings.bit_choices), self.settings.max_rank + 1)
        if self.rises.shape != shape or not np.isfinite(self.rises).all():
            raise CalibrationError(f"An error table of shape {self.rises.shape} must be finite and of shape {shape}.")

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
        measured = self.settings.bit_choices
        missing = [bits for bits in bit_choices if bits not in measured and bits != DENSE_BITS]
        if module_name not in self._positions or missing or max(rank_choices) > self.settings.max_rank:
            raise CalibrationError(
                f"{module_name!r} at bits {bit_choices} and ranks {rank_choices} is not in the error table, which has "
                f"bits {measured} and ranks up to {self.settings.max_rank}; build it with these choices."
            )
        rises = self.rises[self._positions[module_name]][:, list(rank_choices)]
        zero = np.zeros(len(rank_choices))
        return np.stack([zero if bits == DENSE_BITS else rises[measured.index(bits)] for bits in bit_choices])

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.module_names)}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; settings and module names go into its header."""
        content = {"version": FORMAT_VERSION, "modules": self.module_names, "settings": asdict(self.settings)}
        save_file({"rises": self.rises}, path, metadata={_HEADER: json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path, settings: ErrorTableSettings) -> ErrorTable:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: the file is damaged, of another format, or was built with other settings.
        """
        try:
            with safe_open(path, framework="np") as file:
                content = json.loads((file.metadata() or {})[_HEADER])
                rises = file.get_tensor("rises")
        except (SafetensorError, KeyError, ValueError) as error:
            raise CalibrationError(f"{path} is no error table or damaged ({error}); delete it and rebuild.") from error
        found = {**content["settings"], "version": content["version"]}
        wanted = {**asdict(settings), "bit_choices": list(settings.bit_choices), "version": FORMAT_VERSION}
        differing = {key: (found.get(key), value) for key, value in wanted.items() if found.get(key) != value}
        if differing:
            raise CalibrationError(f"{path} was built with other settings (found, wanted): {differing}; rebuild it.")
        return cls(tuple(content["modules"]), rises, settings)


def build_error_table(
    weights: Iterable[tuple[str, Tensor]],
    statistics: CalibrationStatistics,
    quantize: Quantize,
    settings: ErrorTableSettings,
    *,
    on_correction: CorrectionSink | None = None,
) -> ErrorTable:
    """Quantize every module at every bit-width and measure what the best correction of each rank leaves.

    Modules that share an input are cheapest when they follow each other. Wrap ``weights`` in ``tqdm`` to see progress.

    Args:
        weights: module names and weights ``[out_features, in_features]``, from :func:`linear_weights`.
        statistics: of at least these modules.
        quantize: the quantizer that will be used.
        settings: bit-widths, largest rank and metric.
        on_correction: receives the correction of the largest rank for every module and bit-width; its first r
            components are the best correction of rank r.

    Returns:
        The table, with modules in the order of ``weights``.

    Raises:
        CalibrationError: no modules, one that was not calibrated, or one of another shape.
    """
    names: list[str] = []
    rises: list[npt.NDArray[np.float64]] = []
    gram, metric = None, None
    for name, weight in weights:
        if name not in statistics:
            raise CalibrationError(f"{name!r} was not calibrated; calibrate it with the other modules.")
        if metric is None or gram is not statistics[name].input_gram:
            gram = statistics[name].input_gram
            metric = InputMetric(gram.to(weight.device), settings.damping)
        module = _Module(name, weight.detach().float(), statistics[name], metric)
        names.append(name)
        rises.append(_measure(module, quantize, settings, on_correction))
    if not names:
        raise CalibrationError("There are no modules to build an error table for; check target_modules.")
    return ErrorTable(tuple(names), np.stack(rises), settings)


@dataclass(frozen=True, eq=False)
class _Module:
    """One module with what its measurement needs."""

    name: str
    weight: Tensor
    statistics: ModuleStatistics
    metric: InputMetric

    def __post_init__(self) -> None:
        """Check that the statistics are those of such a weight."""
        wanted = (len(self.statistics.output_gradient_second_moment), len(self.metric.moment))
        if self.weight.shape != wanted:
            raise CalibrationError(
                f"{self.name!r} has a weight of shape {tuple(self.weight.shape)}, but was calibrated with {wanted}; "
                "calibrate the model that is to be quantized."
            )


def _measure(
    module: _Module, quantize: Quantize, settings: ErrorTableSettings, on_correction: CorrectionSink | None
) -> npt.NDArray[np.float64]:
    """Rises of one module, ``[num_bits, max_rank + 1]``."""
    weight = module.weight
    moment = module.statistics.input_second_moment.to(weight.device)
    scale = output_scale(module.statistics.output_gradient_second_moment.to(weight.device), settings.gradient_floor)
    rises = np.zeros((len(settings.bit_choices), settings.max_rank + 1))
    for index, bits in enumerate(settings.bit_choices):
        whitened = whiten_error(weight - quantize(weight, bits, moment), module.metric, scale)
        rises[index] = whitened.residuals(settings.max_rank).cpu().numpy() / 2
        if on_correction is not None:
            on_correction(module.name, bits, *whitened.factors(min(settings.max_rank, *weight.shape)))
    return rises
