"""Model families: what a folder or a bundle holds, and how it becomes a ``Restorer``.

``record``    what a family is                       ``bundle``, ``bundle_header``   one file with a model, or with LoRAs
``sd3``, ``small``   the families                    ``folder``   folders in diffusers' layout
``load``      ``load``: the built-in model, a bundle or a folder as a ``Restorer``
``restorer``  a loaded model on a device

A family is one record and one line in ``FAMILIES``.  Records are light: a model library is imported when a model is built.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import InputError
from .record import Config, Family, Part
from .sd3 import SD3
from .small import SMALL

FAMILIES: tuple[Family, ...] = (
    SMALL,
    SD3,
)
"""All families; the first one that matches a file is its family."""


def family_of(configs: Mapping[str, Config]) -> Family:
    """The family of the configurations by part of a folder or a bundle.

    Raises:
        InputError: if no family knows them.
    """
    for family in FAMILIES:
        if family.matches(configs):
            return family
    for part, config in configs.items():
        expected = {family.parts[part].class_name: family.title for family in FAMILIES}
        found = config.get("_class_name")
        if found not in (None, *expected):
            known = ", ".join(f"{name} ({title})" for name, title in expected.items())
            raise InputError(f"the {part}'s configuration is for a {found}: expected {known}")
    raise InputError(f"the model's kind is not known: expected {', '.join(family.title for family in FAMILIES)}")


def part_folders(part: str) -> tuple[str, ...]:
    """The names that a part's folder has in the families' layouts."""
    return tuple(dict.fromkeys(family.parts[part].folder or part for family in FAMILIES))


def check_config_numbers(part: Part, config: Config, required: bool = True) -> None:
    """Check the whole numbers of a part's configuration.

    Args:
        required: whether all of them must be present; if not, the model's class has defaults for missing ones.

    Raises:
        InputError: with the first invalid number.
    """
    for name, (least, most) in part.whole_numbers.items():
        value = config.get(name)
        if (required or name in config) and (type(value) is not int or not least <= value <= most):
            raise InputError(f"{name} = {value!r}: expected a whole number from {least} to {most}")
