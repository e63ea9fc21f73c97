"""The regular expressions of a configuration, and which of them a file may bring."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_NAME_LENGTH

if sys.version_info >= (3, 11):
    from re import _constants as opcodes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as opcodes
    import sre_parse as parser

MAX_PATTERN_LENGTH = 2 * MAX_NAME_LENGTH + 2
"""An exact name with every character escaped."""

_TYPICAL_NAME_LENGTH = 100
_MAX_WAYS = 5_000_000
"""Of matching one name, all patterns of a file together: some milliseconds."""

_WAYS_PER_CHARACTER = 100
"""For compiling it."""

MAX_LIST_LENGTH = 128
"""Of names that PEFT tries one after the other on each module, most of them as patterns."""

MAX_KEYS = 256
"""Of a mapping, exact ones aside; Python keeps 512 compiled patterns, and more would be compiled for each module."""

_LISTS = ("exclude_modules", "layers_pattern", "modules_to_save")
_MAPPINGS = ("rank_pattern", "alpha_pattern", "bits_pattern")

_KEY = r"(.*\.)?({})$"
_WRAPPED = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "rank_pattern": _KEY,
    "alpha_pattern": _KEY,
    "bits_pattern": _KEY,
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
"""What PEFT makes of a field's pattern before it matches, which may change its meaning: ``{9}`` alone is text."""

_ESCAPED, _CHARACTER = re.compile(r"\\(.)", re.DOTALL), r"\1"
_EXACT = re.compile(r"\^?(?:[\w .:<>-]|\\\W)*\$?")
_SINGLES = {opcodes.LITERAL, opcodes.NOT_LITERAL, opcodes.ANY, opcodes.IN, opcodes.AT}
_REPEATS = {opcodes.MAX_REPEAT, opcodes.MIN_REPEAT, getattr(opcodes, "POSSESSIVE_REPEAT", None)}


def check_syntax(settings: Mapping[str, Any]) -> None:
    """Whether all patterns of a configuration are regular expressions.

    Args:
        settings: name of a configuration's field to its value.

    Raises:
        InvalidPlanError: one is none, or is too deep or too large for Python.
    """
    for field, pattern in _patterns(settings):
        if _EXACT.fullmatch(pattern):
            continue
        try:
            re.compile(_wrapped(field, pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise InvalidPlanError(
                f"{field}: {reprlib.repr(pattern)} is no regular expression ({error}); correct it, or write names."
            ) from error


def check_patterns_of_file(settings: Mapping[str, Any]) -> None:
    """Refuse patterns that could take for ever; whoever shares a file chooses them, and others run them.

    Exact names, escaped or not, pass up to the limits of :func:`check_counts`. So do regular expressions without
    back-references, in which no repeat or alternative lies inside a repeat, and that can match a name of 100
    characters in 5 million ways at most, all of them together: three ``.*`` with two alternatives pass, four do not.
    What a user writes in Python may be any pattern.

    Args:
        settings: name of a configuration's field to its value.

    Raises:
        InvalidPlanError: a pattern of another kind, or too many.
    """
    check_counts(settings)
    ways = 0
    for field, pattern in _patterns(settings):
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise InvalidPlanError(_refusal(field, pattern, f"is longer than {MAX_PATTERN_LENGTH} characters"))
        if _EXACT.fullmatch(pattern):
            continue
        try:
            wrapped = parser.parse(_wrapped(field, pattern))
            ways += _WAYS_PER_CHARACTER * len(pattern) + _ways(wrapped, inside_repeat=False)
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            raise InvalidPlanError(_refusal(field, pattern, f"cannot be used ({error})")) from error
        if ways > _MAX_WAYS:
            raise InvalidPlanError(_refusal(field, pattern, "could take too long, alone or after those before it"))


def check_counts(settings: Mapping[str, Any]) -> None:
    """Refuse more names and patterns than can be tried on every module.

    Keys that name one module each (see :func:`is_exact`) are looked up, so a mapping may hold as many as it likes.

    Args:
        settings: name of a configuration's field to its value.

    Raises:
        InvalidPlanError: too many of another kind.
    """
    for field in _LISTS:
        names = settings.get(field)
        if isinstance(names, list | tuple | set) and len(names) > MAX_LIST_LENGTH:
            raise InvalidPlanError(
                f"{field} lists {len(names)} names, at most {MAX_LIST_LENGTH} can be saved and read; write names that "
                "end several modules' names, or a pattern."
            )
    for field in _MAPPINGS:
        keys = settings.get(field)
        num_others = len(inexact(keys)) if isinstance(keys, Mapping) else 0
        if num_others > MAX_KEYS:
            raise InvalidPlanError(
                f"{field} holds {num_others} keys that are no exact names, at most {MAX_KEYS} can be saved and read; "
                "write '^' and the escaped name of each module, or patterns that match more."
            )


def is_exact(key: str) -> bool:
    """Whether a key is what ``exact_pattern`` makes of a module's name: it matches that module only."""
    return key.startswith("^") and key == f"^{re.escape(re.sub(_ESCAPED, _CHARACTER, key[1:]))}"


def inexact(keys: Iterable[str]) -> list[str]:
    """The keys that have to be tried one after the other."""
    return [key for key in keys if not (isinstance(key, str) and is_exact(key))]


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Field and pattern; lists of names are matched as they are, except where PEFT makes patterns of them."""
    for field, value in settings.items():
        if field not in _WRAPPED or value is None:
            continue
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, Mapping) or field in ("layers_pattern", "modules_to_save"):
            yield from ((field, pattern) for pattern in value if isinstance(pattern, str))


def _wrapped(field: str, pattern: str) -> str:
    return _WRAPPED[field].replace("{}", pattern)


def _ways(nodes: Any, *, inside_repeat: bool) -> int:
    """In how many ways a parsed pattern can be laid on a name, at most.

    Raises:
        ValueError: too many to count, or something that is not allowed.
    """
    ways = 1
    for opcode, argument in nodes:
        if opcode in _SINGLES:
            continue
        if opcode is opcodes.SUBPATTERN:
            ways *= _ways(argument[-1], inside_repeat=inside_repeat)
        elif inside_repeat:
            raise ValueError("a repeat of something that repeats or has alternatives")
        elif opcode in _REPEATS:
            ways *= _ways_of_repeat(*argument)
        elif opcode is opcodes.BRANCH:
            ways *= sum(_ways(branch, inside_repeat=False) for branch in argument[1])
        else:
            raise ValueError("only characters, classes, groups, alternatives and repeats are allowed")
        if ways > _MAX_WAYS:
            raise ValueError("it could take too long")
    return ways


def _ways_of_repeat(least: int, most: int, nodes: Any) -> int:
    if least > _TYPICAL_NAME_LENGTH:
        raise ValueError(f"more than {_TYPICAL_NAME_LENGTH} repeats")
    return (1 + min(int(most), _TYPICAL_NAME_LENGTH) - least) * _ways(nodes, inside_repeat=most > 1)


def _refusal(field: str, pattern: str, reason: str) -> str:
    return f"The {field} {reprlib.repr(pattern)} of the file {reason}; write exact module names, or a simpler pattern."
