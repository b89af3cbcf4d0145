"""What a recipe needs on a cluster that need not exist: memory, communication, FLOPs, time."""
