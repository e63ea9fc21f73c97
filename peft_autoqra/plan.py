"""The plan: weight bits and LoRA rank of every module, and all that is needed to rebuild them."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import reprlib
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub import ModelCard, ModelHubMixin

from peft_autoqra import plan_file
from peft_autoqra.card_pictures import PICTURE_FILES, write_card_pictures
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.hub_files import locate_file
from peft_autoqra.hub_repository import PushTarget, opened
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.model_card import PlanCard, is_plan_card
from peft_autoqra.module_names import check_module_name
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, CALIBRATION_FILE, PlanCalibration
from peft_autoqra.plan_file import ADAPTER_FILE, PLAN_FILE

SUPPORTED_BITS = (2, 3, 4, 8, 16)
DENSE_BITS = 16
_CARD_FILE = "README.md"
_MAX_TEXT_LENGTH = 4096  # the longest path
MAX_SIZE = 2**31 - 1
"""Of a side of a weight, and so of a rank."""


@dataclass(frozen=True, order=True)
class LayerPlan:
    """Weight bits and LoRA rank of one module; 16 bits means unquantized, rank 0 means no adapter.

    Raises:
        InvalidPlanError: bits are not one of 2, 3, 4, 8, 16 or the rank is not an integer from 0 to 2^31 - 1.
    """

    bits: int
    rank: int

    def __post_init__(self) -> None:
        """Check both values, and make plain integers of NumPy's, which JSON does not know."""
        if not _is_integer(self.bits) or self.bits not in SUPPORTED_BITS:
            raise InvalidPlanError(f"bits={self.bits!r} is not supported; choose one of {SUPPORTED_BITS}.")
        if not _is_integer(self.rank) or not 0 <= self.rank <= MAX_SIZE:
            raise InvalidPlanError(
                f"rank={self.rank!r} must be an integer of at least 0 (0 means no adapter) and at most {MAX_SIZE}."
            )
        object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "rank", int(self.rank))


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _checked_shape(name: str, shape: object) -> tuple[int, int]:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    if len(sizes) != 2 or not all(_is_integer(size) and 0 < size <= MAX_SIZE for size in sizes):
        raise InvalidPlanError(
            f"The plan gives {name!r} the shape {reprlib.repr(shape)}; give (out_features, in_features), two integers "
            f"from 1 to {MAX_SIZE}."
        )
    return int(sizes[0]), int(sizes[1])


BACKENDS = ("native", "gptq", "bitsandbytes")
"""Ways to quantize; each is a class in ``quant/backends.py``."""


@dataclass(frozen=True, kw_only=True)
class QuantizerSettings:
    """How the weights of a plan are quantized.

    Attributes:
        backend: ``"native"`` for the group-wise 2, 3, 4 and 8-bit format; ``"gptq"`` for the same with its codes
            found by error feedback, which only a calibrated plan can hold; ``"bitsandbytes"`` for NF4 with double
            quantization (4 bits) and row-wise int8 (8 bits).
        group_size: weights that share a scale; halved per module until it divides the module's input size.

    Raises:
        InvalidPlanError: unknown backend or a group size that is not a power of two of at least 8.
    """

    backend: Literal["native", "gptq", "bitsandbytes"] = "native"
    group_size: int = 64

    def __post_init__(self) -> None:
        """Check both values."""
        if self.backend not in BACKENDS:
            raise InvalidPlanError(f"quantizer backend {self.backend!r} is unknown; use one of {BACKENDS}.")
        if not _is_integer(self.group_size) or self.group_size < 8 or self.group_size & (self.group_size - 1):
            raise InvalidPlanError(f"group_size={self.group_size!r} must be a power of two of at least 8, such as 64.")
        object.__setattr__(self, "group_size", int(self.group_size))


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """The model a plan was made for.

    Attributes:
        name_or_path: hub id or folder, as given to ``from_pretrained``.
        revision: commit of the hub repository, where known.
        fingerprint: SHA-256 over names, shapes and samples of the weights (see ``fingerprint.py``).

    Raises:
        InvalidPlanError: a name or revision with characters that cannot be printed, or of more than 4,096.
    """

    name_or_path: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        """Check what others will read, in a model card among other places."""
        for field_name in ("name_or_path", "revision"):
            value = getattr(self, field_name)
            if value is not None and not _is_one_line(value):
                raise InvalidPlanError(
                    f"{field_name}={reprlib.repr(value)} of the base model must be text of printable characters, at "
                    f"most {_MAX_TEXT_LENGTH} of them; rename the folder, or give the hub id."
                )


def _is_one_line(value: object) -> bool:
    if not isinstance(value, str) or len(value) > _MAX_TEXT_LENGTH:
        return False
    return all(character.isprintable() or unicodedata.category(character) == "Zs" for character in value)


class BitRankPlan(
    Mapping[str, LayerPlan],
    ModelHubMixin,
    library_name="peft",
    tags=["autoqra", "lora", "quantization"],
):
    """Immutable mapping from module names to :class:`LayerPlan`, equal by value.

    Example:
        ```python
        plan = BitRankPlan({"model.layers.0.mlp.down_proj": LayerPlan(bits=8, rank=4)})
        plan.save_pretrained("plan")
        assert BitRankPlan.from_pretrained("plan") == plan
        ```

    Args:
        layers: module name (as in ``named_modules()`` of the base model) to its bits and rank.
        shapes: module name to weight shape ``(out_features, in_features)``; checked when the plan is applied.
        quantizer: how weights are quantized.
        initialization: ``"compensate"`` starts the adapters at the calibrated correction of the quantization error,
            ``"zero"`` as plain LoRA does.
        base_model: the model the plan was made for.
        memory: bytes by part, as estimated when the plan was made.
        provenance: JSON-ready record of how the plan was found.
        calibration: what calibration found: weights of the quantizer's fit, initial adapters. Not part of equality.

    Raises:
        InvalidPlanError: no layers, names that no module has, shapes for modules that the plan does not name or that
            are none, or ranks that do not fit the shapes.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerPlan],
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        quantizer: QuantizerSettings | None = None,
        initialization: Literal["compensate", "zero"] = "zero",
        base_model: BaseModelInfo | None = None,
        memory: MemoryEstimate | None = None,
        provenance: Mapping[str, Any] | None = None,
        calibration: PlanCalibration | None = None,
    ) -> None:
        """Check and freeze."""
        if not layers:
            raise InvalidPlanError("A plan needs at least one module.")
        for name, layer in layers.items():
            check_module_name(name)
            if not isinstance(layer, LayerPlan):
                raise InvalidPlanError(f"The plan of {name!r} is {layer!r}; give LayerPlan(bits=..., rank=...).")
        unknown = sorted(set(shapes or {}) - set(layers))
        if unknown:
            raise InvalidPlanError(f"Shapes are given for {reprlib.repr(unknown)}, which the plan does not name.")
        if initialization not in ("compensate", "zero"):
            raise InvalidPlanError(f"initialization={initialization!r} must be 'compensate' or 'zero'.")
        self._layers = dict(layers)
        self.shapes = {name: _checked_shape(name, shape) for name, shape in (shapes or {}).items()}
        self.quantizer = quantizer or QuantizerSettings()
        self.initialization = initialization
        self.base_model = base_model or BaseModelInfo()
        self.memory = memory
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.calibration = calibration
        self._check_ranks_fit()

    def _check_ranks_fit(self) -> None:
        for name, shape in self.shapes.items():
            if self._layers[name].rank > min(shape):
                raise InvalidPlanError(
                    f"rank {self._layers[name].rank} of {name!r} is above the smaller side of its weight {shape}; "
                    f"use at most {min(shape)}."
                )

    def __getitem__(self, module_name: str) -> LayerPlan:
        """The layer plan of a module; an unknown name gets suggestions."""
        try:
            return self._layers[module_name]
        except KeyError:
            close = difflib.get_close_matches(module_name, self._layers, n=3)
            hint = f" Close names: {close}." if close else ""
            raise KeyError(f"{module_name!r} is not in the plan.{hint}") from None

    def __contains__(self, module_name: object) -> bool:
        """Whether the plan names a module; without a search for suggestions."""
        return module_name in self._layers

    def __iter__(self) -> Iterator[str]:
        """Module names in the order given."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Number of modules."""
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        """Equal when layers, quantizer and initialization are: then they build the same model."""
        if isinstance(other, BitRankPlan):
            same_build = self.quantizer == other.quantizer and self.initialization == other.initialization
            return same_build and self._layers == other._layers
        if isinstance(other, Mapping):
            return self._layers == dict(other)
        return NotImplemented

    def __hash__(self) -> int:
        """Hash of the layers."""
        return hash(frozenset(self._layers.items()))

    def __deepcopy__(self, memo: dict[int, Any]) -> BitRankPlan:
        """Itself: it is immutable, and configurations that hold it are copied often."""
        return self

    def __repr__(self) -> str:
        """One line."""
        return (
            f"BitRankPlan({len(self)} modules, average_bits={self.average_bits:.2f}, "
            f"average_rank={self.average_rank:.2f}, initialization={self.initialization!r})"
        )

    def _weighted_mean(self, values: Mapping[str, int]) -> float:
        weights = {name: math.prod(self.shapes.get(name, (1, 1))) for name in self}
        if len(self.shapes) < len(self):
            weights = dict.fromkeys(self, 1)
        return sum(values[name] * weights[name] for name in self) / sum(weights.values())

    @property
    def digest(self) -> str:
        """Hash of all that equality compares, the same in every process."""
        content: list[Any] = [sorted((name, layer.bits, layer.rank) for name, layer in self.items())]
        content += [asdict(self.quantizer), self.initialization]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @property
    def average_bits(self) -> float:
        """Mean bits per weight without metadata, weighted by size where all shapes are known."""
        return self._weighted_mean({name: layer.bits for name, layer in self._layers.items()})

    @property
    def average_rank(self) -> float:
        """Mean rank over modules, unweighted."""
        return sum(layer.rank for layer in self._layers.values()) / len(self)

    def replace(self, **changes: Any) -> BitRankPlan:
        """A copy with some constructor arguments changed (``layers`` among them)."""
        arguments: dict[str, Any] = {
            "layers": self._layers,
            "shapes": self.shapes,
            "quantizer": self.quantizer,
            "initialization": self.initialization,
            "base_model": self.base_model,
            "memory": self.memory,
            "provenance": self.provenance,
            "calibration": self.calibration,
        }
        return BitRankPlan(**(arguments | changes))

    def _content(self) -> plan_file.PlanContent:
        return plan_file.PlanContent(
            modules=list(self),
            bits=[layer.bits for layer in self.values()],
            rank=[layer.rank for layer in self.values()],
            shapes=self.shapes,
            quantizer=asdict(self.quantizer),
            initialization=self.initialization,
            base_model=asdict(self.base_model),
            memory=self.memory.to_dict() if self.memory else None,
            provenance=self.provenance,
        )

    def to_metadata(self) -> dict[str, str]:
        """The plan as a flat mapping of strings, for the header of a safetensors file.

        Raises:
            InvalidPlanError: too much provenance for any reader.
        """
        return plan_file.write_header(self._content(), self.calibration.digest if self.calibration is not None else "")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, source: str) -> BitRankPlan:
        """Read what :meth:`to_metadata` wrote.

        Args:
            metadata: header of a safetensors file.
            source: where it came from, for messages.

        Raises:
            InvalidPlanError: no plan, a newer format, a wrong checksum or content that does not fit together.
        """
        content = plan_file.parse_header(metadata, source)
        try:
            return cls(
                {n: LayerPlan(b, r) for n, b, r in zip(content.modules, content.bits, content.rank, strict=True)},
                shapes=content.shapes,  # type: ignore[arg-type]
                quantizer=QuantizerSettings(**content.quantizer),
                initialization=content.initialization,  # type: ignore[arg-type]
                base_model=BaseModelInfo(**content.base_model),
                memory=MemoryEstimate(**content.memory) if content.memory is not None else None,
                provenance=content.provenance,
            )
        except (InvalidPlanError, TypeError) as error:
            raise InvalidPlanError(f"The plan in {source} is damaged: {error} Save or download it again.") from error

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``autoqra_plan.safetensors``, the calibration where there is one, and a model card with a picture.

        The folder's other files are left alone, so a plan may lie beside a model or an adapter. A model card is
        replaced only where it is that of an earlier plan.

        Args:
            save_directory: made where missing.
            repo_id: hub repository for ``push_to_hub``; the folder's name by default.
            push_to_hub: also upload.
            push_to_hub_kwargs: passed to :meth:`push_to_hub`.

        Returns:
            The URL of the commit when pushed, else None.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(directory)
        card = directory / _CARD_FILE
        is_new = not card.exists() and not card.is_symlink()
        if is_new or (card.is_file() and is_plan_card(card.read_text(encoding="utf-8", errors="replace"))):
            pictures = write_card_pictures(directory, self, self.memory, self.provenance)
            partial = card.with_suffix(".partial")
            ModelCard(self.to_card().render(pictures)).save(partial)
            partial.replace(card)  # not through a link, as the hub's cache has them
        if push_to_hub:
            return str(self.push_to_hub(repo_id=repo_id or directory.name, **push_to_hub_kwargs))
        return None

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload plan",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        branch: str | None = None,
    ) -> str:
        """Upload the plan, its calibration where there is one, and a model card, in one commit.

        The repository is made where missing; its other files are left alone. A model card there is replaced only
        where it is that of an earlier plan.

        Args:
            repo_id: ``"owner/name"``, or the name alone for a repository of one's own.
            commit_message: first line of the commit.
            private: show a repository that is made to its owner only. True is refused where it exists and is public.
            token: hub token; the one of ``hf auth login`` by default.
            revision: branch, made where missing; the main branch by default.
            create_pr: open a pull request instead.
            branch: the name of ``ModelHubMixin`` for ``revision``.

        Returns:
            The URL of the commit; it has ``pr_url`` where a pull request was opened.

        Raises:
            HubError: no token, no right to write there, or a connection that failed. What was not committed is not
                visible on the hub.
        """
        revision = revision or branch
        target = PushTarget(repo_id=repo_id, revision=revision, private=private, token=token, create_pr=create_pr)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            with opened(target) as repository:
                card = locate_file(_CARD_FILE, repository.name, revision=revision, token=token)
                foreign = card is not None and not is_plan_card(card.read_text(encoding="utf-8", errors="replace"))
                left_out = {_CARD_FILE, *PICTURE_FILES} if foreign else set()
                names = {path.name for path in Path(folder).iterdir()} - left_out
                return repository.commit(Path(folder), sorted(names), commit_message)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """The README.md of the plan's folder or repository; the pictures that it shows are written with the plan."""
        with tempfile.TemporaryDirectory() as folder:
            return ModelCard(
                self.to_card().render(write_card_pictures(Path(folder), self, self.memory, self.provenance))
            )

    def to_card(self) -> PlanCard:
        """What a model card says about the plan."""
        return PlanCard(
            layers=self,
            base_model=self.base_model.name_or_path,
            fingerprint=self.base_model.fingerprint,
            backend=self.quantizer.backend,
            group_size=self.quantizer.group_size,
            average_bits=self.average_bits,
            average_is_per_weight=len(self.shapes) == len(self),
            average_rank=self.average_rank,
            memory=self.memory,
            provenance=self.provenance,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        plan_file.save(save_directory / PLAN_FILE, self._content(), self.to_metadata())
        if self.calibration is not None:
            self.calibration.save(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> BitRankPlan:
        """Read a plan from a folder or hub repository; an adapter's folder will do, its header holds the plan.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            revision: branch, tag or commit.
            token: hub token.
            cache_dir: where downloads are kept.
            force_download: download again.
            local_files_only: use the cache only.

        Raises:
            InvalidPlanError: no plan there, damaged, or of a newer format.
            PlanMismatchError: the calibration beside it belongs to another plan.
            HubError: the repository or revision does not exist, gives no access, or cannot be reached.
        """
        model_id = str(pretrained_model_name_or_path)
        hub_kwargs = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        path = locate_file(PLAN_FILE, model_id, **hub_kwargs) or locate_file(ADAPTER_FILE, model_id, **hub_kwargs)
        if path is None:
            raise InvalidPlanError(
                f"There is no {PLAN_FILE} in {model_id!r}; give the folder or repository of a plan or adapter."
            )
        metadata = plan_file.read_header(path)
        plan = cls.from_metadata(metadata, str(path))
        if path.name == PLAN_FILE:
            layers = plan.values()
            plan_file.check_tensors(path, [layer.bits for layer in layers], [layer.rank for layer in layers])
        digest = plan_file.calibration_digest(metadata)
        if not digest:
            return plan
        filename = CALIBRATION_FILE if path.name == PLAN_FILE else ADAPTER_CALIBRATION_FILE
        calibration_path = locate_file(filename, model_id, **hub_kwargs)
        if calibration_path is None:
            raise InvalidPlanError(f"{filename} is missing beside the plan in {model_id!r}; copy it there.")
        return plan.replace(calibration=PlanCalibration.load(calibration_path, digest, plan.shapes))
