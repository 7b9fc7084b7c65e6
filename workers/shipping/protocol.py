"""What the two ends of a link say to each other on its TCP connection, and the settings both go by.

A message is a 4-byte big-endian length and a msgpack body. Payloads do not travel here: a Header announces one, and it
follows through the pair's process group. Knows nothing of sockets, threads or tensors.
"""

import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from kernels.layout import CHECKSUM_BYTES, CacheLayout

VERSION = 3
MAX_MESSAGE_BYTES = 2**20  # a header of the largest shipment takes some 30 kB
MAX_SHIPMENT_BYTES = 64 * 2**20  # of pages
_LENGTH = struct.Struct(">I")

Kind = Literal["latent", "index"]
Backend = Literal["gloo", "nccl"]

# Reasons to refuse a shipment. Only a corrupt one is sent again; any other text ends the request.
CORRUPT = "corrupt: a checksum does not match"
STALE_EPOCH = "stale: it was sent to or by an earlier life of a worker"
STALE_GENERATION = "stale: a page has had another owner since the ticket was made"


class LinkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Timing and sizes of every link of a worker."""

    heartbeat_s: float = 0.5
    dead_after_s: float = 3.0  # a peer silent for so long is treated as dead
    payload_timeout_s: float = 3.0  # from a posted receive to its last byte
    pair_timeout_s: float = 10.0  # to make the process group
    retry_s: float = 0.1  # before the next attempt to pair; doubles up to max_retry_s
    max_retry_s: float = 2.0
    # Of pages in one buffer that is sent (`Pair` may make it less); what is received has the fixed limit.
    max_shipment_bytes: int = 32 * 2**20
    # Buffers packed or sent and not yet answered, for each pair. A busy decode worker answers once a step.
    max_in_flight: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.max_shipment_bytes <= MAX_SHIPMENT_BYTES:
            raise ValueError(
                f"max_shipment_bytes is {self.max_shipment_bytes}; the limit is {MAX_SHIPMENT_BYTES}"
            )


class Fingerprint(msgspec.Struct, frozen=True, array_like=True):
    """What two caches must have in common for the pages of one to be pages of the other."""

    num_layers: int
    latent_page_bytes: int
    index_page_bytes: int
    quantized: bool

    @classmethod
    def of(cls, layout: CacheLayout, num_layers: int) -> "Fingerprint":
        return cls(num_layers, layout.latent_page_bytes, layout.index_page_bytes, layout.quantized)

    def page_bytes(self, kind: Kind) -> int:
        """Bytes of one page of one layer."""
        return self.latent_page_bytes if kind == "latent" else self.index_page_bytes

    def difference(self, other: "Fingerprint") -> str | None:
        """The first field that differs, in words; None if there is none."""
        for name in self.__struct_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} is {ours} here and {theirs} there"
        return None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A decode worker, as a hello must find it."""

    worker_id: str
    epoch: int
    secret: str
    fingerprint: Fingerprint


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Sent as an array, without field names: a change of fields is a change of VERSION."""


class Hello(_Message, frozen=True, tag="hello", kw_only=True):
    """Prefill to decode, first: who I am, and whom I take you for."""

    prefill_worker: str
    prefill_epoch: int
    decode_worker: str
    decode_epoch: int
    secret: str
    fingerprint: Fingerprint
    gpu: str | None  # identity of the device that holds the caches; None: the CPU
    version: int = VERSION


class Welcome(_Message, frozen=True, tag="welcome"):
    """Decode to prefill: make your half of the process group now, under this key of my store."""

    store_port: int
    key: str
    backend: Backend


class Rejected(_Message, frozen=True, tag="rejected"):
    reason: str


class Heartbeat(_Message, frozen=True, tag="heartbeat"):
    """Both ways: I am not frozen."""


class Header(_Message, frozen=True, tag="shipment"):
    """Prefill to decode: the payload of these pages follows, layer after layer, page after page, then their checksums.

    The checksums travel behind the pages because the sender would have to wait for its GPU to put them here.
    page_indices: of the pages within their request; page_ids and generations: as the landing ticket named them.
    nbytes: of the pages alone.
    """

    shipment_id: int  # also the tag of the payload; unique within the life of the pair
    request_id: str
    prefill_epoch: int
    decode_epoch: int
    kind: Kind
    layer_start: int
    layer_stop: int
    page_indices: list[int]
    page_ids: list[int]
    generations: list[int]
    nbytes: int

    @property
    def payload_bytes(self) -> int:
        return self.nbytes + CHECKSUM_BYTES * (self.layer_stop - self.layer_start) * len(self.page_ids)


class Accepted(_Message, frozen=True, tag="accepted"):
    shipment_id: int


class Refused(_Message, frozen=True, tag="refused"):
    shipment_id: int
    reason: str


class Commit(_Message, frozen=True, tag="commit"):
    """Prefill to decode: every shipment of the request was accepted; go on from `token`.

    num_pages: of the whole prompt, with those that the decode worker held already. finish: why the request is over
    with its first token, None if it is not. num_commits: as many ranks of the prefill worker ship a share of the pages and say so;
    the last of them counts.
    """

    request_id: str
    decode_epoch: int
    num_pages: int
    token: int
    finish: str | None
    num_commits: int = 1


class Committed(_Message, frozen=True, tag="committed"):
    request_id: str


class Abandon(_Message, frozen=True, tag="abandon"):
    """Prefill to decode: no more of this request will come, and no commit."""

    request_id: str


Message = Hello | Welcome | Rejected | Heartbeat | Header | Accepted | Refused | Commit | Committed | Abandon
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Framer:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._unread = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes. Raises ValueError for an absurd length or an unreadable body."""
        self._unread += data
        while len(self._unread) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._unread)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
            end = _LENGTH.size + length
            if len(self._unread) < end:
                return
            body = bytes(self._unread[_LENGTH.size : end])
            del self._unread[:end]
            yield _decoder.decode(body)


def hello_error(hello: Hello, identity: Identity) -> str | None:
    """Why a prefill worker cannot be paired with, in words; None if it can. The secret comes first: strangers learn nothing."""
    if not hmac.compare_digest(hello.secret.encode(), identity.secret.encode()):
        return "wrong secret"
    if hello.version != VERSION:
        return f"protocol version {VERSION} here and {hello.version} there"
    if (hello.decode_worker, hello.decode_epoch) != (identity.worker_id, identity.epoch):
        return (
            f"this is {identity.worker_id} of epoch {identity.epoch}, "
            f"not {hello.decode_worker} of epoch {hello.decode_epoch}"
        )
    difference = identity.fingerprint.difference(hello.fingerprint)
    return None if difference is None else f"the caches differ: {difference}"


def header_error(header: Header, fingerprint: Fingerprint) -> str | None:
    """What makes a header impossible, in words, before memory is taken for its payload; None if nothing does."""
    num_layers, num_pages = header.layer_stop - header.layer_start, len(header.page_ids)
    if not 0 <= header.layer_start < header.layer_stop <= fingerprint.num_layers:
        return f"layers {header.layer_start} to {header.layer_stop} of {fingerprint.num_layers}"
    if not num_pages or num_pages != len(header.page_indices) or num_pages != len(header.generations):
        return (
            f"{num_pages} page ids, {len(header.page_indices)} indices, {len(header.generations)} generations"
        )
    expected = num_layers * num_pages * fingerprint.page_bytes(header.kind)
    if header.nbytes != expected or expected > MAX_SHIPMENT_BYTES:
        return (
            f"nbytes is {header.nbytes}; these pages take {expected}, and the limit is {MAX_SHIPMENT_BYTES}"
        )
    return None
