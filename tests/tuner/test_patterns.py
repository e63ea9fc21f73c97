"""Patterns that come with a file: ordinary ones pass, those that could run for ever do not."""

import re
import time

import pytest
from peft.utils.other import get_pattern_key

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.tuner.config import AutoQRAConfig, exact_pattern
from peft_autoqra.tuner.patterns import MAX_PATTERN_LENGTH, check_patterns_of_file, check_syntax, is_exact
from peft_autoqra.tuner.targets import matching_keys

pytestmark = pytest.mark.timeout(30)
NAME = "model.decoder.layers.31.block.7.SelfAttention.experts.127.q_projection_of_some_length_"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "rank_pattern": {}, "alpha_pattern": None},
        {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"},  # of PEFT's documentation
        {"target_modules": r"model\.layers\.(0|1|2[0-9])\..*_proj", "exclude_modules": r"vision\..*"},
        {"target_modules": ["(a+)+$"]},  # PEFT compares names, and makes no pattern of them
        {"rank_pattern": {"q_proj": 4, r"layers\.\d+\.mlp\..*": 8}, "alpha_pattern": {"^model.layers.0.q_proj": 1}},
        {"modules_to_save": ["lm_head", "score"], "layers_pattern": ["layers", "h"]},
        {"bits_pattern": {exact_pattern(f"model.layers.7.mlp.experts.{i}.up_proj"): 3 for i in range(20_000)}},
        {"bits_pattern": {exact_pattern("a b-c.ü<x>:" + 400 * "y"): 3}},
        {"target_modules": r"(?:model\.)?layers\.[0-9]{1,2}\.(?:q|k)_proj(?i:X)?"},
    ],
)
def test_ordinary_patterns_pass(settings: dict[str, object]) -> None:
    check_patterns_of_file(settings)


HARMFUL = [
    r"(a+)+$",
    r"(a*)*b",
    r"(a|a)*b",
    r"(a|ab|b)*c",
    r"(?:[a-z_]+\.?)+x",
    r"(.*)(.*)(.*)(.*)x",
    r".*.*.*.*x",
    r"(\w)\1",
    r"(a)(?(1)b|c)",
    r"(?=.*a)b",
    r"((a{60}){60}){60}",
    r"((){60}){60}",
    r"(?:){1000}",
    r"a{99999999999}",
    "a?" * 40 + "a" * 40,
    "(a|b|ab)" * 20,
    "(" * 500 + ")" * 500,
    "(?:" * 100 + "a" + ")?" * 100,
    "a" * (MAX_PATTERN_LENGTH + 1),
    "(",
    "[",
    "*",
]


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "bits_pattern"]
)
@pytest.mark.parametrize("pattern", HARMFUL)
def test_harmful_patterns_are_refused(field: str, pattern: str) -> None:
    value = {pattern: 4} if field.endswith("pattern") else pattern
    with pytest.raises(InvalidPlanError, match=f"The {field} .* of the file .*; write exact module names") as raised:
        check_patterns_of_file({field: value})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("field", ["layers_pattern", "modules_to_save"])
@pytest.mark.parametrize("pattern", ["{9}", "{1,99}", "+", "(a+)+", "(?P<idx>a)|(", r".*.*.*a"])
def test_what_peft_puts_around_a_pattern_counts(field: str, pattern: str) -> None:
    with pytest.raises(InvalidPlanError, match=field):
        check_patterns_of_file({field: [pattern]})


def test_many_patterns_together_are_refused() -> None:
    patterns = {rf"{index}.*x.*": 4 for index in range(1000)}
    check_patterns_of_file({"rank_pattern": dict(list(patterns.items())[:1])})
    with pytest.raises(InvalidPlanError, match="too long"):
        check_patterns_of_file({"rank_pattern": dict(list(patterns.items())[:256])})


@pytest.mark.parametrize("key", ["zz{}", r"zz\.{}", "a[b]{}", "^zz.{}", "^zz{}$"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "bits_pattern"])
def test_keys_that_have_to_be_tried_are_few(field: str, key: str) -> None:
    """Each is tried on each module, and Python compiles them again and again where there are too many."""
    exact = {exact_pattern(f"model.layers.{index}"): 4 for index in range(1000)}
    check_patterns_of_file({field: exact | {key.format(index): 4 for index in range(256)}})
    with pytest.raises(InvalidPlanError, match=f"{field} holds 257 keys .* at most 256"):
        check_patterns_of_file({field: exact | {key.format(index): 4 for index in range(257)}})


@pytest.mark.parametrize("field", ["modules_to_save", "layers_pattern", "exclude_modules"])
def test_lists_that_are_tried_on_each_module_are_short(field: str) -> None:
    check_patterns_of_file({field: [f"zz{index}" for index in range(128)]})
    names = [f"zz{index}" for index in range(129)]
    for check in (lambda: check_patterns_of_file({field: names}), lambda: AutoQRAConfig(**{field: names})):
        with pytest.raises(InvalidPlanError, match=f"{field} lists 129 names, at most 128"):
            check()


def test_what_could_not_be_read_again_is_refused_before_the_training() -> None:
    by_hand = {f"layers.{index}.q_proj": 4 for index in range(257)}
    AutoQRAConfig(rank_pattern=by_hand, bits_pattern=by_hand)  # become exact when they are applied
    with pytest.raises(InvalidPlanError, match="alpha_pattern holds 257 keys"):
        AutoQRAConfig(alpha_pattern=by_hand)


@pytest.mark.parametrize("name", ["a", "model.layers.0.q_proj", "a b-c.ü<x>:\n", "weird+(name)*[0]{1,2}|^$?\\"])
def test_exact_keys_are_told_from_others(name: str) -> None:
    key = exact_pattern(name)
    assert is_exact(key)
    for other in (key[1:], f"{key}$", f"{key}.*", f"{key}\\d", f"{key}\\"):
        assert not is_exact(other)


def test_keys_of_many_modules_are_looked_up() -> None:
    """As PEFT finds them, also where most keys are of modules that the model does not have."""
    names = [f"model.layers.{index}.up_proj" for index in range(300)]
    patterns = {exact_pattern(name): 2 for name in names[::2]} | {r"layers\.1\d*\.up_proj": 3, "7.up_proj": 4}
    expected = {name: key for name in names if (key := get_pattern_key(patterns, name)) in patterns}
    assert matching_keys(patterns, names) == expected
    many = {exact_pattern(f"zz{index}"): 2 for index in range(20_000)}
    started = time.process_time()
    assert matching_keys(many | patterns, names) == expected
    assert time.process_time() - started < 5  # trying all on all takes minutes


@pytest.mark.parametrize(
    "pattern", [r".*.*.*x", r"(a|_).*.*_.*_(b|c)$", r"[^x]*[^y]*[^z]*!", r"(.*_)?(.*_)?(.?.?.?.?)!"]
)
def test_the_worst_that_passes_takes_no_time(pattern: str) -> None:
    """Under a timeout that exponential ones miss by far."""
    check_patterns_of_file({"target_modules": pattern})
    for _ in range(20):
        assert re.fullmatch(pattern, NAME) is None
    check_patterns_of_file({"rank_pattern": {".*.*x": 4}})
    for _ in range(20):
        assert get_pattern_key([".*.*x"], NAME) == NAME


def test_the_cheap_test_for_exact_names_is_right() -> None:
    """What it lets pass matches names of one length only, so nothing in it repeats."""
    for name in ("model.layers.0.q_proj", "a b-c.ü<x>:", "weird+(name)*[0]{1,2}|^$?"):
        check_patterns_of_file({"rank_pattern": {exact_pattern(name): 4}})
        assert get_pattern_key([exact_pattern(name)], name) == exact_pattern(name)


@pytest.mark.parametrize("pattern", ["(", "(" * 50_000, "a{99999999999}", "(?i)a(?i)b"])
@pytest.mark.parametrize("field", ["rank_pattern", "bits_pattern", "alpha_pattern"])
def test_syntax_errors_of_users_are_errors_of_ours(field: str, pattern: str) -> None:
    with pytest.raises(InvalidPlanError, match=f"{field}: .* is no regular expression"):
        AutoQRAConfig(**{field: {pattern: 4}})
    with pytest.raises(InvalidPlanError, match=r"exclude_modules: '\(' is no"):
        AutoQRAConfig(exclude_modules="(")


def test_users_may_write_what_they_like() -> None:
    check_syntax({"target_modules": r"(a+)+$", "rank_pattern": {r"(\w)\1.*.*.*.*": 4}, "modules_to_save": ["(x|y)*"]})
    assert AutoQRAConfig(target_modules=r"(a+)+$").target_modules == r"(a+)+$"
