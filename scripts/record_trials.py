"""Record a table of measured trials: real fine-tunes of SmolLM2 under plans of equal memory, to replay searches on.

For every budget a pool of plans is drawn that search methods would plausibly propose (exact allocations of perturbed
scores, uniform plans, mutants, random plans filled up to the budget), and each is trained through SFTTrainer with one
seed, data order and learning rate. The held-out loss of every sequence is kept before training and along the run, so
a search that stops early at few steps, or compares sequence by sequence, can be replayed in seconds.

``--shard 0/2`` and ``--shard 1/2`` share the work between two processes. A stopped recording goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig

from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher
from peft_autoqra.importance.allocation import allocate
from peft_autoqra.importance.priors import ImportancePriors, round_priors
from peft_autoqra.importance.repair import fill, repair
from peft_autoqra.importance.warm_starts import floored_allocations
from peft_autoqra.search.operators import coupled_mutation, guided_mutation, swap_mutation
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate
from peft_autoqra.trial import Fidelity

BUDGETS = ("4bit", "3bit", "2.5bit")
CHECKPOINTS = (0, 4, 12)
POOL_SIZE = 120
NUM_EVAL_SEQUENCES = 48
MAX_TOKENS = 64
LEARNING_RATE = 6e-4  # best at rank 16, see scripts/benchmark_learning_rates.py


def main() -> None:
    """Record what this shard lacks."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    shard, num_shards = map(int, options.shard.split("/"))
    path = options.output_dir / f"trials-{shard}-of-{num_shards}.jsonl"
    known = {(row["budget"], row["index"]) for row in read_rows(path)}
    searchers = {budget: make_searcher(budget, options) for budget in BUDGETS}
    bank = searchers[BUDGETS[0]].calibrate()
    problems = {b: searcher.setup.problem_with(searcher.setup.loss_table(bank)) for b, searcher in searchers.items()}
    rises = bank.error_table.loss_table(searchers[BUDGETS[0]].setup.space)
    save_problems(problems, rises, options.output_dir / "problems.safetensors")
    pools = {budget: make_pool(problem, seed) for seed, (budget, problem) in enumerate(problems.items())}
    evaluator = searchers[BUDGETS[0]].setup.evaluator(bank)
    fidelity = Fidelity(CHECKPOINTS[-1], NUM_EVAL_SEQUENCES)
    for index in range(POOL_SIZE):
        for budget in BUDGETS:
            if index % num_shards != shard or (budget, index) in known:
                continue
            origin, candidate = pools[budget][index]
            start = time.perf_counter()
            curve = evaluator.learning_curve(searchers[budget].setup.searched_plan(candidate), fidelity, CHECKPOINTS)
            row = {
                "budget": budget,
                "index": index,
                "origin": origin,
                "bits": "".join(str(bit) for bit, _ in candidate),
                "ranks": "".join(str(rank) for _, rank in candidate),
                "total_bytes": problems[budget].total_bytes(candidate),
                "seconds": round(time.perf_counter() - start, 2),
                "losses": {step: round(loss.mean, 5) for step, loss in curve.items()},
                "sequence_losses": {step: [round(x, 4) for x in loss.sequence_losses] for step, loss in curve.items()},
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(budget, index, origin, row["losses"], row["seconds"], flush=True)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/trials"))
    parser.add_argument("--cache_dir", type=Path, default=Path("benchmarks/trials/calibration"))
    parser.add_argument("--shard", default="0/1", help="part of the work, such as 0/2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def read_rows(path: Path) -> list[dict]:
    """What was recorded before."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


@cache
def prepared_assets() -> dict[str, str]:
    """Folders of the model and the data; made where missing."""
    script = Path(__file__).with_name("prepare_demo_assets.py")
    output = subprocess.run([sys.executable, script, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)


@cache
def base_model(folder: str) -> PreTrainedModel:
    """One model for all budgets."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def make_searcher(budget: str, options: argparse.Namespace) -> AutoQRASearcher:
    """Model, data and recipe; the same but for the budget."""
    assets = prepared_assets()
    train, dev = (
        Dataset.from_json(f"{assets['imdb']}/{split}.jsonl").select(range(size)).select_columns(["text"])
        for split, size in (("train", 2000), ("dev", NUM_EVAL_SEQUENCES))
    )
    args = SFTConfig(
        output_dir=str(options.output_dir / "sft"),
        max_steps=CHECKPOINTS[-1],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        max_length=MAX_TOKENS,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
    )
    return AutoQRASearcher(
        base_model(assets["model"]),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=AutoTokenizer.from_pretrained(assets["model"]),
        args=args,
        search_config=AutoQRASearchConfig(
            memory_budget=budget,
            num_calibration_sequences=128,
            num_eval_sequences=NUM_EVAL_SEQUENCES,
            cache_dir=str(options.cache_dir),
            output_dir=str(options.output_dir / "search"),
        ),
    )


def save_problems(problems: dict[str, SearchProblem], rises: np.ndarray, path: Path) -> None:
    """Tables that all budgets share (bytes, error left by quantization), and the budgets."""
    first = next(iter(problems.values()))
    content = {
        "groups": [[group.name, group.max_rank] for group in first.space.groups],
        "bit_choices": first.space.bit_choices,
        "rank_choices": first.space.rank_choices,
        "fixed_bytes": first.fixed_bytes,
        "learning_rate": LEARNING_RATE,
        "budgets": {budget: problem.budget_bytes for budget, problem in problems.items()},
    }
    tables = {"bytes": first.bytes_table, "losses": rises}
    save_file(tables, path, metadata={"problem": json.dumps(content)})


def make_pool(problem: SearchProblem, seed: int) -> list[tuple[str, Candidate]]:
    """Distinct feasible candidates with an adapter somewhere, of every origin a search may have."""
    pool: dict[Candidate, str] = {}
    for origin, candidate in proposals(problem, np.random.default_rng(seed)):
        if problem.is_feasible(candidate) and any(rank for _, rank in candidate):
            pool.setdefault(candidate, origin)
        if len(pool) == POOL_SIZE:
            break
    return [(origin, candidate) for candidate, origin in pool.items()]


def proposals(problem: SearchProblem, rng: np.random.Generator) -> Iterator[tuple[str, Candidate]]:
    """Plans that need no luck, then endlessly others."""
    space, importance = problem.space, ImportancePriors.from_marginal_losses(problem)
    yield "allocation", allocate(problem)
    for rank, floored in zip(space.rank_choices[1:], floored_allocations(problem), strict=False):
        yield f"allocation-floor-{rank}", floored
    for bits in space.bit_choices:
        for rank in space.rank_choices:
            if problem.is_feasible(uniform := space.uniform(bits, rank)) and rank:
                yield f"uniform-{bits}-{rank}", uniform
    yield "rounded-priors", repair(problem, round_priors(space, importance), importance)
    while True:
        for spread in (0.25, 0.5, 1.0):
            yield f"perturbed-{spread}", allocate(perturbed(problem, spread, rng))
        yield "random", fill(problem, repair(problem, space.sample(rng), importance, rng), importance, rng)
        mutant = allocate(perturbed(problem, 0.25, rng))
        for _ in range(int(rng.integers(5, 60))):
            mutate = (guided_mutation, coupled_mutation)[int(rng.integers(2))]
            mutant = mutate(problem, importance, mutant, rng)
            mutant = swap_mutation(problem, importance, mutant, rng)
        yield "mutant", fill(problem, mutant, importance, rng)


def perturbed(problem: SearchProblem, spread: float, rng: np.random.Generator) -> SearchProblem:
    """Scores that are wrong by group, by kind of module, by bit-width, and about what a rank is worth."""
    space, table = problem.space, problem.loss_table
    kinds = [group.name.split(".", 3)[-1] for group in space.groups]
    by_kind = dict(zip(sorted(set(kinds)), rng.lognormal(0, spread, len(set(kinds))), strict=True))
    factors = rng.lognormal(0, spread, space.num_groups) * np.array([by_kind[kind] for kind in kinds])
    factors *= np.exp(spread * np.linspace(-1, 1, space.num_groups) * rng.normal())
    rungs = rng.lognormal(0, spread, len(space.bit_choices))
    ranks = np.array(space.rank_choices)
    demand = rng.exponential(spread) * table[:, 1, 0].mean() * np.exp(-ranks / rng.choice([4.0, 16.0, 64.0]))
    losses = table * factors[:, None, None] * rungs[None, :, None] + demand
    return replace(problem, loss_table=losses)


if __name__ == "__main__":
    main()
