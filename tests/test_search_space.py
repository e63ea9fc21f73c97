"""The ladders of a search: encoding, neighbors, sampling, and what no space can be."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import SUPPORTED_BITS, LayerPlan
from peft_autoqra.search_space import ModuleGroup, SearchSpace

GROUPS = (
    ModuleGroup("layers.0", ("layers.0.q", "layers.0.k"), 64),
    ModuleGroup("layers.1", ("layers.1.q",), 8),
    ModuleGroup("layers.2", ("layers.2.q",), 0),
)


def make_space(**changes: Any) -> SearchSpace:
    arguments = {"groups": GROUPS, "bit_choices": (2, 4, 16), "rank_choices": (0, 4, 8, 64)}
    return SearchSpace(**(arguments | changes))


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    max_ranks = draw(st.lists(st.integers(0, 100), min_size=1, max_size=5))
    groups = tuple(ModuleGroup(f"g{i}", (f"g{i}.a", f"g{i}.b"), max_rank) for i, max_rank in enumerate(max_ranks))
    bits = tuple(sorted(draw(st.sets(st.sampled_from(SUPPORTED_BITS), min_size=1))))
    ranks = (0, *sorted(draw(st.sets(st.integers(1, 64), max_size=4))))
    return SearchSpace(groups, bits, ranks)


@settings(max_examples=50, deadline=None)
@given(space=spaces(), seed=st.integers(0, 2**32 - 1))
def test_samples_are_in_the_space_and_survive_both_round_trips(space: SearchSpace, seed: int) -> None:
    candidate = space.sample(np.random.default_rng(seed))
    assert space.contains(candidate)
    assert space.encode(space.decode(candidate)) == candidate
    assert space.from_array(space.as_array(candidate)) == candidate
    bits, ranks = space.as_array(candidate).T
    assert space.allowed_choices()[np.arange(space.num_groups), bits, ranks].all()
    assert hash(space.from_array(space.as_array(candidate))) == hash(candidate)


@settings(max_examples=50, deadline=None)
@given(space=spaces(), seed=st.integers(0, 2**32 - 1))
def test_neighbors_are_all_candidates_one_step_away(space: SearchSpace, seed: int) -> None:
    candidate = space.sample(np.random.default_rng(seed))
    neighbors = list(space.neighbors(candidate))
    position = space.as_array(candidate)
    assert len(set(neighbors)) == len(neighbors)
    assert all(space.contains(neighbor) for neighbor in neighbors)
    assert all(np.abs(space.as_array(neighbor) - position).sum() == 1 for neighbor in neighbors)
    assert all(candidate in set(space.neighbors(neighbor)) for neighbor in neighbors)
    room = (position > 0).sum() + (position < space.num_rungs - 1).sum()
    assert len(neighbors) == room


def test_decoding_gives_every_module_its_groups_choice() -> None:
    layers = make_space().decode(((1, 3), (0, 2), (2, 0)))
    assert layers == {
        "layers.0.q": LayerPlan(4, 64),
        "layers.0.k": LayerPlan(4, 64),
        "layers.1.q": LayerPlan(2, 8),
        "layers.2.q": LayerPlan(16, 0),
    }


def test_ranks_above_a_groups_limit_are_not_allowed() -> None:
    space = make_space()
    assert [space.num_ranks(index) for index in range(3)] == [4, 3, 1]
    assert space.allowed_choices().sum(axis=(1, 2)).tolist() == [12, 9, 3]
    assert space.contains(((0, 3), (0, 2), (0, 0)))
    assert not space.contains(((0, 3), (0, 3), (0, 0)))
    assert not space.contains(((0, 3), (0, 2), (0, -1)))
    assert not space.contains(((3, 0), (0, 0), (0, 0)))
    assert not space.contains(((0, 0), (0, 0)))


def test_uniform_lowers_the_rank_where_it_does_not_fit() -> None:
    assert make_space().uniform(4, 64) == ((1, 3), (1, 2), (1, 0))


@pytest.mark.parametrize(("bits", "rank"), [(3, 4), (4, 5)])
def test_uniform_refuses_what_is_no_choice(bits: int, rank: int) -> None:
    with pytest.raises(InvalidPlanError, match=f"LayerPlan.bits={bits}, rank={rank}."):
        make_space().uniform(bits, rank)


def test_sampling_depends_on_nothing_but_the_generator() -> None:
    space = make_space()
    draws = [[space.sample(rng) for _ in range(5)] for rng in (np.random.default_rng(3), np.random.default_rng(3))]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bit_choices": ()}, "bit_choices"),
        ({"bit_choices": (4, 2)}, "bit_choices.*ascending"),
        ({"bit_choices": (2, 2, 4)}, "bit_choices.*without repeats"),
        ({"bit_choices": (2, 5)}, "bits=5 is not supported"),
        ({"rank_choices": ()}, "rank_choices"),
        ({"rank_choices": (4, 0)}, "rank_choices.*ascending"),
        ({"rank_choices": (-4, 0)}, "rank=-4"),
        ({"rank_choices": (0, 4.5)}, "rank=4.5"),
        ({"rank_choices": (4, 8)}, "'layers.2' takes ranks up to 0.*add 0"),
        ({"groups": ()}, "no modules"),
        ({"groups": (*GROUPS, ModuleGroup("again", ("layers.1.q",), 8))}, "two groups"),
    ],
)
def test_what_no_space_can_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPlanError, match=message):
        make_space(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.k": LayerPlan(2, 4)}, "'layers.0' need one common"),
        ({"layers.0.k": None}, "'layers.0' need one common"),
        ({"layers.2.q": LayerPlan(3, 0)}, "bits=3, rank=0. is not among the choices"),
        ({"layers.2.q": LayerPlan(2, 5)}, "bits=2, rank=5. is not among the choices"),
        ({"layers.2.q": LayerPlan(2, 4)}, "'layers.2' takes ranks up to 0"),
        ({"layers.3.q": LayerPlan(2, 0)}, "layers.3.q"),
    ],
)
def test_layers_that_no_candidate_decodes_to(changes: dict[str, LayerPlan | None], message: str) -> None:
    space = make_space()
    layers = space.decode(space.uniform(4, 8)) | changes
    with pytest.raises(InvalidPlanError, match=message):
        space.encode({name: layer for name, layer in layers.items() if layer is not None})
