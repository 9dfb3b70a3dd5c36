"""One training loop for both stages: engines, checkpoints, faults, and Ray Train around it."""
