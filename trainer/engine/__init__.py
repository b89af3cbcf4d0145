"""Engines: the only importers of their libraries."""
