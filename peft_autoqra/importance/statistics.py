"""What calibration knows of each linear module: second moments of its inputs and of its output gradients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.whole_file import read_tensors, write_tensors

FORMAT_VERSION = 2
"""Raised when the same data would give other statistics, so that old caches are not used."""

_GRAM = "input_gram"
_GRADIENT = "output_gradient_second_moment"
_HEADER = "autoqra_calibration_statistics"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleStatistics:
    """Second moments of one linear module ``y = W x`` over the calibration positions.

    Write g for the gradient, with respect to y at one position, of the summed losses of tokens drawn from the model's
    own predictions. Replacing W by W + dW moves the loss, in nats per predicted token, by about
    ``1/2 sum over positions (g^T dW x)^2 / num_predictions``: to second order that is the divergence of the new
    predictions from the old, with the Fisher matrix as Hessian (Amari 1998) and its terms between positions and
    modules dropped. With g taken as independent of x and its components as uncorrelated (K-FAC, Martens & Grosse
    2015, with a diagonal output factor) it is
    ``1/2 sum_i output_gradient_second_moment[i] * (dW input_gram dW^T)[i, i]``.

    Attributes:
        input_gram: ``E[x x^T]``, mean over positions, ``[in_features, in_features]``, float32; of very wide inputs
            the diagonal only, ``[in_features]``. One tensor object for all modules that read the same input.
        output_gradient_second_moment: sum over positions of ``g_i^2``, divided by the number of predicted tokens,
            ``[out_features]``, float32; the mean over positions where every position predicts a token.
        num_tokens: positions the module was measured at.
    """

    input_gram: Tensor
    output_gradient_second_moment: Tensor
    num_tokens: int

    @property
    def input_second_moment(self) -> Tensor:
        """``E[x_j^2]``, ``[in_features]``, float32: the weights of the quantizer's fit."""
        return self.input_gram.diagonal().clone() if self.input_gram.dim() == 2 else self.input_gram


class CalibrationStatistics(Mapping[str, ModuleStatistics]):
    """Immutable mapping from module names to their statistics.

    Args:
        modules: module name (as in ``named_modules()``) to its statistics.
        fingerprint: names the model, data and settings they were measured with.

    Raises:
        CalibrationError: no modules.
    """

    def __init__(self, modules: Mapping[str, ModuleStatistics], *, fingerprint: str = "") -> None:
        """Freeze."""
        if not modules:
            raise CalibrationError("Calibration statistics need at least one module; check target_modules.")
        self._modules = dict(modules)
        self.fingerprint = fingerprint

    def __getitem__(self, module_name: str) -> ModuleStatistics:
        """The statistics of one module."""
        try:
            return self._modules[module_name]
        except KeyError:
            raise KeyError(f"{module_name!r} was not calibrated; calibrate it with the other modules.") from None

    def __iter__(self) -> Iterator[str]:
        """Module names in the order given."""
        return iter(self._modules)

    def __len__(self) -> int:
        """Number of modules."""
        return len(self._modules)


class StatisticsStore:
    """Takes statistics part by part, in memory or in files.

    Args:
        directory: one safetensors file a part; None keeps the parts in memory.
        fingerprint: names the model, data and settings; files of another one count as missing.
    """

    def __init__(self, directory: Path | None, fingerprint: str) -> None:
        """Nothing is read yet."""
        self._directory, self._fingerprint = directory, fingerprint
        self._modules: dict[str, ModuleStatistics] = {}

    def add(self, part: int, modules: Mapping[str, ModuleStatistics]) -> None:
        """Keep some modules' statistics; what is on disk is there as a whole or not at all."""
        for name, statistics in modules.items():
            _check(name, statistics)
        if self._directory is None:
            self._modules.update(modules)
            return
        _save(modules, self._directory / f"part-{part:05d}.safetensors", self._fingerprint)

    def load(self, module_names: Iterable[str]) -> CalibrationStatistics | None:
        """The statistics of these modules, those on disk mapped and not read; None where some are missing."""
        modules = dict(self._modules)
        if self._directory is not None:
            for path in sorted(self._directory.glob("part-*.safetensors")):
                modules.update(_load(path, self._fingerprint))
        try:
            return CalibrationStatistics({name: modules[name] for name in module_names}, fingerprint=self._fingerprint)
        except KeyError:
            return None


def _save(modules: Mapping[str, ModuleStatistics], path: Path, fingerprint: str) -> None:
    """Write one file; a Gram that modules share is written once."""
    owners: dict[int, str] = {}
    tensors, header = {}, {}
    for name, statistics in modules.items():
        owner = owners.setdefault(id(statistics.input_gram), name)
        tensors[f"{_GRAM}:{owner}"] = statistics.input_gram.contiguous()
        tensors[f"{_GRADIENT}:{name}"] = statistics.output_gradient_second_moment.contiguous()
        header[name] = {"gram_owner": owner, "num_tokens": statistics.num_tokens}
    content = {"version": FORMAT_VERSION, "fingerprint": fingerprint, "modules": header}
    write_tensors(path, tensors, {_HEADER: json.dumps(content)})


def _load(path: Path, fingerprint: str) -> dict[str, ModuleStatistics]:
    """Read what :func:`_save` wrote; nothing where the file is damaged or of something else."""
    try:
        tensors, metadata = read_tensors(path)
        content = json.loads(metadata[_HEADER])
        if (content["version"], content["fingerprint"]) != (FORMAT_VERSION, fingerprint):
            return {}
        return {
            name: ModuleStatistics(
                input_gram=tensors[f"{_GRAM}:{entry['gram_owner']}"],
                output_gradient_second_moment=tensors[f"{_GRADIENT}:{name}"],
                num_tokens=entry["num_tokens"],
            )
            for name, entry in content["modules"].items()
        }
    except (CalibrationError, KeyError, ValueError):
        return {}


def _check(name: str, statistics: ModuleStatistics) -> None:
    gram, gradient = statistics.input_gram, statistics.output_gradient_second_moment
    if gram.dim() not in (1, 2) or gram.shape[0] != gram.shape[-1] or gradient.dim() != 1:
        raise CalibrationError(
            f"Statistics of {name!r} have shapes {tuple(gram.shape)} and {tuple(gradient.shape)}; "
            "[in, in] (or [in]) and [out] are needed."
        )
    if statistics.num_tokens < 1:
        raise CalibrationError(f"Statistics of {name!r} rest on no tokens; calibrate with more data.")
    if not (torch.isfinite(gram).all() and torch.isfinite(gradient).all()):
        raise CalibrationError(f"Statistics of {name!r} are not finite; check the model's weights and precision.")
