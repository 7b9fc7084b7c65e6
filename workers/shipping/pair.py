"""The process group of one prefill and one decode worker: payloads go through it, nothing else does.

The one place that knows Gloo from NCCL. Knows nothing of pages, requests or the TCP connection beside it.
"""

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from workers.shipping.protocol import MAX_SHIPMENT_BYTES, Backend

# torch does not declare these as public, but has nothing else for a group outside its one default group.
_TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
_GlooOptions: Any = dist.ProcessGroupGloo._Options  # type: ignore[attr-defined]

PREFILL_RANK, DECODE_RANK = 0, 1
# Of pages in one message. Larger Gloo messages gain nothing, and more can be caught in mid-way; NVLink wants large ones.
LARGEST_MESSAGE: dict[Backend, int] = {"nccl": MAX_SHIPMENT_BYTES, "gloo": 4 * 2**20}
_POLL_S = 5e-5
_FIRST_TAG = 0  # of the byte that proves the pair; shipment ids start at 1


class Pair:
    """Both ends construct it at the same time, on threads that may wait for `timeout_s`.

    store: host and port of the decode worker's TCPStore; `key` is fresh for every pair. address: this end's own, on the
    network that payloads shall take. device: where the caches are; payloads must be on `payload_device`.
    max_message_bytes: more pages in one message gain nothing with this back end.
    Every method and the constructor raise RuntimeError when the peer is gone.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        rank: int,
        store: tuple[str, int],
        key: str,
        address: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        prefixed = PrefixStore(
            key, _TCPStore(*store, is_master=False, wait_for_workers=False, timeout=timeout)
        )
        self.payload_device = device if backend == "nccl" else torch.device("cpu")
        # Work on payloads has a stream of its own: an engine's next step must not queue up behind a slow peer.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._peer = DECODE_RANK if rank == PREFILL_RANK else PREFILL_RANK
        self._group = (
            _nccl(prefixed, rank, timeout) if backend == "nccl" else _gloo(prefixed, rank, address, timeout)
        )
        self.max_message_bytes = LARGEST_MESSAGE[backend]
        self._is_nccl = backend == "nccl"
        try:
            self._exchange_first_byte(rank, timeout_s)
        except RuntimeError:
            self.abort()
            raise

    def send(self, payload: torch.Tensor, tag: int) -> dist.Work:
        """Starts to send uint8 [n]. `payload` must stay as it is until the peer has said that it arrived."""
        with torch.cuda.stream(self.stream):
            work: dist.Work = self._group.send([payload], self._peer, tag)
            return work

    def receive(self, num_bytes: int, tag: int) -> tuple[torch.Tensor, dist.Work]:
        """Starts to receive into a new uint8 [num_bytes], which is to be read only after `wait`."""
        with torch.cuda.stream(self.stream):
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=self.payload_device)
            return payload, self._group.recv([payload], self._peer, tag)

    def wait(self, work: dist.Work, timeout_s: float) -> None:
        """Blocks this thread until the work is over. After `abort` it may return without the bytes having come."""
        if not self._is_nccl:
            work.wait(timedelta(seconds=timeout_s))
            return
        assert self.stream is not None
        with torch.cuda.stream(self.stream):
            work.wait()  # holds the stream up, not this thread; with a timeout, torch would look once a millisecond only
        arrived, deadline = self.stream.record_event(), time.monotonic() + timeout_s
        while not arrived.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing came for {timeout_s:g} s")
            time.sleep(_POLL_S)

    def settle(self) -> None:
        """The sender's: blocks until what it has queued on `stream` is done, which is packing, never a transfer."""
        if self.stream is not None:
            self.stream.synchronize()

    def abort(self) -> None:
        """Frees what NCCL is stuck in. Gloo cannot be freed: a stuck wait ends by its own timeout."""
        if self._is_nccl:
            self._group.abort()

    def _exchange_first_byte(self, rank: int, timeout_s: float) -> None:
        """NCCL makes its communicator with the first message, which must not be a request's; and a pair that cannot carry
        a byte must not count as one."""
        if rank == PREFILL_RANK:
            byte = torch.zeros(1, dtype=torch.uint8, device=self.payload_device)
            work = self.send(byte, _FIRST_TAG)
        else:
            _, work = self.receive(1, _FIRST_TAG)
        self.wait(work, timeout_s)


def open_store(host: str) -> Any:
    """A TCPStore that listens on `host` and on the port that its attribute `port` gives."""
    return _TCPStore(host, 0, is_master=True, wait_for_workers=False)


def gpu_of(device: torch.device) -> str | None:
    """Identity of a GPU, the same in every process that NCCL takes to be on the same host; None for the CPU.

    With an NCCL_HOSTID of its own a process is a host of its own to NCCL, which then joins it with any other, over the network.
    """
    if device.type != "cuda":
        return None
    return f"{os.environ.get('NCCL_HOSTID', '')}/{torch.cuda.get_device_properties(device).uuid}"


def backend_for(ours: str | None, theirs: str | None) -> Backend:
    """NCCL joins two GPUs. It cannot join one with itself, nor with a CPU: those pairs go through host memory."""
    return "nccl" if ours and theirs and ours != theirs else "gloo"


def _gloo(store: Store, rank: int, address: str, timeout: timedelta) -> Any:
    options = _GlooOptions()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._threads = 1
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int, timeout: timedelta) -> Any:
    # The default tears the whole process down when one peer of many is lost.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, 2, options)
