from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AboutRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AboutReply(_message.Message):
    __slots__ = ("protocol", "version", "rank", "parties", "members", "clock_ms")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PARTIES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    rank: int
    parties: int
    members: _containers.RepeatedScalarFieldContainer[bytes]
    clock_ms: int
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., rank: _Optional[int] = ..., parties: _Optional[int] = ..., members: _Optional[_Iterable[bytes]] = ..., clock_ms: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("session", "port")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    session: str
    port: int
    def __init__(self, session: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("port",)
    PORT_FIELD_NUMBER: _ClassVar[int]
    port: int
    def __init__(self, port: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: Head
    data: bytes
    def __init__(self, head: _Optional[_Union[Head, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("round", "size", "device")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    round: int
    size: int
    device: str
    def __init__(self, round: _Optional[int] = ..., size: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RelayReply(_message.Message):
    __slots__ = ("refused",)
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    refused: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, refused: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("terms", "closed", "set", "devices", "left_out", "failure", "over", "shared", "made_in")
    class LeftOutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TERMS_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    MADE_IN_FIELD_NUMBER: _ClassVar[int]
    terms: bytes
    closed: bool
    set: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    left_out: _containers.ScalarMap[str, str]
    failure: str
    over: bool
    shared: bool
    made_in: str
    def __init__(self, terms: _Optional[bytes] = ..., closed: _Optional[bool] = ..., set: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., left_out: _Optional[_Mapping[str, str]] = ..., failure: _Optional[str] = ..., over: _Optional[bool] = ..., shared: _Optional[bool] = ..., made_in: _Optional[str] = ...) -> None: ...

class ShareRequest(_message.Message):
    __slots__ = ("round", "session", "agree", "kept")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    AGREE_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    round: int
    session: str
    agree: bool
    kept: bool
    def __init__(self, round: _Optional[int] = ..., session: _Optional[str] = ..., agree: _Optional[bool] = ..., kept: _Optional[bool] = ...) -> None: ...

class AbandonRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...
