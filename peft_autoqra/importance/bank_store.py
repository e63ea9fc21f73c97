"""Where a calibration bank lies: in memory, or in mapped files that the next search reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.whole_file import read_tensors, write_tensors
from peft_autoqra.plan_calibration import Correction, StoredCodes
from peft_autoqra.quant.quantized_weight import QuantizedWeight, WeightFormat

_HEADER = "autoqra_bank"


@dataclass(frozen=True, eq=False)
class BankEntry:
    """One module at one bit-width.

    Attributes:
        weight: quantized.
        correction: of the largest rank; its first r components are the best correction of rank r.
        rises: estimated loss rise at each rank, ``[max_rank + 1]``, float64, nats per token.
        input_second_moment: what the fit was weighted with, ``[in_features]``, float32.
    """

    weight: QuantizedWeight
    correction: Correction
    rises: npt.NDArray[np.float64]
    input_second_moment: npt.NDArray[np.float32]

    @property
    def codes(self) -> StoredCodes:
        """The weight as a plan carries it; not copied."""
        weight = self.weight
        tensors = (weight.codes, weight.scale_codes, weight.scale_base)
        codes, scale_codes, scale_base = (tensor.numpy() for tensor in tensors)
        return StoredCodes(codes=codes, scale_codes=scale_codes, scale_base=scale_base)


class BankStore:
    """Keeps entries by module name and bits.

    Args:
        directory: one safetensors file an entry; None keeps them in memory.
    """

    def __init__(self, directory: Path | None) -> None:
        """Nothing is read yet."""
        self._directory = directory
        self._entries: dict[tuple[str, int], BankEntry] = {}

    def put(self, name: str, bits: int, entry: BankEntry) -> None:
        """Keep an entry; its file appears as a whole or not at all."""
        if self._directory is None:
            self._entries[name, bits] = entry
            return
        weight, correction = entry.weight, entry.correction
        tensors: dict[str, Tensor] = {
            "codes": weight.codes,
            "scale_codes": weight.scale_codes,
            "scale_base": weight.scale_base,
            "left": torch.from_numpy(np.ascontiguousarray(correction.left)),
            "right": torch.from_numpy(np.ascontiguousarray(correction.right)),
            "rises": torch.from_numpy(entry.rises),
            "input_second_moment": torch.from_numpy(entry.input_second_moment),
        }
        header = json.dumps({"module": name, "format": asdict(weight.format)})
        write_tensors(self._path(name, bits), tensors, {_HEADER: header})

    def get(self, name: str, bits: int) -> BankEntry | None:
        """An entry, its tensors mapped from the file; None where there is none or a damaged one."""
        if self._directory is None:
            return self._entries.get((name, bits))
        try:
            tensors, metadata = read_tensors(self._path(name, bits))
            header = json.loads(metadata[_HEADER])
            weight_format = WeightFormat(**header["format"])
            if (header["module"], weight_format.bits) != (name, bits):
                return None
            return BankEntry(
                QuantizedWeight(weight_format, tensors["codes"], tensors["scale_codes"], tensors["scale_base"]),
                Correction(left=tensors["left"].numpy(), right=tensors["right"].numpy()),
                tensors["rises"].numpy(),
                tensors["input_second_moment"].numpy(),
            )
        except (CalibrationError, KeyError, ValueError, TypeError):
            return None

    def _path(self, name: str, bits: int) -> Path:
        return Path(self._directory or "", f"{bits}bit", f"{quote(name, safe='')}.safetensors")
