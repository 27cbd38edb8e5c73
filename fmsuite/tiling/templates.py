"""Where what belongs to a source lies: a folder, or a path with fields that stand for parts of the source's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from string import Formatter


def absolute_template(what: str, template: str, fields: Sequence[str]) -> str:
    """A template from the working directory, so that an index can be used from another one; one that begins with
    ``{folder}`` as it is.

    Args:
        what: the option, for messages.
        fields: that there are.

    Raises:
        ValueError: if it names a field that there is not.
    """
    try:
        named = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{what}: '{template}' is not a template ({error})") from error
    if not template.strip() or any(field not in fields for field in named):
        known = ", ".join("{" + field + "}" for field in fields)
        raise ValueError(f"{what}: '{template}' must be a folder, or a path with some of {known}")
    if template.startswith("{folder}"):
        return template
    return os.path.abspath(os.path.expanduser(template))


def is_template(path: str) -> bool:
    """Whether it has fields."""
    return any(field for _, field, _, _ in Formatter().parse(path))
