"""Loading what a recipe names: model, tokenizer and data sets."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_autoqra.errors import AutoQRAError
from peft_autoqra.recipe import DataArguments, ModelArguments, RecipeError
from peft_autoqra.streaming.quant_config import AutoQRAQuantConfig

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def load_base_model(
    model_args: ModelArguments, args: SFTConfig, quantization_config: AutoQRAQuantConfig | None = None
) -> PreTrainedModel:
    """The base model, on the CPU.

    Args:
        model_args: which model.
        args: the recipe.
        quantization_config: how to quantize it while it is read; None leaves it unquantized.

    Raises:
        RecipeError: no model is named, or it cannot be loaded.
        AutoQRAError: it cannot be quantized as the configuration says.
    """
    settings = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    name = _model_name(model_args)
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            **settings,
        )
    except AutoQRAError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RecipeError(f"The model {name!r} cannot be loaded: {_first_line(error)}") from error


def load_processing_class(model_args: ModelArguments, args: SFTConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        RecipeError: no model is named, or it has no tokenizer.
    """
    name = _model_name(model_args)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"The tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error


def load_datasets(data: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out data.

    Args:
        data: what to load.
        seed: of the split, where part of the training data is held out.

    Raises:
        RecipeError: no data set is named, one is not there or empty, or nothing is held out, or twice.
    """
    if data.eval_file and not data.train_file:
        raise RecipeError("eval_file needs a train_file beside it.")
    if data.eval_file and data.test_split_size is not None:
        raise RecipeError("Give eval_file or test_split_size, not both.")
    if data.train_file is None and data.dataset_name is None:
        raise RecipeError("No data: give --train_file FILE or --dataset_name ID_OR_FOLDER.")
    train = _load_file(data.train_file) if data.train_file else _load_split(data, data.dataset_train_split)
    if data.test_split_size is not None:
        if len(train) < 2:
            raise RecipeError("test_split_size needs at least two training examples.")
        parts = train.train_test_split(test_size=data.test_split_size, seed=seed)
        return parts["train"], parts["test"]
    if data.train_file and not data.eval_file:
        raise RecipeError(
            "No held-out data: give --eval_file FILE, or --test_split_size 0.1 to hold out a tenth of train_file."
        )
    return train, _load_file(data.eval_file) if data.eval_file else _load_split(data, data.dataset_test_split)


def load_eval_dataset(data: DataArguments, seed: int) -> Dataset:
    """The held-out data of :func:`load_datasets`, which needs no training data if it is named by itself.

    A file for it takes the place of what a recipe splits off.

    Args:
        data: what to load.
        seed: of the split, where part of the training data is held out.

    Raises:
        RecipeError: no data set is named, or one is not there or empty.
    """
    if data.eval_file:
        return _load_file(data.eval_file)
    if data.test_split_size is None and data.dataset_name:
        return _load_split(data, data.dataset_test_split)
    if data.train_file is None and data.dataset_name is None:
        raise RecipeError("No data: give --eval_file FILE or --dataset_name ID_OR_FOLDER.")
    return load_datasets(data, seed)[1]


def _model_name(model_args: ModelArguments) -> str:
    if not model_args.model_name_or_path:
        raise RecipeError("No model: give --model_name_or_path ID_OR_FOLDER.")
    return model_args.model_name_or_path


def _load_file(file: str) -> Dataset:
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"There is no file {file}.")
    if path.suffix not in _BUILDERS:
        raise RecipeError(f"{file}: files ending in {path.suffix!r} cannot be read; use one of {sorted(_BUILDERS)}.")
    try:
        dataset = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # the builders raise whatever their parsers raise
        raise RecipeError(f"{file} cannot be read: {_first_line(error)}") from error
    return _not_empty(dataset, file)


def _load_split(data: DataArguments, split: str) -> Dataset:
    try:
        dataset = load_dataset(data.dataset_name, name=data.dataset_config, split=split)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise RecipeError(f"The data set {data.dataset_name!r} cannot be loaded: {_first_line(error)}") from error
    except ValueError as error:  # an unknown split or configuration; the message lists what there is
        raise RecipeError(
            f"The data set {data.dataset_name!r}: {_first_line(error)} Set dataset_train_split, dataset_test_split, "
            "dataset_config or test_split_size."
        ) from error
    return _not_empty(dataset, f"{data.dataset_name}[{split}]")


def _not_empty(dataset: Dataset, name: str) -> Dataset:
    if len(dataset) == 0:
        raise RecipeError(f"{name} holds no examples.")
    return dataset


def _first_line(error: Exception) -> str:
    return (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
