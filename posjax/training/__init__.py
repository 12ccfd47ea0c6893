"""The train state and the train step, checkpoints, and the loop of a run."""
