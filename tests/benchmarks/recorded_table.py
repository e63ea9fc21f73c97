"""A tiny table of the form that scripts/record_trials.py writes."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from benchmarks.search.landscapes import interactions
from benchmarks.search.methods.random_search import random_candidate
from peft_autoqra.importance.priors import ImportancePriors


def write_table(folder, num_plans=12):
    """Two shards of one budget; returns the problem and the recorded candidates in order."""
    landscape = interactions(0, num_layers=2)
    problem = landscape.problem
    content = {
        "groups": [[group.name, group.max_rank] for group in problem.space.groups],
        "bit_choices": problem.space.bit_choices,
        "rank_choices": problem.space.rank_choices,
        "fixed_bytes": problem.fixed_bytes,
        "budgets": {"3bit": problem.budget_bytes, "2bit": problem.smallest_bytes},
    }
    tables = {"bytes": problem.bytes_table, "losses": problem.loss_table}
    save_file(tables, folder / "problems.safetensors", metadata={"problem": json.dumps(content)})
    rng, priors = np.random.default_rng(0), ImportancePriors.from_problem(problem)
    pool = {}
    while len(pool) < num_plans:
        pool.setdefault(random_candidate(problem, priors, rng))
    for index, candidate in enumerate(pool):
        offsets = np.resize([0.2, -0.1], 48)
        losses = {str(step): landscape.true_loss(candidate) + 1 / (step + 1) + offsets for step in (0, 4, 12)}
        row = {
            "budget": "3bit",
            "index": index,
            "bits": "".join(str(bit) for bit, _ in candidate),
            "ranks": "".join(str(rank) for _, rank in candidate),
            "sequence_losses": {step: values.tolist() for step, values in losses.items()},
        }
        with (folder / f"trials-{index % 2}-of-2.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return problem, list(pool)
