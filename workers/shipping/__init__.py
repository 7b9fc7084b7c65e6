"""Shipping: moves paged caches from a prefill worker to a decode worker, over one process group for each pair of workers."""
