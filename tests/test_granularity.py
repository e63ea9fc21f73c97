"""Which modules share a decision."""

import pytest

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.granularity import Granularity, build_search_space
from peft_autoqra.memory import MemoryModel, ModuleShape
from tests.conftest import TinyLlamaFactory

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def llama_modules(num_layers: int = 2) -> dict[str, ModuleShape]:
    shapes = {"k_proj": ModuleShape(32, 64, 4), "v_proj": ModuleShape(32, 64, 4)}
    return {
        f"model.layers.{layer}.{part}.{child}": shapes.get(child, ModuleShape(64, 64, 4))
        for layer in range(num_layers)
        for part, children in (("self_attn", ATTENTION), ("mlp", MLP))
        for child in children
    }


@pytest.mark.parametrize(
    ("granularity", "sizes"),
    [("module", [1] * 14), ("fused", [3, 1, 2, 1] * 2), ("block", [4, 3] * 2), ("layer", [7] * 2)],
)
def test_groups_of_a_llama(granularity: Granularity, sizes: list[int]) -> None:
    space = build_search_space(llama_modules(), granularity, (2, 4), (0, 4))
    assert [len(group.modules) for group in space.groups] == sizes
    assert sorted(module for group in space.groups for module in group.modules) == sorted(llama_modules())
    assert len({group.name for group in space.groups}) == len(space.groups)


def test_fused_groups_are_what_serving_fuses() -> None:
    space = build_search_space(llama_modules(1), "fused", (2, 4), (0, 4))
    groups = {group.name: {module.rpartition(".")[2] for module in group.modules} for group in space.groups}
    assert groups == {
        "model.layers.0.self_attn.qkv_proj": {"q_proj", "k_proj", "v_proj"},
        "model.layers.0.self_attn.o_proj": {"o_proj"},
        "model.layers.0.mlp.gate_up_proj": {"gate_proj", "up_proj"},
        "model.layers.0.mlp.down_proj": {"down_proj"},
    }


@pytest.mark.parametrize("granularity", ["module", "fused", "block", "layer"])
def test_the_smallest_weight_of_a_group_limits_its_rank(granularity: Granularity) -> None:
    space = build_search_space(llama_modules(1), granularity, (4,), (0, 16, 32, 64))
    for group in space.groups:
        has_small = any(module.endswith(("k_proj", "v_proj")) for module in group.modules)
        assert group.max_rank == (32 if has_small else 64)


def test_layers_with_two_digits_stay_apart() -> None:
    space = build_search_space(llama_modules(12), "layer", (4,), (0,))
    assert [group.name for group in space.groups] == [f"model.layers.{layer}" for layer in range(12)]


@pytest.mark.parametrize("granularity", ["module", "fused", "block", "layer"])
def test_modules_outside_of_any_layer(granularity: Granularity) -> None:
    names = ("lm_head", "model.projector", "model.embed_out")
    space = build_search_space(dict.fromkeys(names, ModuleShape(64, 64, 4)), granularity, (4,), (0,))
    modules = [module for group in space.groups for module in group.modules]
    assert sorted(modules) == sorted(names)


def test_choices_are_sorted_and_unique() -> None:
    space = build_search_space(llama_modules(), "layer", [8, 2, 2, 4], [16, 0, 16])
    assert space.bit_choices == (2, 4, 8)
    assert space.rank_choices == (0, 16)


def test_a_real_model(tiny_llama: TinyLlamaFactory) -> None:
    modules = MemoryModel.from_model(tiny_llama()).modules
    assert build_search_space(modules, "layer", (4,), (0, 4)).num_groups == 2
    assert build_search_space(modules, "module", (4,), (0, 4)).num_groups == 14


@pytest.mark.parametrize(
    ("granularity", "bits", "ranks", "message"),
    [
        ("tensor", (4,), (0,), "granularity='tensor' is unknown; use one of"),
        ("layer", (4, 7), (0,), "bits=7"),
        ("layer", (4,), (-1,), "rank=-1"),
        ("layer", (), (0,), "bit_choices"),
        ("layer", (4,), (128,), "add 0 to rank_choices"),
    ],
)
def test_what_is_refused(granularity: str, bits: tuple[int, ...], ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidPlanError, match=message):
        build_search_space(llama_modules(), granularity, bits, ranks)  # type: ignore[arg-type]
