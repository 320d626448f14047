"""`IpcQueue`, its folder and its messages: order, bounds, back-pressure, nonsense from outside, keys."""

from __future__ import annotations

import os
import queue
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tokenmill import SamplingParams
from tokenmill.engine.events import TokenDelta
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import (
    EngineStalledError,
    InvalidParameterError,
    ProtocolError,
    TokenmillError,
)
from tokenmill.executor import messages
from tokenmill.executor.ipc import CurveKeys, IpcFolder, IpcQueue
from tokenmill.executor.messages import FromProcess, ToProcess, from_process_codec, request_codec, to_process_codec
from tokenmill.executor.postproc import Ended, OutputDelta, StopHit
from tokenmill.executor.tokenizer_source import TokenizerSource
from tokenmill.executor.wire import Codec
from tokenmill.outputs import Logprob, RequestMetrics
from tokenmill.telemetry.stats import (
    EngineStats,
    IterationStats,
    KvCacheStats,
    RequestProgress,
    RequestSteps,
    StepStats,
)

pytestmark = pytest.mark.spec("B5")

DELTA = TokenDelta(7, 1, (1, 2), ({1: Logprob(-0.5, 1), 9: Logprob(-2.0, 3)}, {2: Logprob(-0.1, 1)}), (), "stop", 2)
METRICS = RequestMetrics(1.0, 2.0, 3.0, 4.0, 5, 6)
CACHE = KvCacheStats(9, 8, 7, 6, 5, 4, 3)
STEP = StepStats(
    step=1, end_time=2.0, duration=0.5, num_running=3, num_waiting=4, num_admitted=5, num_prefills=6, num_decodes=7,
    num_prompt_tokens=8, num_generated_tokens=9, num_preemptions=10, num_finished=11, kv_cache=CACHE,
)  # fmt: skip
PROGRESS = RequestProgress(
    request_id=1, stage="decode", num_prefilled_tokens=2, num_generated_tokens=3, is_scheduled=True, is_preempted=False
)
REQUESTS = RequestSteps(step=1, end_time=2.0, requests=(PROGRESS,))
STATS = EngineStats(1, 2, 3, 4, 5, 6, {"stop": 7}, 8.5, (STEP,), (REQUESTS,), CACHE)
ALL_MESSAGES: list[Any] = [
    messages.Hello(messages.PROTOCOL_VERSION, 42),
    messages.StartWorker("{}", messages.TokenizerLocation(Path("/a/b"), "slow"), 2, 1, None, 0.5),
    messages.StartPostproc(None, 0.5),
    messages.Progress("weights", 3, 2**40),
    messages.Ready(None),
    messages.StartFailed(InvalidParameterError("No.", field="model", remedy="Yes.")),
    messages.Heartbeat(True, STATS, [IterationStats(0, 1, 2.0, 3.0, 4, 5, 6, 7, 8, 9)]),
    messages.LogRecord(30, "tokenmill", "text \u00e9\n"),
    messages.Shutdown(),
    messages.Abort(3, "timeout"),
    messages.FinishSequence(StopHit(3, 1)),
    messages.CheckIntegrity(5),
    messages.IntegrityReport(5, "a block is lost"),
    messages.StepOutputs(
        [(3, OutputDelta(0, "x\u65e5", (1,), ({1: Logprob(-0.5, 1)},), (), "stop", "st"))],
        [Ended(3, METRICS), Ended(4, METRICS, EngineStalledError("Stuck.", remedy="Again."))],
        [StopHit(3, 0)],
        STATS,
    ),
    messages.EngineEvents([(0, b"\x00\xff")], STATS),
    messages.PostprocBatch([DELTA], [Ended(7, METRICS)]),
    messages.OpenRequest(3, SamplingParams(stop=["a", "b"], n=2, temperature=0.5, logit_bias={3: 0.25}), (1, 2, 3)),
    messages.Forget(3),
]


@pytest.fixture
def folder() -> Any:
    made = IpcFolder()
    yield made
    made.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder whose path leaves room for the address of a socket, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="tm-", dir="/tmp") as path:
        yield Path(path)


def pair(folder: IpcFolder, codec: Codec[Any], max_messages: int = 1000) -> tuple[IpcQueue[Any], IpcQueue[Any]]:
    address = folder.address("queue")
    receiver: IpcQueue[Any] = IpcQueue(address, codec, "receive", bind=True, max_messages=max_messages)
    sender: IpcQueue[Any] = IpcQueue(address, codec, "send", bind=False, max_messages=max_messages)
    return sender, receiver


def as_plain(message: Any) -> Any:
    """For comparison: errors are compared by what they say."""
    if isinstance(message, TokenmillError):
        return type(message), message.to_dict()
    if isinstance(message, (list, tuple)):
        return [as_plain(one) for one in message]
    if isinstance(message, msgspec.Struct):
        return type(message), [as_plain(getattr(message, name)) for name in message.__struct_fields__]
    if isinstance(message, Ended):
        return message.request_id, message.metrics, as_plain(message.error)
    return message


@pytest.mark.parametrize("message", ALL_MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_trip(message: Any) -> None:
    arrived = []
    for codec in (from_process_codec(), to_process_codec()):
        try:
            arrived.append(codec.decode(codec.encode(message)))
        except ProtocolError:  # it goes the other way only
            continue
    assert [as_plain(one) for one in arrived] == [as_plain(message)] * len(arrived)
    assert arrived


def test_the_list_of_messages_above_is_complete() -> None:
    known = {
        value for value in vars(messages).values() if isinstance(value, type) and value.__module__ == messages.__name__
    }
    structs = {value for value in known if issubclass(value, messages._Message) and value is not messages._Message}
    assert structs - {messages.Submit} == {type(message) for message in ALL_MESSAGES}


def test_a_request_survives_the_trip_inside_submit() -> None:
    request = GenerationRequest(
        request_id=1,
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(seed=2**64 - 1, temperature=0.3, stop="x", bad=["y"], stop_token_ids=[4]),
        seed=2**64 - 1,
        end_ids=(2,),
        bad_words=((1, 2), (3,)),
        priority=0.75,
        arrival_time=123.5,
    )
    submit = messages.Submit(9, msgspec.Raw(request_codec().encode(request)), 1)
    arrived = to_process_codec().decode(to_process_codec().encode(submit))
    assert isinstance(arrived, messages.Submit)
    assert (arrived.attempt, arrived.postproc) == (9, 1)
    assert request_codec().decode(bytes(arrived.request)) == request


@given(st.binary(max_size=200))
def test_nonsense_is_a_typed_error(data: bytes) -> None:
    try:
        message = from_process_codec().decode(data)
    except ProtocolError:
        return
    assert isinstance(message, messages._Message)


@given(index=st.integers(0, len(ALL_MESSAGES) - 1), data=st.data())
def test_cut_and_changed_messages_are_typed_errors_or_messages(index: int, data: st.DataObject) -> None:
    for codec in (from_process_codec(), to_process_codec()):
        encoded = bytearray(codec.encode(ALL_MESSAGES[index]))
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
        for damaged in (bytes(encoded), cut):
            try:
                codec.decode(damaged)
            except ProtocolError as error:
                assert "cannot be read" in error.message


def test_what_has_no_form_on_the_wire_is_a_typed_error() -> None:
    with pytest.raises(ProtocolError, match="cannot be sent"):
        from_process_codec().encode(messages.LogRecord(1, "x", "\ud800"))
    with pytest.raises(ProtocolError, match="cannot be sent"):
        from_process_codec().encode(messages.LogRecord(1, "x", object()))  # type: ignore[arg-type]


def test_order_and_a_full_queue(folder: IpcFolder) -> None:
    sender, receiver = pair(folder, from_process_codec(), max_messages=10)
    try:
        num_sent = 0
        with pytest.raises(queue.Full):
            for num_sent in range(100_000):
                sender.put(messages.Progress("x" * 1000, num_sent, 0), timeout=0.2 if num_sent else 5.0)
        assert 10 <= num_sent < 5_000, "the reader does not read: what waits must be bounded"
        with pytest.raises(queue.Full):
            sender.put(messages.Shutdown())
        received = [receiver.get(timeout=5.0).done for _ in range(num_sent)]
        assert received == list(range(num_sent))
        with pytest.raises(queue.Empty):
            receiver.get(timeout=0.0)
        sender.put(messages.Progress("again", 1, 2), timeout=5.0)
        assert receiver.get(timeout=5.0).what == "again"
    finally:
        sender.close()
        receiver.close()
        receiver.close()


def test_a_writer_waits_for_a_slow_reader(folder: IpcFolder) -> None:
    sender, receiver = pair(folder, from_process_codec(), max_messages=5)
    num_messages = 3000
    try:

        def write() -> None:
            for index in range(num_messages):
                sender.put(messages.Progress("x" * 500, index, 0), timeout=None)

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.2)
        assert writer.is_alive(), "it should wait"
        assert [receiver.get(timeout=10.0).done for _ in range(num_messages)] == list(range(num_messages))
        writer.join(5.0)
        assert not writer.is_alive()
    finally:
        sender.close()
        receiver.close()


def test_garbage_and_messages_of_several_parts_do_not_end_a_queue(folder: IpcFolder) -> None:
    sender, receiver = pair(folder, from_process_codec())
    try:
        sender.put_encoded(b"\xc1garbage", timeout=5.0)
        sender.socket.send_multipart([b"one", b"two"])
        sender.put(messages.Shutdown())
        sender.put(messages.Hello(1, 2))
        for expected in ("cannot be read", "2 parts", "cannot be read"):
            with pytest.raises(ProtocolError, match=expected):
                receiver.get(timeout=5.0)
        assert receiver.get(timeout=5.0) == messages.Hello(1, 2)
    finally:
        sender.close()
        receiver.close()


def test_tcp_needs_keys_and_other_addresses_are_refused() -> None:
    for address, field in (("tcp://127.0.0.1:*", "keys"), ("inproc://x", "address"), ("udp://1.2.3.4:5", "address")):
        with pytest.raises(InvalidParameterError) as caught:
            IpcQueue(address, from_process_codec(), "receive", bind=True)
        assert caught.value.field == field


def test_tcp_with_keys_lets_one_peer_in() -> None:
    here, there = CurveKeys.make_pair()
    stranger = replace(CurveKeys.make_pair()[1], peer=here.public)  # knows whom to talk to, is not known
    receiver: IpcQueue[FromProcess] = IpcQueue(
        "tcp://127.0.0.1:*", from_process_codec(), "receive", bind=True, keys=here
    )
    intruder: IpcQueue[FromProcess] = IpcQueue(
        receiver.address, from_process_codec(), "send", bind=False, keys=stranger
    )
    friend: IpcQueue[FromProcess] = IpcQueue(receiver.address, from_process_codec(), "send", bind=False, keys=there)
    with zmq.Context() as context, context.socket(zmq.PUSH) as plain:
        plain.linger = 0
        plain.connect(receiver.address)
        plain.send(from_process_codec().encode(messages.Hello(1, 1)))
        try:
            intruder.put(messages.Hello(1, 2))
            friend.put(messages.Hello(1, 3))
            assert receiver.get(timeout=10.0) == messages.Hello(1, 3)
            with pytest.raises(queue.Empty):
                receiver.get(timeout=0.3)
        finally:
            for one in (receiver, intruder, friend):
                one.close()
    assert "secret" not in repr(here)
    assert here.secret.decode() not in repr(here)


def test_the_folder_is_private_and_goes(folder: IpcFolder) -> None:
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    sender, receiver = pair(folder, from_process_codec())
    assert [path.name for path in folder.path.iterdir() if path.is_socket()] == ["queue.sock"]
    sender.close()
    receiver.close()
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_folders_of_dead_owners_are_removed_and_others_kept(monkeypatch: pytest.MonkeyPatch, short_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_path))
    old = time.time() - 3600
    dead, foreign, alive = short_path / "tokenmill-ipc-dead", short_path / "tokenmill-ipc-notes", IpcFolder()
    assert alive.path.parent == short_path
    try:
        for path in (dead, foreign):
            path.mkdir()
            (path / "file").touch()
        (dead / "lock").touch()
        for path in (dead, foreign, alive.path):
            os.utime(path, (old, old))
        fresh = IpcFolder()
        fresh.close()
        assert not dead.exists()
        assert foreign.exists(), "it has no lock: it was not made by an IpcFolder"
        assert alive.path.exists()
    finally:
        alive.close()


def test_a_deep_temporary_folder_is_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = IpcFolder()
    try:
        sender, receiver = pair(folder, to_process_codec())
        message: ToProcess = messages.Forget(1)
        sender.put(message, timeout=5.0)
        assert receiver.get(timeout=5.0) == message
        sender.close()
        receiver.close()
    finally:
        folder.close()


class TestTokenizerSource:
    """A tokenizer in another process is the same tokenizer."""

    def test_a_path_is_passed_on(self, model_dir: Path, tmp_path: Path) -> None:
        location = TokenizerSource(model_dir).locate(tmp_path)
        assert location == messages.TokenizerLocation(model_dir, "auto")

    def test_an_object_is_saved(self, model_dir: Path, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        from tokenmill.tokenization import load_tokenizer

        loaded = load_tokenizer(model_dir)
        for index, tokenizer in enumerate((loaded, AutoTokenizer.from_pretrained(model_dir))):
            target = tmp_path / str(index)
            target.mkdir()
            location = TokenizerSource(tokenizer=tokenizer).locate(target)
            again = load_tokenizer(location.path, mode=location.mode)
            assert again.decode(list(range(300))) == loaded.decode(list(range(300)))
            assert again.all_special_ids == loaded.all_special_ids

    def test_what_cannot_be_saved_is_refused(self, tmp_path: Path) -> None:
        class Words:
            all_special_ids: tuple[int, ...] = ()

            def __len__(self) -> int:
                return 1

            def encode(self, text: str, **options: Any) -> list[int]:
                return [0]

            def decode(self, ids: list[int], **options: Any) -> str:
                return "word"

            def convert_ids_to_tokens(self, token: int) -> str:
                return "word"

            def convert_tokens_to_ids(self, token: str) -> int:
                return 0

        with pytest.raises(InvalidParameterError) as caught:
            TokenizerSource(tokenizer=Words()).locate(tmp_path)
        assert caught.value.field == "tokenizer"
