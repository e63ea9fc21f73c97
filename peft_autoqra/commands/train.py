"""``autoqra train`` and ``scripts/finetune.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import SFTConfig

from peft_autoqra.checkpoints import check_checkpoint, find_checkpoint
from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.parser import RecipeParser
from peft_autoqra.commands.tables import memory_table
from peft_autoqra.distribution import Distribution, every_process_reads, find_distribution
from peft_autoqra.hub import prepare_folder, push_folder
from peft_autoqra.hub_repository import PushTarget, opened
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.recipe import AdapterArguments, ModelArguments, RecipeError
from peft_autoqra.recipe_inputs import load_base_model, load_datasets, load_processing_class
from peft_autoqra.streaming.quant_config import AutoQRAQuantConfig
from peft_autoqra.streaming.weight_stream import NotStreamedError
from peft_autoqra.training import FineTune, FineTuneEstimate, FineTuneInputs, FineTuneResult
from peft_autoqra.units import format_seconds

_IN_PROCESSES = {
    "single": ".",
    "ddp": ", in each of {} processes.",
    "fsdp2": ", in the one of {} processes that held most; they share the model (FSDP2).",
}


def run(argv: Sequence[str]) -> Outcome | None:
    """Fine-tune, or estimate with ``--dry_run``; in a run of many processes the first one alone has something to say.

    Raises:
        AutoQRAError: settings, data, model or plan cannot be used.
    """
    recipe = RecipeParser("train").parse(argv)
    model_args, data_args, adapter_args, args, options = recipe.settings
    distribution = find_distribution(args)
    target = _push_target(args)
    if options.dry_run:
        args.resume_from_checkpoint, target = None, None
        args.output_dir = tempfile.gettempdir()  # the trainer makes its output directory
    checkpoint = args.resume_from_checkpoint = distribution.shared(lambda: find_checkpoint(args))
    if target is not None:
        distribution.by_main_process(lambda: _check_opens(target))
    train_dataset, eval_dataset = load_datasets(data_args, args.seed)
    plan = distribution.shared(lambda: _read_plan(adapter_args, checkpoint))
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # fails now rather than after quantization
    backend = adapter_args.quant_backend if plan is None else plan.quantizer.backend
    if options.dry_run or backend == "bitsandbytes":
        distribution = every_process_reads(distribution, args)  # accelerate cannot send its 4-bit layers to the others
    finetune = FineTune(
        FineTuneInputs(
            model=_load_model(model_args, args, plan if adapter_args.stream else None, distribution),
            processing_class=load_processing_class(model_args, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            args=args,
            adapter=adapter_args,
            plan=plan,
        )
    )
    outcome = _estimated(finetune) if options.dry_run else _trained(finetune, target)
    return outcome if finetune.is_main_process else None


def _estimated(finetune: FineTune) -> Outcome:
    estimate = finetune.estimate()
    return Outcome(estimate_text(finetune, estimate), {"dry_run": True, **_plan_data(finetune), **asdict(estimate)})


def _trained(finetune: FineTune, target: PushTarget | None) -> Outcome:
    result = finetune.run()
    text, pushed = result_text(finetune, result), None
    if target is not None and finetune.is_main_process:
        pushed = push_folder(prepare_folder(result.output_dir), target).commit_url
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


def _check_opens(target: PushTarget) -> None:
    """Fail now rather than after training."""
    with opened(target):
        pass


def _read_plan(adapter_args: AdapterArguments, checkpoint: str | None) -> BitRankPlan | None:
    if adapter_args.plan is None:
        return None
    plan = BitRankPlan.from_pretrained(adapter_args.plan)
    if checkpoint is not None:
        check_checkpoint(checkpoint, plan)
    return plan


def _load_model(
    model_args: ModelArguments, args: SFTConfig, plan: BitRankPlan | None, distribution: Distribution
) -> PreTrainedModel | None:
    """The base, quantized by a plan while it is read; None where the first process reads for this one."""
    quantization = None if plan is None else AutoQRAQuantConfig(plan=plan)

    def load() -> PreTrainedModel:
        try:
            return load_base_model(model_args, args, quantization)
        except NotStreamedError as error:
            raise RecipeError(f"{error} On the command line: --stream false.") from error

    return distribution.by_main_process(load) if distribution.first_process_reads else load()


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
            "Activations are not counted. Measured: the bytes of all tensors at the first optimizer step"
            + _IN_PROCESSES[result.strategy].format(result.num_processes),
            "",
            f"{_told_training(result)}, held-out loss {result.eval_loss:.4f}.",
            f"adapter  {result.output_dir}",
        ]
    )


def _told_training(result: FineTuneResult) -> str:
    if result.train_loss is None:
        return f"{result.num_steps} steps, all before this start"
    seconds = format_seconds(result.train_seconds)
    return f"{result.num_steps} steps in {seconds}; loss while training {result.train_loss:.4f}"


def _head(finetune: FineTune) -> list[str]:
    plan = finetune.plan
    start = "start at the calibrated correction" if plan.initialization == "compensate" else "start at zero"
    if finetune.checkpoint is not None:
        start = f"go on from {finetune.checkpoint}"
    return [
        "",
        f"{len(plan)} modules, average {plan.average_bits:.2f} bits and rank {plan.average_rank:.1f} "
        f"({plan.quantizer.backend}); adapters {start}.",
    ]


def _unknown_optimizer(finetune: FineTune) -> str:
    return f"The memory of the optimizer {finetune.trainer.args.optim} cannot be foretold."
