"""The demo dataset: real clips, and a theatre of real pictures with exact captions."""
