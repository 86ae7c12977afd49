"""Image files: formats, bit depths, colour modes and metadata (start at ``files``), and the files of a command (``jobs``)."""
