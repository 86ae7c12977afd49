"""Video files, frame by frame, through PyAV: which are taken, reading, colours, and writing with the sound kept."""
