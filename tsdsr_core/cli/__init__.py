"""The command line: ``command`` is the entry point; the other modules are one subcommand each, or shared by several.

Each subcommand has ``add_arguments(parser)`` and ``run(options) -> exit code``.  ``bench`` is a folder,
``perceptual`` belongs to ``evaluate`` (``tsdsr eval``), ``prepare`` to ``train``; ``arguments`` is shared.
"""

from .command import main as main
