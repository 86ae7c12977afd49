"""The networks of a training run: student, teacher and fake model (phi) (``roles``), and how they are built."""
