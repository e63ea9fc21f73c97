"""What calibration knows of each linear module: second moments of its inputs and of its output gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_autoqra.errors import CalibrationError

FORMAT_VERSION = 1

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
        input_gram: ``E[x x^T]``, mean over positions, ``[in_features, in_features]``, float32. One tensor object
            for all modules that read the same input.
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
        return self.input_gram.diagonal().clone()


class CalibrationStatistics(Mapping[str, ModuleStatistics]):
    """Immutable mapping from module names to their statistics.

    Args:
        modules: module name (as in ``named_modules()``) to its statistics.
        fingerprint: names the model, data and settings they were measured with; checked by :meth:`load`.

    Raises:
        CalibrationError: no modules, or statistics that are not finite or have the wrong shape.
    """

    def __init__(self, modules: Mapping[str, ModuleStatistics], *, fingerprint: str = "") -> None:
        """Check and freeze."""
        if not modules:
            raise CalibrationError("Calibration statistics need at least one module; check target_modules.")
        for name, statistics in modules.items():
            _check(name, statistics)
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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; a Gram that modules share is written once."""
        owners: dict[int, str] = {}
        tensors, header = {}, {}
        for name, statistics in self._modules.items():
            owner = owners.setdefault(id(statistics.input_gram), name)
            tensors[f"{_GRAM}:{owner}"] = statistics.input_gram.contiguous()
            tensors[f"{_GRADIENT}:{name}"] = statistics.output_gradient_second_moment.contiguous()
            header[name] = {"gram_owner": owner, "num_tokens": statistics.num_tokens}
        content = {"version": FORMAT_VERSION, "fingerprint": self.fingerprint, "modules": header}
        save_file(tensors, path, metadata={_HEADER: json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> CalibrationStatistics:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            fingerprint: refuse a file with another fingerprint; None takes any.

        Raises:
            CalibrationError: the file is damaged, of another format or fingerprint.
        """
        try:
            with safe_open(path, framework="pt") as file:
                content = _read_header(file.metadata(), path)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CalibrationError(f"{path} is damaged ({error}); delete it and calibrate again.") from error
        if fingerprint is not None and content["fingerprint"] != fingerprint:
            raise CalibrationError(
                f"{path} was measured with {content['fingerprint']!r}, not {fingerprint!r}; calibrate again."
            )
        try:
            modules = {
                name: ModuleStatistics(
                    input_gram=tensors[f"{_GRAM}:{entry['gram_owner']}"],
                    output_gradient_second_moment=tensors[f"{_GRADIENT}:{name}"],
                    num_tokens=entry["num_tokens"],
                )
                for name, entry in content["modules"].items()
            }
        except KeyError as error:
            raise CalibrationError(f"{path} lacks {error}; delete it and calibrate again.") from error
        return cls(modules, fingerprint=content["fingerprint"])


def _read_header(metadata: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((metadata or {})[_HEADER])
    except (KeyError, ValueError) as error:
        raise CalibrationError(f"{path} holds no calibration statistics; calibrate again.") from error
    if content.get("version") != FORMAT_VERSION:
        raise CalibrationError(f"{path} has format {content.get('version')!r}, not {FORMAT_VERSION}; calibrate again.")
    return content


def _check(name: str, statistics: ModuleStatistics) -> None:
    gram, gradient = statistics.input_gram, statistics.output_gradient_second_moment
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gradient.dim() != 1:
        raise CalibrationError(
            f"Statistics of {name!r} have shapes {tuple(gram.shape)} and {tuple(gradient.shape)}; "
            "[in, in] and [out] are needed."
        )
    if statistics.num_tokens < 1:
        raise CalibrationError(f"Statistics of {name!r} rest on no tokens; calibrate with more data.")
    if not (torch.isfinite(gram).all() and torch.isfinite(gradient).all()):
        raise CalibrationError(f"Statistics of {name!r} are not finite; check the model's weights and precision.")
