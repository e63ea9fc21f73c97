"""``autoqra train`` and ``scripts/finetune.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl import SFTConfig

from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.parser import RecipeParser
from peft_autoqra.commands.tables import memory_table
from peft_autoqra.hub import prepare_folder, push_folder
from peft_autoqra.hub_repository import PushTarget, opened
from peft_autoqra.recipe_inputs import load_base_model, load_datasets, load_processing_class
from peft_autoqra.training import FineTune, FineTuneEstimate, FineTuneInputs, FineTuneResult
from peft_autoqra.units import format_seconds


def run(argv: Sequence[str]) -> Outcome | None:
    """Fine-tune, or estimate with ``--dry_run``; in a run of many processes the first one alone has something to say.

    Raises:
        AutoQRAError: settings, data, model or plan cannot be used.
    """
    recipe = RecipeParser("train").parse(argv)
    model_args, data_args, adapter_args, args, options = recipe.settings
    target = _push_target(args)
    if options.dry_run:
        args.output_dir = tempfile.gettempdir()  # the trainer makes its output directory
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # fails now rather than after quantization
    if target is not None and not options.dry_run and args.process_index == 0:
        with opened(target):  # fails now rather than after training
            pass
    train_dataset, eval_dataset = load_datasets(data_args, args.seed)
    finetune = FineTune(
        FineTuneInputs(
            model=load_base_model(model_args, args),
            processing_class=load_processing_class(model_args, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            args=args,
            adapter=adapter_args,
        )
    )
    if options.dry_run:
        estimate = finetune.estimate()
        outcome = Outcome(
            estimate_text(finetune, estimate), {"dry_run": True, **_plan_data(finetune), **asdict(estimate)}
        )
        return outcome if finetune.is_main_process else None
    result = finetune.run()
    if not finetune.is_main_process:
        return None
    text, pushed = result_text(finetune, result), None
    if target is not None:
        pushed = push_folder(prepare_folder(args.output_dir), target).commit_url
        text += f"\npushed   {pushed}"
    return Outcome(text, {"dry_run": False, **_plan_data(finetune), **result.to_dict(), "pushed_to": pushed})


def _plan_data(finetune: FineTune) -> dict[str, Any]:
    plan = finetune.plan
    return {
        "num_modules": len(plan),
        "average_bits": plan.average_bits,
        "average_rank": plan.average_rank,
        "quantizer": plan.quantizer.backend,
        "initialization": plan.initialization,
        "estimated": finetune.estimated.to_dict() if finetune.estimated else None,
    }


def _push_target(args: SFTConfig) -> PushTarget | None:
    """Take over what ``--push_to_hub`` asks for.

    The trainer would upload every file of its directory, its pickled arguments with the token among them.
    """
    wanted, token = args.push_to_hub, args.hub_token
    args.push_to_hub, args.hub_token = False, None
    if not wanted:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    return PushTarget(repo_id=name, revision=args.hub_revision, private=args.hub_private_repo, token=token)


def estimate_text(finetune: FineTune, estimate: FineTuneEstimate) -> str:
    """What a dry run prints."""
    return "\n".join(
        [
            *_head(finetune),
            memory_table({"estimated": finetune.estimated}) if finetune.estimated else _unknown_optimizer(finetune),
            "Activations are not counted.",
            "",
            f"{estimate.num_steps} steps, about {format_seconds(estimate.seconds)} here; evaluation comes on top.",
        ]
    )


def result_text(finetune: FineTune, result: FineTuneResult) -> str:
    """What a finished fine-tune prints."""
    columns = {"estimated": result.estimated, "measured": result.measured}
    known = {title: memory for title, memory in columns.items() if memory is not None}
    return "\n".join(
        [
            *_head(finetune),
            memory_table(known, exact=True) if known else "",
            *([] if result.estimated else [_unknown_optimizer(finetune)]),
            "Activations are not counted. Measured: the bytes of all tensors at the first optimizer step.",
            "",
            f"{result.num_steps} steps in {format_seconds(result.train_seconds)}; loss while training "
            f"{result.train_loss:.4f}, held-out loss {result.eval_loss:.4f}.",
            f"adapter  {result.output_dir}",
        ]
    )


def _head(finetune: FineTune) -> list[str]:
    plan = finetune.plan
    start = "at the calibrated correction" if plan.initialization == "compensate" else "at zero"
    return [
        "",
        f"{len(plan)} modules, average {plan.average_bits:.2f} bits and rank {plan.average_rank:.1f} "
        f"({plan.quantizer.backend}); adapters start {start}.",
    ]


def _unknown_optimizer(finetune: FineTune) -> str:
    return f"The memory of the optimizer {finetune.trainer.args.optim} cannot be foretold."
