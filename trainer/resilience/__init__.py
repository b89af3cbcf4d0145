"""How a run survives: signals, guards, the watchdog, checksums, the run's lock, and goodput."""
