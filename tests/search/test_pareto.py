import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_autoqra.search.pareto import ParetoPoint, hypervolume, nondominated

points = st.lists(
    st.builds(lambda loss, size: ParetoPoint(((0, 0),), float(loss), size), st.integers(0, 12), st.integers(0, 12)),
    max_size=12,
)


def dominates(a, b):
    return (a.loss <= b.loss and a.total_bytes <= b.total_bytes) and (a.loss, a.total_bytes) != (b.loss, b.total_bytes)


@given(points)
def test_front_holds_exactly_the_undominated(cloud):
    expected = {(p.loss, p.total_bytes) for p in cloud if not any(dominates(q, p) for q in cloud)}
    front = nondominated(cloud)
    assert {(p.loss, p.total_bytes) for p in front} == expected
    assert len(front) == len(expected)


@given(points)
def test_hypervolume_counts_the_dominated_cells(cloud):
    grid = np.zeros((10, 10), dtype=bool)
    for point in cloud:
        grid[int(point.loss) :, point.total_bytes :] = True
    assert hypervolume(cloud, 10.0, 10) == pytest.approx(grid.sum())
