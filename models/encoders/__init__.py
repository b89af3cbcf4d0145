"""Frozen encoders (text, video) behind one protocol."""
