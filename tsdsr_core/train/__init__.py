"""Training of one-step restorers; inference does not import this package. Start at ``trainers``."""
