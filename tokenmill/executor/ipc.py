"""`IpcQueue`: a one-way queue of typed messages between two processes, ZeroMQ below and msgpack on the wire.

What is received is decoded into the types that were announced and nothing else: no pickle, no code, no attribute by
name. Unix sockets live in a folder that only their user can enter (`IpcFolder`). TCP is for other machines and refused
without CURVE keys, which encrypt and let exactly one peer in. Queues are bounded on both sides: a slow reader makes the
writer wait, it does not make memory grow. Used by the proxy and its worker processes.
"""

from __future__ import annotations

import fcntl
import os
import queue
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar

import zmq
import zmq.auth.thread

from tokenmill.errors import InvalidParameterError, ProtocolError, UnsupportedFeatureError
from tokenmill.executor.wire import Codec

Message = TypeVar("Message")

MAX_MESSAGE_BYTES: Final = 256 * 2**20
"""A longer message ends the connection: a peer in disorder must not fill the memory."""
_MAX_SOCKET_PATH: Final = 100  # sun_path has 108 bytes on Linux, 104 on macOS
_STALE_SECONDS: Final = 60.0
_PREFIX: Final = "tokenmill-ipc-"
_LOCK_FILE: Final = "lock"


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """What one end of a TCP queue needs, as Z85 text in bytes.

    Args:
        public, secret: its own pair.
        peer: the public key of the other end; nobody else is let in.
    """

    public: bytes
    secret: bytes = field(repr=False)
    peer: bytes

    @staticmethod
    def make_pair() -> tuple[CurveKeys, CurveKeys]:
        """Fresh keys for the two ends of a queue."""
        (public_1, secret_1), (public_2, secret_2) = zmq.curve_keypair(), zmq.curve_keypair()
        return CurveKeys(public_1, secret_1, public_2), CurveKeys(public_2, secret_2, public_1)


class IpcQueue(Generic[Message]):
    """One end of a queue. One thread uses it at a time.

    Args:
        address: `ipc://<path>`, or `tcp://<host>:<port>` with `keys`; port `*` takes a free one.
        codec: the message types.
        direction: whether this end sends or receives.
        bind: whether this end owns the address; the other connects to it, earlier or later.
        max_messages: messages that may wait at this end.
        keys: for TCP.
        context: to share ZeroMQ's threads with other queues; it stays the caller's. Not with `keys`.

    Raises:
        InvalidParameterError: TCP without keys, or another kind of address.
    """

    def __init__(
        self,
        address: str,
        codec: Codec[Message],
        direction: Literal["send", "receive"],
        *,
        bind: bool,
        max_messages: int = 1000,
        keys: CurveKeys | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        _check_address(address, keys)
        assert keys is None or context is None, "who may connect is decided for a whole context"
        self._codec = codec
        self._owns_context = context is None
        self._context = context or zmq.Context()
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        kind = zmq.PUSH if direction == "send" else zmq.PULL
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        self.socket.linger = 0
        self.socket.set_hwm(max_messages)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if keys is not None:
            self._secure(keys, bind)
        if bind:
            self.socket.bind(address)
            address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        else:
            self.socket.connect(address)
        self.address = address
        self._file = Path(address.removeprefix("ipc://")) if bind and address.startswith("ipc://") else None

    def _secure(self, keys: CurveKeys, is_server: bool) -> None:
        self.socket.curve_publickey = keys.public
        self.socket.curve_secretkey = keys.secret
        if not is_server:
            self.socket.curve_serverkey = keys.peer
            return
        self.socket.curve_server = True
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OnePeer(keys.peer))

    def put(self, message: Message, timeout: float | None = 0.0) -> None:
        """Send.

        Args:
            message: one of the codec's types.
            timeout: seconds to wait while the queue is full; None waits for ever.

        Raises:
            queue.Full: no room in time.
        """
        self.put_encoded(self._codec.encode(message), timeout)

    def put_encoded(self, data: bytes, timeout: float | None = 0.0) -> None:
        """Send a message that the codec has encoded."""
        if timeout != 0.0 and not self.socket.poll(None if timeout is None else round(timeout * 1000), zmq.POLLOUT):
            raise queue.Full
        try:
            self.socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            raise queue.Full from None

    def get(self, timeout: float | None = None) -> Message:
        """Receive.

        Args:
            timeout: seconds to wait for a message; None waits for ever.

        Raises:
            queue.Empty: nothing came in time.
            ProtocolError: what came is no message of the codec's types; the queue can be used further.
        """
        if timeout != 0.0 and not self.socket.poll(None if timeout is None else round(timeout * 1000)):
            raise queue.Empty
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            raise queue.Empty from None
        if len(frames) != 1:
            raise ProtocolError(f"A message has {len(frames)} parts instead of one.")
        return self._codec.decode(frames[0])

    def close(self) -> None:
        """Free the socket; messages that wait are dropped. Twice is harmless."""
        if self.socket.closed:
            return
        self.socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        if self._owns_context:
            self._context.term()
        if self._file is not None:
            self._file.unlink(missing_ok=True)  # ZeroMQ leaves it behind


class _OnePeer:
    """Tells ZeroMQ's authenticator which client may connect: the one with this public key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


def _check_address(address: str, keys: CurveKeys | None) -> None:
    if address.startswith("ipc://"):
        return
    if not address.startswith("tcp://"):
        raise InvalidParameterError(
            f"'{address}' is not an address of a queue.", field="address", remedy="Use ipc://PATH or tcp://HOST:PORT."
        )
    if keys is None:
        raise InvalidParameterError(
            f"A queue over {address} needs keys: anybody could connect to it.",
            field="keys",
            remedy="Pass CurveKeys (CurveKeys.make_pair()).",
        )
    if not zmq.has("curve"):
        raise UnsupportedFeatureError(
            "This build of ZeroMQ has no encryption.", field="keys", remedy="Install pyzmq from its wheels."
        )


class IpcFolder:
    """A private folder for sockets and logs, removed by `close`. Folders that a killed process left are removed too.

    A file in the folder is locked while the owner lives. The lock ends with the process, however that ends, so a folder
    whose lock is free belongs to nobody.
    """

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        if len(str(root)) > _MAX_SOCKET_PATH - 55:
            root = Path("/tmp")  # the usual place is too deep for the address of a socket
        _remove_stale_folders(root)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))  # mode 0700
        (self.path / _LOCK_FILE).touch()
        self._lock = _try_lock(self.path)

    def address(self, name: str) -> str:
        """Address of a new socket in the folder."""
        path = self.path / f"{name}.sock"
        assert len(str(path)) <= _MAX_SOCKET_PATH, f"{path} is too long for a socket"
        return f"ipc://{path}"

    def close(self) -> None:
        """Remove the folder and all in it. Twice is harmless."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if somebody else has it, or the folder is none of ours."""
    try:
        descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale_folders(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
        except OSError:  # removed in this moment
            continue
        may_be_locked_soon = time.time() - status.st_mtime < _STALE_SECONDS
        if status.st_uid != os.getuid() or may_be_locked_soon or folder.is_symlink():
            continue
        descriptor = _try_lock(folder)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
