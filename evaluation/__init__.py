"""Evaluation: metrics, tasks and the figures of the model card."""
