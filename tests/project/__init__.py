"""Rules of the project: boundaries between folders, documentation, examples, experiments."""
