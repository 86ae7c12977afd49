"""Training of one-step restorers; inference never imports this package."""
