"""The networks of a training run: student, teacher and LoRA model (``roles``), and how they are built."""
