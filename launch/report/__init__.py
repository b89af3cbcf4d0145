"""`kinodit report`: a run folder as one HTML page that needs nothing else."""

from kinodit.launch.report.page import write_report

__all__ = ["write_report"]
