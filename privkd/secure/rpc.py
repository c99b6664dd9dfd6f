"""What both ends of a party's service know of its protocol: ``aggregator.proto`` in this folder."""

from collections.abc import Iterator
from typing import Any

import grpc

from privkd.secure.aggregator_pb2 import Head, Piece

PROTOCOL = 1
PIECE_BYTES = 1 << 18
MAX_MESSAGE_BYTES = 1 << 20

OPTIONS: list[tuple[str, Any]] = [
    # A quiet connection that a router forgot is found out while somebody still waits on it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
"""Of a channel and of a server."""

FINAL: dict[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 405,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.OUT_OF_RANGE: 413,
}
"""The codes of refusals for good, and the ``status`` of the `RefusalError` that each stands for."""

_CODES = {status: code for code, status in FINAL.items()} | {410: grpc.StatusCode.FAILED_PRECONDITION}


def code_of(status: int) -> grpc.StatusCode:
    """The code of a refusal with this ``status``."""
    return _CODES.get(status, grpc.StatusCode.FAILED_PRECONDITION)


def cut(data: bytes) -> Iterator[Piece]:
    """``data`` in pieces, without a head."""
    for start in range(0, len(data), PIECE_BYTES):
        yield Piece(data=data[start : start + PIECE_BYTES])


def stream(round: int, data: bytes, device: str = "") -> Iterator[Piece]:
    """``data`` as a request: its head, then its pieces."""
    yield Piece(head=Head(round=round, size=len(data), device=device))
    yield from cut(data)
