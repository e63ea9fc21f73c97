"""Which names a plan may hold: all that models have."""

from typing import Any

import pytest
from torch import nn

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_NAME_LENGTH, check_module_name

NO_NAMES: list[Any] = [
    *("", ".", "a.", ".a", "a..b", "../x", "/etc/passwd", "a/b", "a\\b"),
    *("a\0", "a\n", "a\x7f", "\ud800", "\u202ea", "a" * (MAX_NAME_LENGTH + 1), 3, None, b"a"),
]


def test_names_that_models_have() -> None:
    odd = nn.ModuleDict({"user->item": nn.Linear(2, 2), "Größe 2": nn.ModuleDict({"<x>": nn.Linear(2, 2)})})
    for name, _ in [*odd.named_modules(), *nn.Sequential(nn.Linear(2, 2)).named_modules()][1:]:
        if name:
            check_module_name(name)
    check_module_name("model.language_model.layers.59.mlp.experts.383.down_proj")


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_names_that_none_has(name: Any) -> None:
    with pytest.raises(InvalidPlanError, match="names the module") as raised:
        check_module_name(name)
    assert len(str(raised.value)) < 400
