"""Names that modules of a model can have."""

from __future__ import annotations

import reprlib

from peft_autoqra.errors import InvalidPlanError

MAX_NAME_LENGTH = 512
MAX_MODULES = 2**17
"""More than any model has; mixtures of experts, whose experts are layers of their own, come to some 70,000."""


def check_module_name(name: object) -> None:
    """Refuse what ``named_modules()`` does not give: PyTorch takes any text without a dot as the name of a child.

    Of those, names with slashes, which are no attribute of any model but could be taken for paths, and with characters
    that cannot be printed are refused too.

    Raises:
        InvalidPlanError: not such a name.
    """
    if (
        isinstance(name, str)
        and len(name) <= MAX_NAME_LENGTH
        and name.isprintable()
        and not {"/", "\\"} & set(name)
        and all(name.split("."))
    ):
        return
    raise InvalidPlanError(
        f"The plan names the module {reprlib.repr(name)}; give its dotted name as text, as named_modules() does, such "
        f"as 'model.layers.0.mlp.up_proj': of at most {MAX_NAME_LENGTH} characters, without slashes."
    )
