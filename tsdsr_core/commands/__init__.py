"""One module per subcommand of ``tsdsr``: ``add_arguments(parser)`` and ``run(options) -> exit code``."""
