"""``autoqra evaluate``."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.parser import RecipeParser
from peft_autoqra.commands.tables import text_table
from peft_autoqra.evaluated_model import EvaluatedModel
from peft_autoqra.evaluation.harness_tasks import HarnessTasks
from peft_autoqra.evaluation.named_objective import make_objective
from peft_autoqra.model_evaluation import EvaluationResult, Figure, Judged, JudgedBy, judge, result_of
from peft_autoqra.objective_info import HELD_OUT_LOSS
from peft_autoqra.recipe import DataArguments, EvaluationArguments, ModelArguments, RecipeError
from peft_autoqra.recipe_inputs import load_eval_dataset
from peft_autoqra.units import format_seconds


def run(argv: Sequence[str]) -> Outcome:
    """Judge one or two models, or say by what with ``--dry_run``.

    Raises:
        RecipeError: no model is named.
        AutoQRAError: settings, data, models, metrics or tasks cannot be used.
    """
    start = time.perf_counter()
    named, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    model_args, data_args, wanted, args, options = RecipeParser("evaluate").parse(flags).settings
    name = named or model_args.model_name_or_path
    output_file = Path(wanted.output_file) if wanted.output_file else None
    if name is None:
        raise RecipeError("No model: `autoqra evaluate ADAPTER_OR_MODEL ...`, or give --model_name_or_path.")
    if output_file is not None and not options.dry_run:
        _check_writable(output_file)
    by = _judged_by(data_args, wanted, args)
    models = [EvaluatedModel.find(one, model_args) for one in (name, wanted.baseline) if one is not None]
    if options.dry_run:
        return Outcome(estimate_text(models, by), {"dry_run": True, **estimate_data(models, by)})
    judged = [_judge(model, model_args, by) for model in models]
    names = [model.name for model in models]
    result = result_of(names, judged, num_examples=_num_examples(by), start=start)
    if output_file is not None:
        output_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    return Outcome(result_text(result), {"dry_run": False, **result.to_dict()})


def _check_writable(path: Path) -> None:
    """Fail now rather than after the evaluation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RecipeError(f"output_file={str(path)!r} cannot be written; name a file in a folder that can.")


def _judged_by(data_args: DataArguments, wanted: EvaluationArguments, args: SFTConfig) -> JudgedBy:
    """Metrics, tasks and data; everything that can go wrong with them goes wrong before a model is loaded."""
    made = [make_objective(name, max_new_tokens=wanted.max_new_tokens) for name in wanted.metric]
    objectives = [objective for objective in made if objective is not None]
    names = [name.strip() for name in (wanted.tasks or "").split(",") if name.strip()]
    tasks = None
    if names:
        tasks = HarnessTasks(names, num_fewshot=wanted.num_fewshot, apply_chat_template=wanted.apply_chat_template)
    dataset: Dataset | None = None
    if not names or objectives or data_args.eval_file or data_args.dataset_name or data_args.train_file:
        dataset = load_eval_dataset(data_args, args.seed)
        for objective in objectives:
            objective.check(dataset)
    return JudgedBy(dataset, objectives, tasks, args, wanted.limit, show_progress=sys.stderr.isatty())


def _judge(model: EvaluatedModel, model_args: ModelArguments, by: JudgedBy) -> list[Judged]:
    """A function, so that nothing holds the first model while the second one is loaded."""
    tokenizer = model.tokenizer(by.args)
    with model.loaded(model_args, by.args) as loaded:
        return judge(loaded, tokenizer, by)


def _num_examples(by: JudgedBy) -> int:
    if by.dataset is None:
        return 0
    return len(by.dataset) if by.limit is None else min(by.limit, len(by.dataset))


def estimate_text(models: Sequence[EvaluatedModel], by: JudgedBy) -> str:
    """What a dry run prints."""
    tasks = list(by.tasks.tasks) if by.tasks else []
    return "\n".join(
        [
            *(f"{model.kind:9}{model.name}" + _on_base(model) for model in models),
            f"figures  {', '.join([*_figure_names(by), *tasks])}",
            f"data     {_num_examples(by)} held-out examples" + (", and those of the tasks" if tasks else ""),
        ]
    )


def estimate_data(models: Sequence[EvaluatedModel], by: JudgedBy) -> dict[str, Any]:
    """The same for programs."""
    return {
        "models": [{"kind": model.kind, "name": model.name, "base": model.base} for model in models],
        "figures": _figure_names(by),
        "tasks": list(by.tasks.tasks) if by.tasks else [],
        "num_examples": _num_examples(by),
    }


def _figure_names(by: JudgedBy) -> list[str]:
    return [HELD_OUT_LOSS.name, *(one.info.name for one in by.objectives)] if by.dataset is not None else []


def _on_base(model: EvaluatedModel) -> str:
    return f" on {model.base}" if model.kind != "model" else ""


def result_text(result: EvaluationResult) -> str:
    """What a finished evaluation prints."""
    lines = [f"model     {result.model}"]
    if result.baseline is not None:
        lines.append(f"baseline  {result.baseline}")
    lines += [f"{result.num_examples} held-out examples, {format_seconds(result.seconds)}", ""]
    lines.append(_figures_table(result.figures) if result.baseline is None else _comparison_table(result))
    lines += ["", "Intervals are over examples: other data of this kind, not other training runs."]
    return "\n".join(lines)


def _figures_table(figures: Sequence[Figure]) -> str:
    rows = []
    for figure in figures:
        rows.append([_label(figure), f"{figure.value:.4f}", _interval(figure, ".4f")])
        if figure.name == HELD_OUT_LOSS.name and figure.interval is not None:
            low, high = (_perplexity(bound) for bound in figure.interval)
            rows.append(["perplexity", f"{_perplexity(figure.value):.2f}", f"{low:.2f} to {high:.2f}"])
    return text_table(["figure", "value", "95% interval"], rows)


def _comparison_table(result: EvaluationResult) -> str:
    differences = {figure.name: figure for figure in result.differences}
    rows = []
    for figure, other in zip(result.figures, result.baseline_figures, strict=True):
        row = [_label(figure), f"{figure.value:.4f}", f"{other.value:.4f}"]
        found = differences.get(figure.name)
        compared = [f"{found.value:+.4f}", _interval(found, "+.4f"), found.verdict] if found else ["-", "-", "unknown"]
        rows.append(row + compared)
        if figure.name == HELD_OUT_LOSS.name:
            perplexities = [f"{_perplexity(one.value):.2f}" for one in (figure, other)]
            rows.append(["perplexity", *perplexities, "", "", ""])
    return text_table(["figure", "model", "baseline", "difference", "95% interval", "the model is"], rows)


def _label(figure: Figure) -> str:
    return f"{figure.name}, {figure.unit}" if figure.unit else figure.name


def _interval(figure: Figure, form: str) -> str:
    if figure.interval is None:
        return "-"
    return f"{figure.interval[0]:{form}} to {figure.interval[1]:{form}}"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond it, a float holds no more
