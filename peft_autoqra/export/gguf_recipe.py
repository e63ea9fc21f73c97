"""A plan's bit-widths as a recipe for llama.cpp's quantizer: one GGUF type for every planned tensor."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_autoqra.errors import ExportError, MissingDependencyError, PlanMismatchError
from peft_autoqra.export.adapter_config import CONFIG_FILE, read_adapter_config
from peft_autoqra.export.export_folder import export_folder
from peft_autoqra.hub_files import locate_file
from peft_autoqra.plan import DENSE_BITS, BitRankPlan
from peft_autoqra.tuner.target_checks import check_shape_and_rank
from peft_autoqra.units import format_bytes

TENSOR_TYPES_FILE = "tensor_types.txt"

_TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 8: "Q8_0"}
_SMALL_BLOCK_TYPE = "IQ4_NL"
"""For rows that the 256 weights of a K-quant's block do not divide: 4.5 bits a weight in blocks of 32, as Q4_0, which
llama.cpp itself falls back to, but with a smaller error."""
_FILE_TYPES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M"}
"""Where llama-quantize calls the type of a file otherwise than that of a tensor."""
_ARCHITECTURES = {
    "cohere": "command-r",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense",
    "ministral3": "mistral3",
    "mistral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
}
"""transformers' model type to GGUF's architecture, where they differ by more than separators and ``_text``; from the
model classes of llama.cpp's ``conversion/``."""


@dataclass(frozen=True)
class TensorType:
    """A planned module's tensor in a GGUF file.

    Attributes:
        module_name: as the plan names it.
        tensor_name: as GGUF names it.
        type_name: of ``ggml``, such as ``"Q4_K"``.
        num_weights: of the tensor.
        num_bytes: of the tensor in that type.
        fallback: which type it falls back from, to which and why; None where it has the type of its bits.
    """

    module_name: str
    tensor_name: str
    type_name: str
    num_weights: int
    num_bytes: int
    fallback: str | None = None

    @property
    def line(self) -> str:
        """For ``--tensor-type-file``: a regular expression that finds this tensor only, and the type."""
        return f"^{re.escape(self.tensor_name)}$={self.type_name}"


@dataclass(frozen=True, kw_only=True)
class GGUFRecipe:
    """How to quantize a model with llama.cpp.

    Attributes:
        architecture: GGUF's name of it.
        tensors: the planned ones.
        remaining_type: of all other matrices; the same 16 bits that planned ones without quantization keep.
        remaining_bytes: of all tensors that are not planned.
    """

    architecture: str
    tensors: tuple[TensorType, ...]
    remaining_type: str
    remaining_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the quantized file; its header and vocabulary come on top."""
        return self.remaining_bytes + sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the planned tensors, scales included."""
        num_weights = sum(tensor.num_weights for tensor in self.tensors)
        return 8 * sum(tensor.num_bytes for tensor in self.tensors) / num_weights

    @property
    def file_type(self) -> str:
        """The type to call the file by: that of most planned weights. It decides about no tensor."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.type_name != self.remaining_type:
                counts[tensor.type_name] += tensor.num_weights
        if not counts:
            return self.remaining_type
        most = counts.most_common(1)[0][0]
        return _FILE_TYPES.get(most, most)

    def tensor_types(self) -> str:
        """Content of the file for ``--tensor-type-file``. The first expression that finds a tensor decides."""
        return "\n".join([*(tensor.line for tensor in self.tensors), f".={self.remaining_type}"]) + "\n"

    def commands(self, folder: str | Path) -> str:
        """What to run in llama.cpp's folder.

        Args:
            folder: where the file of the tensor types is.
        """
        dense, mixed = f"model-{self.remaining_type}.gguf", "model-mixed.gguf"
        tensor_types = shlex.quote(f"{folder}/{TENSOR_TYPES_FILE}")
        return (
            f"python convert_hf_to_gguf.py MERGED_MODEL --outtype {self.remaining_type.lower()} --outfile {dense}\n"
            f"llama-quantize --tensor-type-file {tensor_types} {dense} {mixed} {self.file_type}"
        )

    def summary(self) -> str:
        """Types, bits and bytes in a few lines."""
        counts = Counter(tensor.type_name for tensor in self.tensors)
        types = ", ".join(f"{count} as {name}" for name, count in sorted(counts.items()))
        return (
            f"{len(self.tensors)} planned tensors: {types}; {self.bits_per_weight:.2f} bits per weight. All other "
            f"matrices as {self.remaining_type}. All tensors take {format_bytes(self.num_bytes)} "
            f"({self.num_bytes:,} bytes).{self._fallbacks()}"
        )

    def _fallbacks(self) -> str:
        """How many tensors have another type than that of their bits, and why."""
        counts = Counter(tensor.fallback for tensor in self.tensors if tensor.fallback)
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        return f" Tensors that fall back to another type: {counts.total()} ({reasons})." if counts else ""


def export_gguf_recipe(
    folder: str | Path, output_dir: str | Path, *, model_name_or_path: str | None = None
) -> GGUFRecipe:
    """Write the tensor types for ``llama-quantize``, and a README with the commands to run.

    Args:
        folder: folder or hub id of a plan or adapter.
        output_dir: new, empty or an earlier export.
        model_name_or_path: of the base model, where it is not the one that the plan, or else the adapter, names; only
            its configuration is read.

    Returns:
        What was written.

    Raises:
        ExportError: neither plan nor adapter names its base model, GGUF does not know its architecture or a module, or
            ``output_dir`` holds other files.
        HubError: a repository does not exist, gives no access or cannot be reached.
        InvalidPlanError: there is no plan.
        MissingDependencyError: the package ``gguf`` is not installed.
        PlanMismatchError: the plan is for another model.
    """
    with export_folder(output_dir, "gguf") as new:
        plan = BitRankPlan.from_pretrained(folder)
        base, revision = (model_name_or_path, None) if model_name_or_path else _base_model(plan, str(folder))
        recipe = gguf_recipe(plan, _empty_model(base, revision))
        (new / TENSOR_TYPES_FILE).write_text(recipe.tensor_types(), encoding="utf-8")
        (new / "README.md").write_text(_readme(recipe), encoding="utf-8")
    return recipe


def _base_model(plan: BitRankPlan, folder: str) -> tuple[str, str | None]:
    """Name and revision, as the plan says; else as the adapter that holds it says."""
    if plan.base_model.name_or_path is not None:
        return plan.base_model.name_or_path, plan.base_model.revision
    if locate_file(CONFIG_FILE, folder) is not None:
        config = read_adapter_config(folder)
        if config.base_model_name_or_path is not None:
            return config.base_model_name_or_path, config.revision
    raise ExportError(f"What is in {folder!r} does not name its base model; give --model_name_or_path.")


def gguf_recipe(plan: BitRankPlan, model: PreTrainedModel) -> GGUFRecipe:
    """Choose a GGUF type of about the planned bits for every planned module.

    Args:
        plan: of the model.
        model: unquantized; may be on the meta device.

    Raises:
        ExportError: GGUF does not know the architecture, or has no tensor for a planned module.
        MissingDependencyError: the package ``gguf`` is not installed.
        PlanMismatchError: the plan names modules or shapes that the model does not have.
    """
    gguf = _import_gguf()
    architecture = _architecture(model.config, gguf)
    tensor_names = _tensor_names(plan, model, architecture, gguf)
    dense_type = "BF16" if model.dtype == torch.bfloat16 else "F16"
    shapes = {name: _shape(model.get_submodule(name)) for name in plan}
    for name, layer in plan.items():
        check_shape_and_rank(name, shapes[name], layer, plan)
    tensors = tuple(
        _tensor_type(name, tensor_names[name], layer.bits, shapes[name], dense_type, gguf)
        for name, layer in plan.items()
    )
    planned = {f"{name}.weight" for name in plan}
    remaining = [parameter for name, parameter in model.named_parameters() if name not in planned]
    return GGUFRecipe(
        architecture=architecture,
        tensors=tensors,
        remaining_type=dense_type,
        # llama.cpp keeps vectors (norms, biases) in float32
        remaining_bytes=sum(p.numel() * (4 if p.dim() < 2 else 2) for p in remaining),
    )


def _import_gguf() -> ModuleType:
    try:
        import gguf  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF's names of architectures and tensors come from the package gguf: pip install 'peft-autoqra[gguf]'"
        ) from error
    return gguf


def _empty_model(base: str, revision: str | None) -> PreTrainedModel:
    """The base model without weights, on the meta device."""
    try:
        config = AutoConfig.from_pretrained(base, revision=revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"The configuration of {base!r} cannot be loaded: {reason}") from error


def _architecture(config: PretrainedConfig, gguf: ModuleType) -> str:
    known: dict[str, str] = {_plain(name): name for name in gguf.MODEL_ARCH_NAMES.values()}
    model_type = config.model_type.removesuffix("_text")
    architecture = _ARCHITECTURES.get(model_type) or known.get(_plain(model_type))
    if architecture is None:
        raise ExportError(
            f"GGUF knows no architecture for models of type {config.model_type!r}; it knows "
            f"{', '.join(sorted(known.values()))}."
        )
    return architecture


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _tensor_names(plan: BitRankPlan, model: PreTrainedModel, architecture: str, gguf: ModuleType) -> dict[str, str]:
    modules = dict(model.named_modules())
    missing = [name for name in plan if name not in modules]
    if missing:
        raise PlanMismatchError(
            f"The plan names {len(missing)} modules that the model does not have, such as {missing[0]!r}; give the "
            "model that it was made for."
        )
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    found = {name: names.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in plan}
    # Converted otherwise than tensor by tensor, such as the experts of one layer, which become one tensor.
    unnamed = [name for name, tensor in found.items() if tensor is None]
    counts = Counter(found.values())
    shared = [name for name, tensor in found.items() if counts[tensor] > 1]
    if unnamed or shared:
        raise ExportError(
            f"{(unnamed or shared)[0]!r} has no tensor of its own in GGUF files of architecture {architecture!r}; "
            "leave such modules out of the plan."
        )
    return found


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    rows, columns = layer.weight.shape  # type: ignore[misc, union-attr]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _tensor_type(
    module_name: str, tensor_name: str, bits: int, shape: tuple[int, int], dense_type: str, gguf: ModuleType
) -> TensorType:
    out_features, in_features = shape
    candidates = [dense_type] if bits == DENSE_BITS else [_TYPES[bits], _SMALL_BLOCK_TYPE, dense_type]
    fallback = None
    for type_name in candidates:
        block_weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
        if in_features % block_weights == 0:
            break
        not_divided = f"rows of {in_features} weights are not divisible by {block_weights}"
    if type_name != candidates[0]:
        fallback = f"from {candidates[0]} to {type_name}, since {not_divided}"
    num_weights = out_features * in_features
    num_bytes = num_weights // block_weights * block_bytes
    return TensorType(module_name, tensor_name, type_name, num_weights, num_bytes, fallback)


def _readme(recipe: GGUFRecipe) -> str:
    return f"""# Mixed-bit GGUF ({recipe.architecture})

```bash
{recipe.commands("THIS_FOLDER")}
```

Run them in llama.cpp's folder. MERGED_MODEL: written by `autoqra export ADAPTER --to merged`.

{recipe.summary()}

`llama-quantize` quantizes anew, to formats of its own: its file has about the planned bits, and not the plan's
quantized weights. An importance matrix (`--imatrix`) lowers the error, most of all at 2 and 3 bits.
"""
