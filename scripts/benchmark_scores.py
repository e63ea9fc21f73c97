"""How well cheap scores rank plans: Spearman correlations with the last loss of the recorded real fine-tunes.

Reads the table that ``scripts/record_trials.py`` made, and no model; takes seconds. Per budget, each score (the
estimated error that is left after compensation, the same with the task's demand for rank, and the held-out loss at
every earlier checkpoint) is correlated with the held-out loss at the last checkpoint. Intervals are percentiles of
bootstrap samples of plans.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from scipy.stats import rankdata

from peft_autoqra.importance.rank_demand import rank_demand
from peft_autoqra.markdown import markdown_table
from peft_autoqra.search_space import ModuleGroup, SearchSpace

NUM_RESAMPLES = 2000
FEWEST_PLANS = 4

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScoreQuality:
    """One score beside the truth, over the plans of one budget.

    Attributes:
        budget: as the plans were recorded.
        score: what ranks the plans before the truth is known.
        num_plans: distinct plans.
        spearman: rank correlation with the last checkpoint's loss; higher is better.
        low: 2.5th percentile over bootstrap samples.
        high: 97.5th percentile.
        regret: last loss of the plan that the score likes best, above the best plan's; nats per token.
    """

    budget: str
    score: str
    num_plans: int
    spearman: float
    low: float
    high: float
    regret: float


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials_dir", type=Path, default=Path("benchmarks/trials"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scores.json"))
    options = parser.parse_args()
    trials, tables = read_trials(options.trials_dir), read_tables(options.trials_dir / "problems.safetensors")
    budgets = dict.fromkeys(row["budget"] for row in trials)
    results = [
        quality
        for budget in budgets
        for quality in score_qualities(budget, [row for row in trials if row["budget"] == budget], tables)
    ]
    if not results:
        parser.error(f"{options.trials_dir} holds less than {FEWEST_PLANS} trials per budget; record more.")
    options.output.write_text(json.dumps([asdict(quality) for quality in results], indent=1) + "\n", encoding="utf-8")
    print(as_markdown(results))


def read_trials(directory: Path) -> list[dict[str, Any]]:
    """Rows of all shards, in the order they were drawn."""
    rows = [json.loads(line) for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


def read_tables(path: Path) -> dict[str, Losses]:
    """Estimated losses by name of the estimate, each ``[num_groups, num_bits, num_ranks]``; groups are one module."""
    with safe_open(path, framework="np") as file:
        rises, problem = file.get_tensor("losses"), json.loads(file.metadata()["problem"])
    groups = tuple(ModuleGroup(name, (name,), max_rank) for name, max_rank in problem["groups"])
    space = SearchSpace(groups, tuple(problem["bit_choices"]), tuple(problem["rank_choices"]))
    return {"error left": rises, "error left + demand for rank": rises + rank_demand(space)[:, None, :]}


def score_qualities(budget: str, trials: Sequence[dict[str, Any]], tables: dict[str, Losses]) -> list[ScoreQuality]:
    """All scores of one budget; nothing where there are too few plans."""
    plans = {(row["bits"], row["ranks"]): row for row in trials}
    if len(plans) < FEWEST_PLANS:
        return []
    steps = sorted(map(int, next(iter(plans.values()))["losses"]))
    curves = {step: np.array([row["losses"][str(step)] for row in plans.values()]) for step in steps}
    positions = np.array([[list(map(int, bits)), list(map(int, ranks))] for bits, ranks in plans])
    truth = curves.pop(steps[-1])
    scores = {name: summed(table, positions) for name, table in tables.items()}
    scores |= {f"held-out loss after {step} steps": curve for step, curve in curves.items()}
    return [quality_of(budget, name, values, truth) for name, values in scores.items()]


def summed(table: Losses, positions: npt.NDArray[np.int64]) -> Losses:
    """Additive score of plans given by ladder positions ``[num_plans, 2, num_groups]``."""
    return np.asarray(table[np.arange(len(table)), positions[:, 0], positions[:, 1]].sum(axis=1))


def quality_of(budget: str, name: str, score: Losses, truth: Losses) -> ScoreQuality:
    """Correlation with an interval, and the regret of trusting the score."""
    num_plans = len(truth)
    samples = np.random.default_rng(0).integers(num_plans, size=(NUM_RESAMPLES, num_plans))
    low, high = np.nanpercentile(spearman(score[samples], truth[samples]), [2.5, 97.5])
    return ScoreQuality(
        budget=budget,
        score=name,
        num_plans=num_plans,
        spearman=round(float(spearman(score, truth)), 3),
        low=round(float(low), 3),
        high=round(float(high), 3),
        regret=round(float(truth[score.argmin()] - truth.min()), 4),
    )


def spearman(score: Losses, truth: Losses) -> Losses:
    """Rank correlation along the last axis; NaN where all values are equal, as in some samples of few plans."""
    ranks = [rankdata(values, axis=-1) for values in (score, truth)]
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in ranks)
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1)))


def as_markdown(results: Sequence[ScoreQuality]) -> str:
    """One row per budget and score."""
    rows = [
        (
            quality.budget,
            str(quality.num_plans),
            quality.score,
            f"{quality.spearman:.2f} ({quality.low:.2f} to {quality.high:.2f})",
            f"{quality.regret:.3f}",
        )
        for quality in results
    ]
    return markdown_table(("budget", "plans", "score", "Spearman (95% interval)", "regret, nats"), rows)


if __name__ == "__main__":
    main()
