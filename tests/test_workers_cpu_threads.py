"""Each thread keeps the number of cores it was given, whatever another one asks for in between."""

import threading

import torch

from workers.cpu_threads import use_threads


def test_a_thread_keeps_its_number() -> None:
    before, seen = torch.get_num_threads(), []
    first_set, second_set = threading.Event(), threading.Event()

    def first() -> None:
        use_threads(3)
        first_set.set()
        second_set.wait(10)
        torch.ones(200_000).add(1)  # an operator that runs in parallel
        seen.append(torch.get_num_threads())

    def second() -> None:
        first_set.wait(10)
        use_threads(1)
        second_set.set()
        torch.ones(200_000).add(1)
        seen.append(torch.get_num_threads())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [1, 3]
    assert torch.get_num_threads() == before
    torch.set_num_threads(before)  # also for threads to come
