"""The door: whatever comes in, it is one connection's end at most."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import h11
import hypercorn
import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.server import bare
from tests.server.running import PATIENCE, Chat, Server, open_server, settings_for
from tests.small_world import agent_of, hang
from trio.testing import MockClock, wait_all_tasks_blocked

from creche import (
    AgentClassRegistry,
    Infrastructure,
    MemorySink,
    MemoryStore,
    leaves,
    open_audit,
    open_supervisor,
)
from creche_server.admission import Sockets
from creche_server.auth import Auth
from creche_server.door import HEAD_TIMEOUT, SEND_TIMEOUT, Door
from creche_server.http import make_app
from creche_server.lookups import Lookups
from creche_server.outbox import Flusher
from creche_server.services import Services
from creche_server.websocket import PING_INTERVAL, serve_chat

CHAT_PATH: Final = "/threads/t/stream"
TLS_HELLO: Final = bytes.fromhex(
    "16030100c8010000c40303a1b2c3d4e5f60718293a4b5c6d7e8f90112233445566778899aabbccddeeff00"
    "20aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899130213031301c02cc030"
)
H2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
H2C: Final = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
)


def get(path: bytes = b"/healthz", headers: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + headers + b"\r\n"


def upgrade(*headers: bytes, path: str = CHAT_PATH, subprotocol: bytes = b"ag-ui.v1") -> bytes:
    return bare.upgrade_request(path, headers=headers, subprotocol=subprotocol)


def h2_headers_frame(path: bytes) -> bytes:
    """A HEADERS frame on stream 1, its fields as literals without indexing."""
    fields = {b":method": b"GET", b":scheme": b"http", b":authority": b"x", b":path": path}
    block = b"".join(
        bytes([0, len(name)]) + name + bytes([len(value)]) + value for name, value in fields.items()
    )
    return len(block).to_bytes(3, "big") + b"\1\5\0\0\0\1" + block


# What no login is needed for.
STRANGERS: Final[dict[str, bytes]] = {
    "nothing": b"",
    "one byte": b"G",
    "blank lines": b"\r\n\r\n\r\n\r\n",
    "zeros": bytes(4096),
    "all bytes": bytes(range(256)) * 20,
    "a TLS hello": TLS_HELLO,
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "the HTTP/2 preface": H2_PREFACE,
    "the HTTP/2 preface and a path that is not ASCII": H2_PREFACE + h2_headers_frame(b"/\xe9\xff"),
    "an h2c upgrade": get(headers=H2C),
    "an h2c upgrade, and the preface behind it": get(headers=H2C) + H2_PREFACE,
    "an upgrade with bytes behind it": upgrade() + b"x",
    "an upgrade with a frame behind it": upgrade() + bare.frame(bare.TEXT, b"{}"),
    "an upgrade with 100 KB behind it": upgrade() + b"x" * 100_000,
    "an upgrade by POST": upgrade().replace(b"GET ", b"POST ", 1),
    "an upgrade of HTTP/1.0": upgrade().replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    "an upgrade without a key": get(CHAT_PATH.encode(), b"Upgrade: websocket\r\n"),
    "an upgrade of another version": upgrade().replace(b"Version: 13", b"Version: 99"),
    "an upgrade with a body": upgrade(b"Content-Length: 5") + b"hello",
    "an upgrade with a chunked body": upgrade(b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "an upgrade with two hosts": upgrade(b"Host: other"),
    "an upgrade with two keys": upgrade(b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="),
    "an upgrade with a broken key": upgrade().replace(b"-Key: ", b"-Key: \xff\xfe"),
    "an upgrade to two things": upgrade().replace(b"websocket", b"h2c, websocket", 1),
    "a subprotocol that is not ASCII": upgrade(subprotocol=b"ag-ui.v1, \xe9\xff"),
    "an extension that is not ASCII": upgrade(b"Sec-WebSocket-Extensions: \xe9\xff; a=\xff"),
    "an extension that makes no sense": upgrade(b'Sec-WebSocket-Extensions: ;;=,,"'),
    "compression": upgrade(b"Sec-WebSocket-Extensions: permessage-deflate"),
    "a Connection that is not ASCII": upgrade(b"Connection: \xe9\xff"),
    "an HTTP Connection that is not ASCII": get(headers=b"Connection: \xe9\xff\r\n"),
    "an Upgrade that is not ASCII": get(headers=b"Upgrade: \xe9\xff\r\n"),
    "an Origin that is no URL": upgrade(b"Origin: http://["),
    "an Origin that is not ASCII": upgrade(b"Origin: \xe9\xff"),
    "an Authorization that is not ASCII": upgrade(b"Authorization: Bearer \xe9\xff"),
    "a token that is none": upgrade(b"Authorization: Bearer creche_" + b"A" * 3000),
    "a target that is not ASCII": upgrade().replace(b"/threads", b"/thre\xe9\xff", 1),
    "an HTTP target that is not ASCII": get(b"/thre\xe9\xff"),
    "a target that is no URL": upgrade(path="//[/threads/t/stream"),
    "an HTTP target that is no URL": get(b"//["),
    "an absolute target": upgrade(path="http://[::1/threads/t/stream"),
    "an asterisk": get(b"*"),
    "a CONNECT": b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a percent that stands alone": upgrade(path="/threads/%/stream?ticket=%ff%"),
    "a ticket that is not UTF-8": upgrade(path="/threads/t/stream?ticket=%ff%fe"),
    "an empty Host": b"GET /threads HTTP/1.1\r\nHost: \r\n\r\n",
    "a Host that is no host": b"GET /threads HTTP/1.1\r\nHost: [\r\n\r\n",
    "a Host that is not ASCII": b"GET /threads HTTP/1.1\r\nHost: \xe9\xff\r\n\r\n",
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "a cookie that is not ASCII": get(b"/threads", b"Cookie: creche_session=\xe9\xff\r\n"),
    "a cookie that is none": get(b"/threads", b"Cookie: creche_session=" + b"A" * 3000 + b"\r\n"),
    "a header without a name": get(headers=b": x\r\n"),
    "a header with a blank in its name": get(headers=b"a b: x\r\n"),
    "a folded header": get(headers=b"X: a\r\n b\r\n"),
    "a NUL in a header": get(headers=b"X: a\0b\r\n"),
    "two lengths": get(headers=b"Content-Length: 1\r\nContent-Length: 2\r\n"),
    "a length that is no number": get(headers=b"Content-Length: x\r\n"),
    "a length and chunks": get(headers=b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
    "chunks that are none": get(headers=b"Transfer-Encoding: chunked\r\n") + b"zz\r\n",
    "a head of 40 KB": get(headers=b"X: " + b"x" * 40_000 + b"\r\n"),
    "a head of 5,000 lines": get(headers=b"X: y\r\n" * 5_000),
    "a target of 40 KB": get(b"/" + b"x" * 40_000),
    "a method of 1 KB": b"G" * 1000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a body that is cut short": (
        b"POST /threads HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    ),
    "two requests, the second is an upgrade with bytes behind it": get() + upgrade() + b"x" * 50,
    "two requests, the second is an upgrade that is not ASCII": (
        get() + upgrade(b"Sec-WebSocket-Extensions: \xe9\xff", subprotocol=b"\xe9\xff")
    ),
    "two requests, the second has a Connection that is not ASCII": (
        get() + get(headers=b"Connection: \xe9\xff\r\n")
    ),
    "two requests, the second is h2c": get() + get(headers=H2C) + H2_PREFACE,
    "two requests, the second is the preface": (
        get() + H2_PREFACE + h2_headers_frame(b"/\xe9\xff")
    ),
    "two requests, the second is garbage": get() + bytes(range(256)),
}

# What only somebody who has a token can do: frames behind the handshake.
GUESTS: Final[dict[str, bytes]] = {
    "an unmasked frame": bare.frame(bare.TEXT, b"{}", masked=False),
    "a reserved bit": bare.frame(bare.TEXT, b"{}", reserved=4),
    "all reserved bits": bare.frame(bare.TEXT, b"{}", reserved=7),
    "an opcode that there is none of": bare.frame(0x3, b"x"),
    "a control opcode that there is none of": bare.frame(0xB, b"x"),
    "a text that is not UTF-8": bare.frame(bare.TEXT, b"\xff\xfe"),
    "a text that ends in mid-character": bare.frame(bare.TEXT, b"\xc3"),
    "a surrogate": bare.frame(bare.TEXT, b'"\xed\xa0\x80"'),
    "a continuation of nothing": bare.frame(0x0, b"x"),
    "a text within a text": bare.frame(bare.TEXT, b"a", fin=False) + bare.frame(bare.TEXT, b"b"),
    "a text that never ends": bare.frame(bare.TEXT, b"a", fin=False)
    + bare.frame(0x0, b"b", fin=False) * 2000,
    "a ping in pieces": bare.frame(bare.PING, b"x", fin=False),
    "a ping that is too long": bare.frame(bare.PING, b"x" * 126),
    "pongs that nobody asked for": bare.frame(bare.PONG, b"x") * 100,
    "a length beyond all bounds": b"\x81\xff" + b"\xff" * 8 + b"\0" * 4,
    "a length of 2**62": b"\x81\xff" + (2**62).to_bytes(8, "big") + b"\0" * 4 + b"x" * 9000,
    "a length in more bytes than needed": b"\x81\xfe\0\1\0\0\0\0x",
    "a close without a code": bare.frame(bare.CLOSE),
    "a close with half a code": bare.frame(bare.CLOSE, b"\x03"),
    "a close with code 0": bare.frame(bare.CLOSE, b"\0\0"),
    "a close with code 1005": bare.frame(bare.CLOSE, (1005).to_bytes(2, "big")),
    "a close with code 1006": bare.frame(bare.CLOSE, (1006).to_bytes(2, "big")),
    "a close with code 2999": bare.frame(bare.CLOSE, (2999).to_bytes(2, "big")),
    "a close with code 4999": bare.frame(bare.CLOSE, (4999).to_bytes(2, "big") + b"bye"),
    "a close with code 65535": bare.frame(bare.CLOSE, b"\xff\xff"),
    "a close whose reason is not UTF-8": bare.frame(bare.CLOSE, b"\x03\xe8\xff\xfe"),
    "two closes": bare.frame(bare.CLOSE, b"\x03\xe8") * 2,
    "a frame behind the close": bare.frame(bare.CLOSE, b"\x03\xe8") + bare.frame(bare.TEXT, b"{}"),
    "a flood of pings": bare.frame(bare.PING, b"x" * 125) * 2000,
    "a flood of nonsense": bare.frame(bare.TEXT, b"{") * 2000,
    "an empty binary frame": bare.frame(bare.BINARY),
    "a message of 1 MiB and a byte": bare.frame(bare.TEXT, b"x" * (1024 * 1024 + 1)),
    "a message of 3 MiB in pieces": bare.frame(bare.TEXT, b"x" * 65_000, fin=False)
    + bare.frame(0x0, b"x" * 65_000, fin=False) * 50,
    "garbage": bytes(range(256)) * 4,
}


async def throw(port: int, data: bytes, *, token: str | None = None, reset: bool = False) -> None:
    """Send bytes and go, after the server has had its say or has nothing more to say."""
    with trio.fail_after(PATIENCE):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            if token is not None:
                await bare.shake_hands(stream, CHAT_PATH, token)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bare.read_all, stream)
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(data)
                    if reset:
                        nursery.cancel_scope.cancel()
                        stream.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: an RST
                    else:
                        await stream.send_eof()


def _last_line(record: logging.LogRecord) -> str:
    """The innermost reason of what was logged."""
    if record.exc_info is None or record.exc_info[1] is None:
        return ""
    return "; ".join(repr(leaf) for leaf in leaves(record.exc_info[1]))


async def check_alive(server: Server, witness: Chat) -> None:
    """The process lives, and so does a connection that did nothing wrong."""
    assert not server.ended.is_set()
    assert witness.closed is None
    await witness.ask("state.get")


class TestNothingThatIsSent:
    async def test_by_a_stranger_ends_anything_but_their_own_connection(
        self,
        server: Server,
    ) -> None:
        async with server.chat() as witness:
            await witness.subscribe()
            running = await witness.start("hang")
            for name, data in STRANGERS.items():
                for reset in (False, True):
                    await throw(server.port, data, reset=reset)
                    assert witness.closed is None, name
                await check_alive(server, witness)
            assert (await witness.ask("run.cancel", run_id=running, wait=True))["status"]

    async def test_by_a_user_ends_anything_but_their_own_connection(self, server: Server) -> None:
        token = server.token("bob")
        async with server.chat() as witness:
            await witness.subscribe()
            running = await witness.start("hang")
            for name, data in GUESTS.items():
                for reset in (False, True):
                    await throw(server.port, data, token=token, reset=reset)
                    assert witness.closed is None, name
                await check_alive(server, witness)
            assert (await witness.ask("run.cancel", run_id=running, wait=True))["status"]

    async def test_is_called_an_error_of_ours(
        self,
        server: Server,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Else anybody can fill the log, and who reads it looks for a bug that is none."""
        token = server.token("bob")
        wrong: list[str] = []
        async with server.chat() as witness:
            for table, login in ((STRANGERS, None), (GUESTS, token)):
                for name, data in table.items():
                    caplog.clear()
                    await throw(server.port, data, token=login)
                    await witness.ask("state.get")  # by then the server has dealt with it
                    wrong += [
                        f"{name}: {record.getMessage()} {_last_line(record)}"
                        for record in caplog.records
                        if record.levelno >= logging.ERROR
                    ]
        assert not wrong, "\n".join(wrong)

    async def test_on_one_connection_is_answered_on_the_next(self, server: Server) -> None:
        """The kernel gives a descriptor out again as soon as it is closed.

        What was still to be written to the one who left must not reach the one who comes.
        """
        token = server.token("bob")
        commands = bare.frame(bare.TEXT, b'{"id":7777777,"method":"none"}') * 2
        for _ in range(100):
            leaving = await server.connect()
            await bare.shake_hands(leaving, CHAT_PATH, token)
            await leaving.send_all(commands)
            leaving.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: an RST
            await trio.aclose_forcefully(leaving)
            for _ in range(3):
                async with await server.connect() as coming:
                    await coming.send_all(get())
                    head, _, _ = await bare.read_answer(coming)
                assert b"7777777" not in head
                assert head.startswith(b"HTTP/1.1 200 ")

    async def test_at_random_ends_anything_but_its_own_connection(self, tmp_path: Path) -> None:
        """Pieces of the protocols in any order, with anything in between."""
        pieces = st.sampled_from(
            [
                b"GET / HTTP/1.1\r\n",
                b"POST /threads HTTP/1.1\r\n",
                b"Host: x\r\n",
                b"Upgrade: websocket\r\n",
                b"Connection: Upgrade\r\n",
                b"Connection: keep-alive\r\n",
                b"Sec-WebSocket-Version: 13\r\n",
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
                b"Sec-WebSocket-Protocol: ag-ui.v1\r\n",
                b"Sec-WebSocket-Extensions: permessage-deflate\r\n",
                b"Content-Length: 3\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"Expect: 100-continue\r\n",
                b"\r\n",
                b"\r\n\r\n",
                b"0\r\n\r\n",
                H2C,
                H2_PREFACE,
                upgrade(),
                get(),
                bare.frame(bare.TEXT, b"{}"),
                bare.frame(bare.CLOSE, b""),
            ],
        )
        stream_of_bytes = st.lists(st.one_of(pieces, st.binary(max_size=20)), max_size=12).map(
            b"".join,
        )

        async with open_server(tmp_path) as server, server.chat() as witness:
            token = server.token("bob")

            # The server lives in this very event loop, so that the examples come from a thread.
            @settings(
                max_examples=120,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(data=stream_of_bytes, login=st.booleans(), reset=st.booleans())
            @example(data=b"\xff", login=True, reset=True)
            def check(data: bytes, login: bool, reset: bool) -> None:
                throwing = partial(
                    throw,
                    server.port,
                    data,
                    token=token if login else None,
                    reset=reset,
                )
                trio.from_thread.run(throwing)
                trio.from_thread.run(check_alive, server, witness)

            await trio.to_thread.run_sync(check)


class TestSilence:
    async def test_of_fifty_connections_hinders_nobody(self, server: Server) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(50):
                await stack.enter_async_context(await server.connect())
            async with server.chat() as chat:
                await chat.subscribe()
                assert (await chat.run("tokens=3"))[-1]["type"] == "RUN_FINISHED"

    async def test_does_not_delay_the_end(self, server: Server) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for beginning in (b"", b"G", upgrade()[:-2], b"POST / HTTP/1.1\r\nHost: x\r\n"):
                stream = await stack.enter_async_context(await server.connect())
                await stream.send_all(beginning)
            stream = await stack.enter_async_context(await server.connect())
            await bare.shake_hands(stream, CHAT_PATH, server.token())
            began = trio.current_time()
            await server.shut_down()
            assert trio.current_time() - began < 4

    async def test_past_the_cap_on_connections_is_refused(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, max_connections=3) as server:
            async with contextlib.AsyncExitStack() as stack:
                silent = [await stack.enter_async_context(await server.connect()) for _ in range(3)]
                async with await server.connect() as one_too_many:
                    with trio.fail_after(PATIENCE):
                        answer = await bare.read_all(one_too_many)
                assert answer.startswith(b"HTTP/1.1 503 ")
                await silent[0].aclose()
                await eventually_healthy(server)


async def answer_of(server: Server, data: bytes) -> tuple[bytes, bytes]:
    """The head and the body of the answer to one request."""
    async with await server.connect() as stream:
        await stream.send_all(data)
        head, body, _ = await bare.read_answer(stream)
    return head, body


async def eventually_healthy(server: Server) -> None:
    with trio.fail_after(PATIENCE):
        while not (await answer_of(server, get()))[0].startswith(b"HTTP/1.1 200 "):
            pass


class TestOnlyHttp11IsSpoken:
    """HTTP/2 would come with limits, and with faults, that nobody here has looked at."""

    async def test_whatever_the_client_wishes(self, server: Server) -> None:
        answers: dict[str, bytes] = {}

        async def ask(name: str, data: bytes) -> None:
            received = b""
            async with await server.connect() as stream:
                await stream.send_all(data)
                with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(0.5):
                    while more := await stream.receive_some():  # until it says nothing more
                        received += more
            answers[name] = received

        async with trio.open_nursery() as nursery:
            for name, data in {
                "the preface": H2_PREFACE,
                "h2c": get(headers=H2C),
                "two upgrades": get(headers=b"Upgrade: x\r\n" + H2C),
                "bare line feeds": get(headers=H2C).replace(b"\r\n", b"\n"),
                "a folded upgrade": get(headers=H2C.replace(b"Upgrade: ", b"Upgrade:\r\n ")),
                "h2c in a second request": get() + get(headers=H2C),
                "the preface in a second request": get() + H2_PREFACE,
            }.items():
                nursery.start_soon(ask, name, data)
        # A switch of protocols, or the zeros that HTTP/2's frames are full of.
        spoken = [name for name, got in answers.items() if b" 101 " in got or b"\0\0" in got]
        assert not spoken

    async def test_an_unwanted_upgrade_is_answered_all_the_same(self, server: Server) -> None:
        head, _ = await answer_of(server, get(headers=H2C))
        assert head.startswith(b"HTTP/1.1 200 ")

    async def test_a_body_that_looks_like_an_upgrade_is_left_alone(self, server: Server) -> None:
        body = b'{"thread_id":"t",\r\nupgrade: y\r\n}'
        head, answer = await answer_of(
            server,
            b"POST /threads HTTP/1.1\r\nHost: x\r\nUpgrade: foo\r\n"
            b"Authorization: Bearer " + server.token().encode() + b"\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body,
        )
        assert head.startswith(b"HTTP/1.1 422 ")
        assert b"key must be a string" in answer


class TestHttpAtTheDoor:
    async def test_serves_one_request_a_connection_and_says_so(self, server: Server) -> None:
        """What came second could be an upgrade, and hypercorn's WebSockets are not for the net."""
        async with await server.connect() as stream:
            await stream.send_all(get() * 2)
            head, body, rest = await bare.read_answer(stream)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in head.lower()
            assert (body, rest) == (b'{"status":"ok"}\n', b"")
            with contextlib.suppress(trio.BrokenResourceError):
                assert await bare.read_all(stream) == b""

    async def test_takes_a_head_byte_by_byte(self, server: Server) -> None:
        async with await server.connect() as stream:
            for byte in get():
                await stream.send_all(bytes([byte]))
            head, _, _ = await bare.read_answer(stream)
        assert head.startswith(b"HTTP/1.1 200 ")

    @pytest.mark.parametrize(
        "request_",
        [
            get(headers=b"Connection: close\r\n"),
            b"GET /healthz HTTP/1.0\r\n\r\n",
            get(b"/nowhere", b"Connection: close\r\n"),
            b"POST /threads HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
        ],
        ids=["close", "HTTP/1.0", "an error and close", "an error before the body"],
    )
    async def test_closes_when_the_answer_was_the_last(
        self,
        server: Server,
        request_: bytes,
    ) -> None:
        """Or who never closes keeps the connection, one of the thousand that there are."""
        async with await server.connect() as stream:
            await stream.send_all(request_)
            head, _, _ = await bare.read_answer(stream)
            assert head.startswith(b"HTTP/1.1 ")
            with trio.move_on_after(3):
                assert await bare.read_all(stream) == b""
                return
            pytest.fail("the connection stays open")

    async def test_tells_who_sends_no_request_at_all(self, server: Server) -> None:
        async with await server.connect() as stream:
            await stream.send_all(b"HELO mail\r\n\r\n")
            assert (await bare.read_all(stream)).startswith(b"HTTP/1.1 400 ")

    async def test_tells_whose_head_is_too_long(self, server: Server) -> None:
        async with await server.connect() as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"GET / HTTP/1.1\r\nX: ")
                for _ in range(33):
                    await stream.send_all(b"x" * 1024)
            answer = await bare.read_all(stream)
        # Closing with bytes unread resets the connection, which may overtake the answer.
        if answer:
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b"head is longer than 32 KiB" in answer

    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (b"HELO mail\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nX: " + b"x" * (33 * 1024 - 19), 431),
            (H2_PREFACE, 505),
            (get(b"*"), 400),
            (upgrade(subprotocol=b"other"), 400),
            (get(CHAT_PATH.encode()), 426),
        ],
        ids=str,
    )
    async def test_says_in_json_what_is_wrong(
        self,
        server: Server,
        data: bytes,
        status: int,
    ) -> None:
        async with await server.connect() as stream:
            await stream.send_all(data)
            head, body, _ = await bare.read_answer(stream)
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"content-type: application/json" in head.lower()
        told = json.loads(body)
        assert set(told) == {"error", "message"}
        assert told["message"]


# --- on a clock of our own, with no thread about: the deadlines


@contextlib.asynccontextmanager
async def open_door(
    app: Callable[..., Awaitable[None]],
    serve_websocket: Callable[..., Awaitable[None]] | None = None,
    **more: Any,
) -> AsyncIterator[int]:
    """A door on a port, with nothing behind it but what a test puts there."""

    async def no_chat(*_: object) -> None:
        pytest.fail("nobody wants to chat")

    door = Door(app, serve_websocket or no_chat, **{"max_connections": 10, **more})
    async with trio.open_nursery() as nursery:
        listening = partial(trio.serve_tcp, door.serve_connection, 0, host="127.0.0.1")
        listeners = await nursery.start(listening)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def answer_ok(scope: Any, receive: Any, send: Any, *_: Any) -> None:
    """The smallest application; what it sends is as long as the path says."""
    size = int(scope["path"].strip("/") or 0)
    head = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    for start in range(0, size, 100_000):
        body = b"x" * min(100_000, size - start)
        more = start + len(body) < size
        await send({"type": "http.response.body", "body": body, "more_body": more})
    if not size:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture
def quick_clock() -> MockClock:
    """Whenever nothing happens for a moment, it jumps to the next deadline.

    The kernel hands on what is sent on loopback at once, and there is no thread here.
    """
    return MockClock(autojump_threshold=0.1)


@contextlib.asynccontextmanager
async def open_deaf_reader() -> AsyncIterator[tuple[trio.CancelScope, trio.Event]]:
    """A connection in the middle of an answer: a scope around all of the door, and its end."""
    scope, left = trio.CancelScope(), trio.Event()

    async def serve(*, task_status: trio.TaskStatus[int]) -> None:
        with scope:
            async with open_door(answer_ok) as port:
                task_status.started(port)
                await trio.sleep_forever()
        left.set()

    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(serve)
        async with await bare.deaf_connection(port) as s:
            await s.send_all(get(b"/50000000"))
            await bare.read_head(s)
            yield scope, left


class TestDeadlines:
    @pytest.mark.parametrize("beginning", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX: y\r\n"])
    async def test_a_head_must_be_there_in_time(
        self,
        quick_clock: MockClock,
        beginning: bytes,
    ) -> None:
        async with open_door(answer_ok) as port, await trio.open_tcp_stream("127.0.0.1", port) as s:
            await s.send_all(beginning)
            answer = await bare.read_all(s, patience=100)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert HEAD_TIMEOUT <= trio.current_time() < HEAD_TIMEOUT + 1

    async def test_a_head_that_drips_gets_no_more_time(self, quick_clock: MockClock) -> None:
        async with open_door(answer_ok) as port, await trio.open_tcp_stream("127.0.0.1", port) as s:
            await s.send_all(b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(trio.BrokenResourceError):
                while trio.current_time() < 3 * HEAD_TIMEOUT:
                    await trio.sleep(HEAD_TIMEOUT / 10)
                    await s.send_all(b"X: y\r\n")
            assert trio.current_time() < HEAD_TIMEOUT * 1.3

    async def test_a_body_must_be_there_in_time(self, quick_clock: MockClock) -> None:
        async with open_chat_door() as (port, auth):
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                token = auth.mint_token("ada", seconds=1000).encode()
                await s.send_all(
                    b"POST /threads HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
                    b"Authorization: Bearer " + token + b"\r\n\r\n{",
                )
                assert (await bare.read_all(s, patience=150)).startswith(b"HTTP/1.1 408 ")
                assert trio.current_time() < 100

    async def test_a_second_head_that_never_ends_is_no_way_to_stay(
        self,
        quick_clock: MockClock,
    ) -> None:
        async with open_chat_door() as (port, _):
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                await s.send_all(get())
                await bare.read_answer(s)
                with contextlib.suppress(trio.BrokenResourceError):
                    await s.send_all(b"GET / HTTP/1.1\r\nX: ")
                    while trio.current_time() < 100:
                        await trio.sleep(5)
                        await s.send_all(b"x")
                assert trio.current_time() < 50

    async def test_who_reads_slowly_but_steadily_gets_it_all(self, quick_clock: MockClock) -> None:
        size = 300_000
        async with open_door(answer_ok) as port, await bare.deaf_connection(port) as s:
            await s.send_all(get(b"/%d" % size))
            _, rest = await bare.read_head(s)
            got = len(rest)
            while got < size:
                await trio.sleep(SEND_TIMEOUT / 4)
                wanted = min(size, got + 12_000)
                while got < wanted:
                    more = await s.receive_some(wanted - got)
                    assert more, f"cut off after {got} bytes"
                    got += len(more)
        assert got == size
        assert trio.current_time() > 3 * SEND_TIMEOUT, "else it was not slow"

    async def test_who_does_not_read_delays_nobodys_leaving(self, quick_clock: MockClock) -> None:
        """hypercorn shields its sends; the door closes the socket beneath them."""
        async with open_deaf_reader() as (scope, left):
            await wait_all_tasks_blocked(0.05)
            began = trio.current_time()
            scope.cancel()
            with trio.fail_after(100):
                await left.wait()
            assert trio.current_time() - began < 1

    async def test_who_does_not_read_an_answer_is_cut_off(self, quick_clock: MockClock) -> None:
        """Inside hypercorn's shield, where no cancellation would reach."""
        gone = trio.Event()

        async def answer_and_tell(*args: Any) -> None:
            try:
                await answer_ok(*args)
            finally:
                gone.set()

        async with open_door(answer_and_tell, max_connections=1) as port:
            async with await bare.deaf_connection(port) as s:
                await s.send_all(get(b"/50000000"))
                with trio.fail_after(100):
                    await gone.wait()
                assert SEND_TIMEOUT <= trio.current_time() < SEND_TIMEOUT + 1
                # Its place is free again, although it never closes.
                await trio.sleep(1)
                async with await trio.open_tcp_stream("127.0.0.1", port) as other:
                    await other.send_all(get(b"/0"))
                    head, _ = await bare.read_head(other)
                    assert head.startswith(b"HTTP/1.1 200 ")

    @pytest.mark.parametrize(
        "request_",
        [
            upgrade().replace(b"GET ", b"POST ", 1),
            upgrade().replace(b"Version: 13", b"Version: 99"),
            get(CHAT_PATH.encode(), b"Connection: upgrade\r\nUpgrade: websocket\r\n"),
            upgrade(subprotocol=b"other"),
            upgrade(),
        ],
        ids=["by POST", "another version", "no key", "another subprotocol", "no token"],
    )
    async def test_who_is_refused_has_no_place_any_more(
        self,
        quick_clock: MockClock,
        request_: bytes,
    ) -> None:
        async with open_chat_door(max_connections=1) as (port, _):
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                await s.send_all(request_)
                answer = await bare.read_all(s, patience=100)
                assert answer
                refused_at = trio.current_time()
            with trio.fail_after(100):
                while True:
                    async with await trio.open_tcp_stream("127.0.0.1", port) as other:
                        await other.send_all(get())
                        head, _, _ = await bare.read_answer(other)
                    if not head.startswith(b"HTTP/1.1 503 "):
                        break
                    await trio.sleep(0.1)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert trio.current_time() < refused_at + 2

    async def test_who_answers_no_ping_is_cut_off(self, quick_clock: MockClock) -> None:
        async with open_chat_door() as (port, auth):
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                token = auth.mint_token("ada", seconds=60)
                received = bytearray(await bare.shake_hands(s, CHAT_PATH, token))
                opcodes = []
                while (found := await bare.next_frame(s, received, patience=500)) is not None:
                    opcodes.append(found[0])
                assert opcodes == [bare.PING]
                assert 2 * PING_INTERVAL <= trio.current_time() < 2 * PING_INTERVAL + 1

    async def test_who_answers_pings_may_stay(self, quick_clock: MockClock) -> None:
        async with open_chat_door() as (port, auth):
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                token = auth.mint_token("ada", seconds=60)
                received = bytearray(await bare.shake_hands(s, CHAT_PATH, token))
                for _ in range(5):
                    found = await bare.next_frame(s, received, patience=500)
                    assert found is not None
                    assert found[0] == bare.PING
                    await s.send_all(bare.frame(bare.PONG, found[1]))
                await s.send_all(bare.frame(bare.TEXT, b'{"id":1,"method":"state.get"}'))
                found = await bare.next_frame(s, received)
                assert found is not None
                assert b'"success"' in found[1]

    async def test_who_takes_no_answers_is_cut_off(self, quick_clock: MockClock) -> None:
        """It pings all the time, so that it is alive, but takes no pong."""
        pings = bare.frame(bare.PING, b"x" * 125) * 1000
        async with open_chat_door() as (port, auth):
            async with await bare.deaf_connection(port) as s:
                token = auth.mint_token("ada", seconds=60)
                await bare.shake_hands(s, CHAT_PATH, token)
                with pytest.raises(trio.BrokenResourceError):
                    while trio.current_time() < 5 * SEND_TIMEOUT:
                        with trio.move_on_after(5):
                            await s.send_all(pings)
                assert trio.current_time() < 2 * SEND_TIMEOUT


@contextlib.asynccontextmanager
async def open_chat_door(**more: Any) -> AsyncIterator[tuple[int, Auth]]:
    """A door with the real chat behind it, on a store in memory."""
    store = MemoryStore()
    infrastructure = Infrastructure(
        agents=AgentClassRegistry({"hang": agent_of(hang)}),
        store=store,
    )
    flusher = Flusher()
    auth = Auth(b"x" * 32)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flusher.serve)
        async with open_supervisor(infrastructure) as supervisor, open_audit(MemorySink()) as audit:

            async def ping() -> None: ...

            services = Services(
                supervisor=supervisor,
                store=store,
                ping=ping,
                auth=auth,
                audit=audit,
                lookups=Lookups(store, audit),
                settings=settings_for(Path("unused")),
                flusher=flusher,
                leaving=trio.Event(),
            )
            chat = partial(serve_chat, services=services, sockets=Sockets(5))
            app: Any = make_app(services)
            async with open_door(app, chat, **more) as port:
                yield port, auth
        nursery.cancel_scope.cancel()


class TestTheBarrier:
    @pytest.mark.parametrize(
        "error",
        [
            ValueError("x"),
            SystemExit(1),
            GeneratorExit(),
            BaseException("x"),
            ExceptionGroup("g", [ValueError("x"), OSError("y")]),
            BaseExceptionGroup("g", [SystemExit(1), trio.BrokenResourceError()]),
        ],
        ids=repr,
    )
    async def test_keeps_what_a_handler_raises_from_the_accept_loop(
        self,
        error: BaseException,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def broken(*_: object) -> None:
            raise error

        async with open_door(answer_ok, broken) as port:
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                await s.send_all(upgrade())
                assert await bare.read_all(s) == b""
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                await s.send_all(get(b"/3", b"Connection: close\r\n"))
                assert (await bare.read_all(s)).endswith(b"xxx")
        assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == [
            "a connection failed",
        ]

    @pytest.mark.parametrize(
        "error",
        [
            trio.BrokenResourceError(),
            ConnectionResetError(),
            BaseExceptionGroup("g", [trio.ClosedResourceError(), TimeoutError()]),
        ],
        ids=repr,
    )
    async def test_says_nothing_of_a_peer_that_went_away(
        self,
        error: BaseException,
        complaints: list[str],
    ) -> None:
        async def gone(*_: object) -> None:
            raise error

        async with open_door(answer_ok, gone) as port:
            async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                await s.send_all(upgrade())
                assert await bare.read_all(s) == b""

    async def test_lets_an_interrupt_of_the_process_pass(self) -> None:
        async def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(BaseExceptionGroup) as info:
            async with open_door(answer_ok, interrupted) as port:
                async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                    await s.send_all(upgrade())
                    await trio.sleep(PATIENCE)
        assert info.group_contains(KeyboardInterrupt, depth=None)

    async def test_counts_a_connection_only_while_it_is_there(self) -> None:
        async with open_door(answer_ok, max_connections=1) as port:
            for _ in range(5):
                async with await trio.open_tcp_stream("127.0.0.1", port) as s:
                    await s.send_all(get(b"/0", b"Connection: close\r\n"))
                    assert (await bare.read_all(s)).startswith(b"HTTP/1.1 200 ")
                await wait_all_tasks_blocked()


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_inner_modules_of_hypercorn_are_where_the_door_looks_for_them() -> None:
    """They are not its public interface: pin 0.18, and look here before moving the pin."""
    assert hypercorn.__version__.startswith("0.18.") if hasattr(hypercorn, "__version__") else True
    assert parameters(TCPServer.__init__) == ["self", "app", "config", "context", "state", "stream"]
    assert inspect.iscoroutinefunction(TCPServer.run)
    assert hasattr(TCPServer, "__await__")
    assert parameters(ASGIWrapper.__init__) == ["self", "app"]
    assert parameters(WorkerContext.__init__) == ["self", "max_requests"]
    context = WorkerContext(None)
    assert inspect.iscoroutinefunction(context.terminated.set)
    assert parameters(Lifespan.__init__) == ["self", "app", "config", "state"]
    for name in ("handle_lifespan", "wait_for_startup", "wait_for_shutdown"):
        assert inspect.iscoroutinefunction(getattr(Lifespan, name)), name
    for name in (
        "accesslog",
        "errorlog",
        "include_server_header",
        "h11_max_incomplete_size",
        "keep_alive_timeout",
    ):
        assert hasattr(Config(), name), name


def test_the_server_still_shields_its_sends() -> None:
    """Why `HttpStream` has a deadline of its own. When this fails, that may go."""
    assert "shield = True" in inspect.getsource(TCPServer.protocol_send)


def test_h11_says_what_the_door_asks_of_it() -> None:
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=100)
    parser.receive_data(b"GET / HTTP/1.1\r\nX: " + b"x" * 200)
    with pytest.raises(h11.RemoteProtocolError) as info:
        parser.next_event()
    assert info.value.error_status_hint == 431


async def test_a_user_id_is_not_needed_to_be_refused(server: Server) -> None:
    """A stranger's upgrade is answered with a close code, and costs no thread's look-up."""
    async with await server.connect() as stream:
        await stream.send_all(upgrade())
        head, rest = await bare.read_head(stream)
        assert head.startswith(b"HTTP/1.1 101 ")
        frames = await bare.frames_to_the_end(stream, rest)
    assert [opcode for opcode, _ in frames] == [bare.CLOSE]
    assert int.from_bytes(frames[0][1][:2], "big") == 4401
