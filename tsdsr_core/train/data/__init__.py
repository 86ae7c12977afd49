"""Training data: folders of photographs, prepared folders, degradations and batches. Start at ``dataset``."""
