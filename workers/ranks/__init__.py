"""A worker of several ranks: one process for each, rank 0 leads."""
