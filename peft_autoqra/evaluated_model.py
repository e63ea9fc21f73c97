"""Loading what is to be judged: an adapter on its base, a plan, a quantized base, or any causal language model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_autoqra.errors import AutoQRAError, HubError
from peft_autoqra.folder_contents import ADAPTER_CONFIG
from peft_autoqra.hub_files import locate_file
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_file import PLAN_FILE
from peft_autoqra.recipe import ModelArguments, RecipeError
from peft_autoqra.recipe_inputs import load_base_model
from peft_autoqra.search_result import PLAN_FOLDER
from peft_autoqra.tuner.config import AutoQRAConfig


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its tokenizer.

    Attributes:
        name: hub id or folder.
        kind: ``"adapter"``, ``"plan"`` (the base quantized by it, with untrained adapters) or ``"model"``.
        base: of an adapter or plan: hub id or folder of its base; else the name again.
    """

    name: str
    kind: str
    base: str

    @classmethod
    def find(cls, name: str, model_args: ModelArguments) -> EvaluatedModel:
        """See what lies in a folder or repository; loads nothing large.

        Args:
            name: hub id or folder; of a search's ``output_dir`` it is the plan.
            model_args: ``model_name_or_path`` goes before the base that an adapter or plan names.

        Raises:
            RecipeError: an adapter or plan whose base is not known.
            AutoQRAError: an adapter or plan that cannot be read.
        """
        given = model_args.model_name_or_path if model_args.model_name_or_path != name else None
        if (plan := Path(name, PLAN_FOLDER) / PLAN_FILE).is_file() and not Path(name, PLAN_FILE).is_file():
            name = str(plan.parent)  # of a search
        if _has(name, ADAPTER_CONFIG):
            base, kind = given or _read("adapter", name, PeftConfig).base_model_name_or_path, "adapter"
        elif _has(name, PLAN_FILE):
            base, kind = given or BitRankPlan.from_pretrained(name).base_model.name_or_path, "plan"
        else:
            return cls(name, "model", name)
        if not base:
            raise RecipeError(f"The {kind} {name!r} names no base model; give --model_name_or_path.")
        return cls(name, kind, base)

    def tokenizer(self, args: SFTConfig) -> PreTrainedTokenizerBase:
        """Its own tokenizer, or its base's.

        Raises:
            RecipeError: neither has one.
        """
        for place in dict.fromkeys((self.name, self.base)):
            try:
                return AutoTokenizer.from_pretrained(place, trust_remote_code=args.trust_remote_code)
            except (OSError, ValueError, KeyError) as error:
                reason = error
        raise RecipeError(f"The tokenizer of {self.name!r} cannot be loaded: {_first_line(reason)}") from reason

    @contextmanager
    def loaded(self, model_args: ModelArguments, args: SFTConfig) -> Iterator[nn.Module]:
        """The model on the device that the recipe trains on; its memory is freed at the end.

        Raises:
            RecipeError: it cannot be loaded.
        """
        model: nn.Module = self._load(replace(model_args, model_name_or_path=self.base), args)
        try:
            if next(model.parameters()).device.type != args.device.type:
                model.to(args.device)
            yield model.eval()
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _load(self, model_args: ModelArguments, args: SFTConfig) -> Any:
        if self.kind == "adapter":
            if self._names_its_base(model_args):
                return _read("adapter", self.name, AutoPeftModelForCausalLM, dtype=model_args.dtype)
            return _read("adapter", load_base_model(model_args, args), PeftModel, self.name)
        base = load_base_model(model_args, args)
        if self.kind == "plan":
            plan = BitRankPlan.from_pretrained(self.name)
            return get_peft_model(base, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
        return base

    def _names_its_base(self, model_args: ModelArguments) -> bool:
        own = PeftConfig.from_pretrained(self.name)
        return own.base_model_name_or_path == self.base and model_args.attn_implementation is None


def _has(name: str, filename: str) -> bool:
    try:
        return locate_file(filename, name) is not None
    except HubError:  # of a model in the cache it is not known what it lacks; loading it will tell
        return False


def _read(what: str, source: Any, reader: Any, *arguments: Any, **settings: Any) -> Any:
    try:
        return reader.from_pretrained(source, *arguments, **settings)
    except AutoQRAError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        name = arguments[0] if arguments else source
        raise RecipeError(f"The {what} {name!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
