"""AutoQRA's two stages as published (arXiv 2602.22268), scaled to the cost."""

from __future__ import annotations

from benchmarks.search.methods.paper_bayesopt import improve_front
from benchmarks.search.methods.paper_evolution import PaperEvolution
from benchmarks.search.run import Run, until_spent

NUM_STAGE_2_STEPS = 3


@until_spent
def paper_two_stages(run: Run, seed: int) -> None:
    """Stage 1 on all but three evaluations, then stage 2 with those and whatever an early stop of stage 1 left."""
    stage_1 = PaperEvolution(run, max(run.cost_left - NUM_STAGE_2_STEPS, run.cost_left / 2), seed)
    stage_1.evolve()
    if len(stage_1.high) >= 2:
        improve_front(run, stage_1.high, stage_1.priors, seed)
