"""From a recipe to a searcher, for the commands that need one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

from peft_autoqra.commands.parser import ParsedRecipe, RecipeParser
from peft_autoqra.commands.recipe_flags import CommandOptions
from peft_autoqra.evaluation.named_objective import make_objective
from peft_autoqra.recipe_inputs import load_base_model, load_datasets, load_processing_class
from peft_autoqra.search_config import AutoQRASearchConfig
from peft_autoqra.searcher import AutoQRASearcher


def log_from(level: int) -> None:
    """Have the package's messages of at least that level on stderr; other packages' stay as they are.

    Args:
        level: the recipe's ``log_level``; warnings where it has none.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")  # does nothing where logging is set up already
    logging.getLogger("peft_autoqra").setLevel(level)


def read_searcher(command: str, argv: Sequence[str]) -> tuple[AutoQRASearcher, ParsedRecipe, CommandOptions]:
    """Read recipe and flags, load model and data, and check them against each other.

    Args:
        command: such as ``"search"``.
        argv: its flags.

    Raises:
        AutoQRAError: settings, data, model or output directory cannot be used.
    """
    recipe = RecipeParser(command).parse(argv)
    model_args, data_args, search_args, args, *_, options = recipe.settings
    log_from(args.get_process_log_level())
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
