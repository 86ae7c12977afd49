"""The examples in the docstrings of the library run and give what they say."""

import doctest
import importlib

import pytest

from .test_boundaries import CORE

MODULES = [path for path in sorted(CORE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def name_of(path):
    parts = path.relative_to(CORE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_examples_of_docstrings_give_what_they_say(path):
    module = importlib.import_module(name_of(path))
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried
    assert not failed
