"""AutoQRA's surrogate of stage 1: an MLP from cheap results and the shape of a candidate to expensive losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from botorch.utils.sampling import manual_seed
from torch import nn

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search.gp_fit import one_thread
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

HIDDEN = 32
NUM_STEPS = 100
LEARNING_RATE = 2e-2
WEIGHT_DECAY = 1e-2


class PaperSurrogate:
    """Two hidden layers, trained anew on all expensive results (AutoQRA, Eq. 7).

    Features: low-fidelity loss, memory, importance-weighted coverages of bits and ranks, histograms of bits and
    ranks; standardized. The paper does not say how large the MLP is.
    """

    def __init__(self, problem: SearchProblem, priors: ImportancePriors, seed: int) -> None:
        """Nothing is known yet."""
        self.problem, self.priors, self.seed = problem, priors, seed
        self._model: nn.Module | None = None

    @one_thread()
    def fit(self, cheap: Sequence[tuple[Candidate, float]], expensive: Sequence[float]) -> None:
        """Learn expensive losses (nats per token) of candidates with their low-fidelity losses; at least two."""
        features = self._features(cheap)
        self._centre, self._spread = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
        targets = np.asarray(expensive)
        self._offset, self._unit = float(targets.mean()), float(max(targets.std(), 1e-9))
        inputs, outputs = self._inputs(features), torch.from_numpy((targets - self._offset) / self._unit).float()
        with manual_seed(self.seed):
            model = nn.Sequential(
                nn.Linear(inputs.shape[1], HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, 1),
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(NUM_STEPS):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs)[:, 0], outputs).backward()
            optimizer.step()
        self._model = model

    def predict(self, cheap: Sequence[tuple[Candidate, float]]) -> list[float]:
        """Expected expensive losses, nats per token; before the first fit the low-fidelity losses."""
        if self._model is None:
            return [loss for _, loss in cheap]
        with torch.no_grad():
            outputs = self._model(self._inputs(self._features(cheap)))[:, 0].numpy()
        return [float(value) for value in outputs * self._unit + self._offset]

    def _inputs(self, features: npt.NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy((features - self._centre) / self._spread).float()

    def _features(self, cheap: Sequence[tuple[Candidate, float]]) -> npt.NDArray[np.float64]:
        """``[num_candidates, 4 + num_bits + num_ranks]``."""
        space = self.problem.space
        candidates = [candidate for candidate, _ in cheap]
        positions = np.asarray(candidates, dtype=np.int64)
        sizes = [self.problem.total_bytes(candidate) for candidate in candidates]
        bits = [(positions[..., 0] == rung).mean(axis=1) for rung in range(len(space.bit_choices))]
        ranks = [(positions[..., 1] == rung).mean(axis=1) for rung in range(len(space.rank_choices))]
        losses = [loss for _, loss in cheap]
        return np.column_stack([losses, sizes, coverages(self.problem, self.priors, positions), *bits, *ranks])


def coverages(
    problem: SearchProblem, priors: ImportancePriors, positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Mean ladder position weighted by importance, of bits and of ranks (AutoQRA, Eq. 9), ``[num_candidates, 2]``."""
    weights = np.column_stack([priors.bits, priors.rank]) + 1e-9
    scaled = positions / np.maximum(problem.space.num_rungs - 1, 1)
    return np.asarray((scaled * weights).sum(axis=1) / weights.sum(axis=0))
