"""Weights of released models, by way of their diffusers layout."""
