"""How ``--help`` and errors in the arguments look."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any


class Subparser(argparse.ArgumentParser):
    """Reports what it does not know itself, with its own usage, and the option that was probably meant."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse all of ``args``; what is unknown ends the program."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [part.partition("=")[0] for part in unknown if part.startswith("--")]
            close = [match for part in options for match in difflib.get_close_matches(part, self._option_string_actions, n=1)]
            advice = f"; did you mean {', '.join(close)}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
        return found, unknown


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the paragraphs of a description, and adds a default where it says something and the help does not."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(HelpFormatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or action.nargs == 0 or not action.option_strings or "default" in said:
            return said
        if isinstance(action.default, str | list | tuple) and not action.default:
            return said
        default = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else str(action.default)
        return f"{said} (default: {default.replace('%', '%%')})"
