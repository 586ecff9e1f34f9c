"""Data only: the shape of the model and the modes."""
