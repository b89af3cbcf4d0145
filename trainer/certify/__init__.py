"""Proof that a layout trains as one process does, on a small twin of the model."""
