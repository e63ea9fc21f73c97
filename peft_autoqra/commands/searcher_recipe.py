"""From a recipe to a searcher, for the commands that need one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from trl import SFTConfig

from peft_autoqra.commands.parser import CommandOptions, ParsedRecipe, RecipeParser
from peft_autoqra.evaluation.named_objective import make_objective
from peft_autoqra.recipe import DataArguments, ModelArguments
from peft_autoqra.recipe_inputs import load_base_model, load_datasets, load_processing_class
from peft_autoqra.search_config import AutoQRASearchConfig, SearchArguments
from peft_autoqra.searcher import AutoQRASearcher


def read_searcher(
    command: str, description: str, argv: Sequence[str]
) -> tuple[AutoQRASearcher, ParsedRecipe, CommandOptions]:
    """Read recipe and flags, load model and data, and check them against each other.

    Args:
        command: such as ``"search"``.
        description: of the command, for its help.
        argv: its flags.

    Raises:
        AutoQRAError: settings, data, model or output directory cannot be used.
    """
    types = (ModelArguments, DataArguments, SearchArguments, SFTConfig)
    recipe = RecipeParser(command, types, description=description, output_dir="search-out").parse(argv)
    model_args, data_args, search_args, args, options = recipe.settings
    train_dataset, eval_dataset = load_datasets(data_args, args.seed)
    objective = make_objective(search_args.objective, max_new_tokens=search_args.max_new_tokens)
    if objective is not None:
        objective.check(eval_dataset)  # before the model is loaded
    searcher = AutoQRASearcher(
        load_base_model(model_args, args),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        args=args,
        search_config=AutoQRASearchConfig(**asdict(search_args), seed=args.seed, output_dir=args.output_dir),
        processing_class=load_processing_class(model_args, args),
        objective=objective,
    )
    return searcher, recipe, options
