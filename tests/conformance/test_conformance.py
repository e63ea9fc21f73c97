"""Every feature on every model: it works, or is refused with its reason before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance import adapter_features, merging_features, reload_features, trainer_features
from tests.conformance.feature import Feature
from tests.conformance.models import CASES, ModelCase
from tests.conformance.table import MEANINGLESS, REFUSED, WORKS

FEATURES = (
    *adapter_features.GROUP.features,
    *merging_features.GROUP.features,
    *reload_features.GROUP.features,
    *trainer_features.GROUP.features,
)


@pytest.mark.filterwarnings("ignore:The experts that the model keeps in fused parameters:UserWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # PEFT needs the old name
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_conformance(feature: Feature, case: ModelCase, tmp_path: Path, record_property: Any) -> None:
    outcome, reason = WORKS, ""
    if case.name in feature.meaningless:
        outcome, reason = MEANINGLESS, feature.meaningless[case.name]
    elif refusal := feature.refused.get(case.name):
        outcome, reason = REFUSED, refusal.reason
        with pytest.raises(refusal.error, match=refusal.match):
            feature.check(case, tmp_path)
    else:
        feature.check(case, tmp_path)
    num_cells = len(FEATURES) * len(CASES)
    record_property("conformance", (feature.group, feature.name, case.name, outcome, reason, num_cells))


def test_every_refusal_and_gap_has_a_reason() -> None:
    names = {case.name for case in CASES}
    assert len({(feature.group, feature.name) for feature in FEATURES}) == len(FEATURES)
    for feature in FEATURES:
        assert names >= feature.refused.keys() | feature.meaningless.keys()
        assert all(refusal.reason for refusal in feature.refused.values())
        assert all(feature.meaningless.values()), feature.name
