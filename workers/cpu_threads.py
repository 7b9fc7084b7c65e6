"""How many cores the operators of one thread of this process use."""

import torch


def use_threads(count: int) -> None:
    """For the calling thread: `torch.set_num_threads` that the thread's first operator does not undo.

    Only one thread of a process should have more than one. Two have more OpenMP helpers than there are cores; then libgomp puts them
    all to sleep after every operator, and two cores are slower than one.
    """
    torch.get_num_threads()  # takes the process's default now; otherwise the first operator would
    torch.set_num_threads(count)
