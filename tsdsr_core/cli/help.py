"""How ``--help`` looks."""

from __future__ import annotations

import argparse


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
