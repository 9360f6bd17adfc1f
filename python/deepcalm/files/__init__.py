"""What is read and written: checkpoints, packed files, and the way from one to the other."""
