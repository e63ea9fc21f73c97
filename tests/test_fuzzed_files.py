"""Random damage to every file that is read: only errors of this package come out, and what is read is a value.

``AUTOQRA_FUZZ_EXAMPLES=100000 pytest tests/test_fuzzed_files.py`` looks longer, and elsewhere each time.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig
from peft_autoqra.errors import AutoQRAError, InvalidPlanError
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import SUPPORTED_BITS, BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import CALIBRATION_FILE, Correction, PlanCalibration, StoredCodes
from peft_autoqra.plan_file import PLAN_FILE, checksum
from tests.hostile_files import read_raw, write_raw

EXAMPLES = int(os.environ.get("AUTOQRA_FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 80,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.timeout(60 if not EXAMPLES else 36_000)

# --------------------------------------------------------------------------------------------------- values that are


children = st.text(st.characters(categories=("L", "N"), include_characters="_- <>:"), min_size=1, max_size=6)
names = st.lists(children, min_size=1, max_size=3).map(".".join)
lines = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=9)
sizes = st.integers(1, 2**31 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def plans(draw: st.DrawFn) -> BitRankPlan:
    layers, shapes = {}, {}
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        shape = draw(st.none() | st.tuples(sizes, sizes))
        layers[name] = LayerPlan(draw(st.sampled_from(SUPPORTED_BITS)), draw(st.integers(0, min(shape or (99,)))))
        if shape:
            shapes[name] = shape
    return BitRankPlan(
        layers,
        shapes=shapes,
        quantizer=QuantizerSettings(
            backend=draw(st.sampled_from(("native", "gptq", "bitsandbytes"))),
            group_size=2 ** draw(st.integers(3, 20)),
        ),
        initialization=draw(st.sampled_from(("compensate", "zero"))),
        base_model=draw(st.just(BaseModelInfo()) | st.builds(BaseModelInfo, name_or_path=lines)),
        memory=draw(st.none() | st.just(MemoryEstimate(**dict.fromkeys(MEMORY_PARTS, draw(st.integers(0, 2**60)))))),
        provenance=draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
    )


MEMORY_PARTS = [f"{part}_bytes" for part in ("weight", "metadata", "untouched", "adapter", "gradient", "optimizer")]
PLAN = BitRankPlan(
    {"a.q_proj": LayerPlan(3, 4), "a.k_proj": LayerPlan(16, 2), "b": LayerPlan(2, 0)},
    shapes={"a.q_proj": (32, 64), "a.k_proj": (16, 64)},
    memory=MemoryEstimate(**dict.fromkeys(MEMORY_PARTS, 1)),
    provenance={"lora_alpha": 16, "stages": [{"name": "search", "losses": [1.5, None]}]},
)
CALIBRATION = PlanCalibration(
    input_second_moments={"a.q_proj": np.ones(64, np.float32)},
    corrections={"a.q_proj": Correction(left=np.ones((32, 4), np.float16), right=np.ones((4, 64), np.float16))},
    codes={"b": StoredCodes(**{kind: np.zeros(8, np.uint8) for kind in ("codes", "scale_codes", "scale_base")})},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


# ------------------------------------------------------------------------------------------------------------- damage

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 16, 4.0, -0.0, 1e300, float("inf"), float("nan"), 2**31, 2**63, 2**70, 10**400),
    *("", "x", "../x", "/etc/passwd", "a\0b", "a..b", "\ud800", "é", "a" * 600, "a.q_proj", "(a+)+$", "{9}", "(", "*"),
    *([], {}, [[]], [1], [1, 2], ["a"], {"a": 1}, {"": None}, {"a": {"a": {}}}),
    *(
        "all-linear",
        "native",
        "gptq",
        "compensate",
        "pissa",
        "I64",
        "F16",
        "BOOL",
        10**9,
        [10**9],
        [0, 8],
        [2**40, 2**40],
    ),
]


@st.composite
def damaged(draw: st.DrawFn, good: Any) -> Any:
    """JSON with one to three values replaced, dropped, doubled or moved."""
    content = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        place, parents = content, []
        while isinstance(place, dict | list) and place and (not parents or draw(st.booleans())):
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            parents.append((place, key))
            place = place[key]
        if not parents:
            return draw(st.sampled_from(HOSTILE))
        parent, key = parents[-1]
        change = draw(st.sampled_from(("replace", "replace", "replace", "drop", "add")))
        value = copy.deepcopy(draw(st.sampled_from(HOSTILE) | json_values))
        if change == "drop":
            del parent[key]
        elif change == "add" and isinstance(parent, list):
            parent.append(value)
        elif change == "add":
            parent[draw(st.sampled_from([text for text in HOSTILE if isinstance(text, str)]))] = value
        else:
            parent[key] = value
    return content


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes of which some are flipped, cut out, doubled or new."""
    content = good
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 64)))
        part = draw(st.sampled_from([b"", content[start:end] * 2]) | st.binary(max_size=8))
        content = content[:start] + part + content[end:]
    return content


def only_our_errors(read: Callable[[], Any]) -> Any:
    """What was read, or None where it was refused with a message that is not endless."""
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's regular expressions and PEFT about odd values
            return read()
    except AutoQRAError as error:
        message = str(error)
    assert 0 < len(message) < 20_000
    return None


def read_plan(folder: Path) -> None:
    plan = only_our_errors(lambda: BitRankPlan.from_pretrained(folder))
    if plan is not None:
        again = BitRankPlan.from_metadata(plan.replace(calibration=None).to_metadata(), "here")
        assert again == plan
        repr(plan)


def calibration_file(folder: Path) -> bytes:
    CALIBRATION.save(folder)
    return (folder / CALIBRATION_FILE).read_bytes()


# -------------------------------------------------------------------------------------------------------------- tests


@fuzz
@given(plan=plans())
def test_any_plan_is_read_as_it_was_written(folder: Path, plan: BitRankPlan) -> None:
    plan.save_pretrained(folder)
    again = BitRankPlan.from_pretrained(folder)
    assert again == plan
    assert list(again) == list(plan)
    for name in ("shapes", "quantizer", "base_model", "memory", "provenance"):
        assert getattr(again, name) == getattr(plan, name)


@fuzz
@given(text=damaged(json.loads(PLAN.to_metadata()["autoqra_plan"])).map(json.dumps))
def test_content_with_a_right_checksum(text: str) -> None:
    metadata = PLAN.to_metadata() | {"autoqra_plan": text}
    metadata["autoqra_checksum"] = checksum(metadata)
    plan = only_our_errors(lambda: BitRankPlan.from_metadata(metadata, "here"))
    if plan is not None:
        assert BitRankPlan.from_metadata(plan.to_metadata(), "here") == plan
        only_our_errors(lambda: AutoQRAConfig(plan=plan))


@fuzz
@given(metadata=damaged(PLAN.to_metadata()))
def test_headers(metadata: Any) -> None:
    if isinstance(metadata, dict):
        only_our_errors(lambda: BitRankPlan.from_metadata(metadata, "here"))
        only_our_errors(lambda: AutoQRAQuantConfig.from_dict({"plan": metadata}))


@fuzz
@given(data=st.data())
def test_tables_of_tensors(folder: Path, data: st.DataObject) -> None:
    PLAN.save_pretrained(folder)
    header, tensors = read_raw(folder / PLAN_FILE)
    write_raw(folder / PLAN_FILE, data.draw(damaged(header)), tensors)
    read_plan(folder)
    CALIBRATION.save(folder)
    header, tensors = read_raw(folder / CALIBRATION_FILE)
    write_raw(folder / CALIBRATION_FILE, data.draw(damaged(header)), tensors)
    only_our_errors(lambda: PlanCalibration.load(folder / CALIBRATION_FILE, shapes=PLAN.shapes))


@fuzz
@given(data=st.data())
def test_bytes(folder: Path, data: st.DataObject) -> None:
    PLAN.save_pretrained(folder)
    (folder / PLAN_FILE).write_bytes(data.draw(damaged_bytes((folder / PLAN_FILE).read_bytes())))
    read_plan(folder)
    (folder / CALIBRATION_FILE).write_bytes(data.draw(damaged_bytes(calibration_file(folder))))
    only_our_errors(lambda: PlanCalibration.load(folder / CALIBRATION_FILE))


@fuzz
@given(content=st.binary(max_size=64), text=st.binary(max_size=64))
def test_anything(folder: Path, content: bytes, text: bytes) -> None:
    for whole in (content, struct.pack("<Q", len(text)) + text + content):
        (folder / PLAN_FILE).write_bytes(whole)
        with pytest.raises(InvalidPlanError):
            BitRankPlan.from_pretrained(folder)
        (folder / CALIBRATION_FILE).write_bytes(whole)
        only_our_errors(lambda: PlanCalibration.load(folder / CALIBRATION_FILE))


ADAPTER_CONFIG = {
    key: sorted(value) if isinstance(value, set) else value
    for key, value in AutoQRAConfig(plan=PLAN, modules_to_save=["head"], exclude_modules=r"vision\..*")
    .to_dict()
    .items()
}


@fuzz
@given(content=damaged(ADAPTER_CONFIG))
def test_settings_of_adapters(folder: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.keys() >= {"runtime_config"}:
        return
    content |= {"peft_type": "LORA"}  # else it is not ours
    if "autoqra_version" not in content:
        return
    (folder / "adapter_config.json").write_text(json.dumps(content))
    config = only_our_errors(lambda: AutoQRAConfig.from_pretrained(str(folder)))
    if config is not None:
        json.dumps(config.to_dict(), default=sorted)


QUANT_CONFIG = {
    "modules": {"a": {"bits": 3, "shape": [8, 16], "group_size": 8, "calibration_digest": "ab"}},
    "quant_method": "autoqra",
    "bits_pattern": {r"v_proj|.*\.k_proj": 8},
    "target_modules": ".*_proj",
    "plan": None,
}


@fuzz
@given(content=damaged(AutoQRAQuantConfig(bits=4).to_dict() | QUANT_CONFIG))
def test_settings_of_quantized_bases(content: Any) -> None:
    if isinstance(content, dict):
        only_our_errors(lambda: AutoQRAQuantConfig.from_dict(content))
