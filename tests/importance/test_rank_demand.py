import numpy as np
import pytest

from peft_autoqra.importance.allocation import allocate
from peft_autoqra.importance.rank_demand import TRAINING_GAIN, rank_demand
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import ModuleGroup, SearchSpace

GROUPS = (ModuleGroup("attention", ("q", "k", "v"), 8), ModuleGroup("down", ("down",), 8))


def test_a_plan_forgoes_the_share_of_its_modules_without_an_adapter():
    demand = rank_demand(SearchSpace(GROUPS, (4, 16), (0, 4, 8)))
    assert demand.shape == (2, 3)
    assert demand[0, 0] + demand[1, 0] == pytest.approx(TRAINING_GAIN)
    assert demand[0, 0] == pytest.approx(TRAINING_GAIN * 3 / 4)
    assert not demand[:, 1:].any()


def test_without_rank_zero_nothing_is_demanded():
    assert not rank_demand(SearchSpace(GROUPS, (4,), (4, 8))).any()


def test_memory_that_quantization_does_not_need_goes_to_adapters():
    """At 16 bits no rank lowers the error, so without demand the allocation leaves every rank at 0."""
    space = SearchSpace(GROUPS, (4, 16), (0, 4, 8))
    rises = np.zeros((2, 2, 3))
    rises[:, 0] = [0.3, 0.2, 0.1]
    sizes = np.array([[[40, 44, 48], [160, 164, 168]]] * 2)
    demand = rank_demand(space)[:, None, :]
    plans = [allocate(SearchProblem(space, sizes, table, 0, 330)) for table in (rises, rises + demand)]
    assert plans == [((1, 0), (1, 0)), ((1, 1), (1, 1))]
