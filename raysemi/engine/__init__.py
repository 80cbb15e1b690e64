"""The train step and everything around it: ranks, averages, checkpoints, metrics, evaluation."""
