"""docs/wire.md, held to what the server does."""

from __future__ import annotations

import json
import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
import trio
from tests.server import bare
from tests.server.running import PATIENCE, Server

from creche import UserId
from creche_server.wire import codes
from creche_server.wire.commands import COMMANDS
from creche_server.wire.replies import ErrorCode

WIRE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()


def block(kind: str) -> str:
    """The fenced block that follows `<!-- kind: client.py -->`."""
    match = re.search(rf"<!-- {kind}: client.py -->\n```\w+\n(.*?)```", WIRE, re.DOTALL)
    assert match is not None
    return match[1]


def shape(value: Any, name: str = "") -> Any:
    """A value without what differs from run to run: ids, times and durations."""
    if isinstance(value, dict):
        return {key: shape(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value) if name.lower().endswith(("id", "timestamp", "_ms")) else value


async def test_the_client_prints_the_events_that_the_page_shows(
    server: Server,
    tmp_path: Path,
) -> None:
    program = tmp_path / "client.py"
    program.write_text(block("file"))
    words = 'tokens=2 tool=calculator:{"expression":"6*7"}'
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            [sys.executable, program, server.url, server.token(), words],
            capture_stdout=True,
        )
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    replies = [message for message in printed if "seq" not in message]
    assert [(reply["id"], reply["type"]) for reply in replies] == [(1, "success"), (2, "success")]
    events = [shape(message) for message in printed if "seq" in message]
    assert events == [shape(json.loads(line)) for line in block("output").splitlines()]


def test_all_words_of_the_wire_are_on_the_page() -> None:
    words = [*COMMANDS, *get_args(ErrorCode), codes.SUBPROTOCOL]
    words += [str(code) for code in vars(codes).values() if isinstance(code, int)]
    assert [word for word in words if word not in WIRE] == []


@pytest.mark.parametrize(
    ("method", "path", "status", "more"),
    [
        ("GET", "/threads/none", 400, {}),
        ("GET", "/threads/a%2Fb", 400, {}),
        ("GET", "/threads", 401, {"headers": {"Authorization": ""}}),
        ("GET", "/threads/absent", 404, {}),
        ("PUT", "/threads", 405, {}),
        ("POST", "/threads", 413, {"content": b"x" * (1024 * 1024 + 1)}),
        ("POST", "/threads", 422, {"content": b"{"}),
        ("GET", "/threads?limit=x", 422, {}),
        ("GET", "/threads/t/stream", 426, {}),
    ],
)
async def test_errors_are_as_the_table_has_them(
    server: Server,
    method: str,
    path: str,
    status: int,
    more: dict[str, Any],
) -> None:
    async with server.http() as http:
        answer = await http.request(method, path, **more)
    assert answer.status_code == status
    assert f"| {status} | `{answer.json()['error']}`" in WIRE
    assert ("details" in answer.json()) is (status == HTTPStatus.UNPROCESSABLE_ENTITY)
    assert answer.headers["connection"] == "close"


async def test_a_foreign_page_is_answered_what_it_cannot_read(server: Server) -> None:
    headers = {
        "Origin": "http://evil.example",
        "Cookie": f"{server.auth.session_cookie}={server.auth.mint_session(UserId('bob'))}",
    }
    async with server.http(None) as http:
        read: httpx2.Response = await http.get("/threads", headers=headers)
        changed = await http.post("/threads", headers=headers)
        asked_before = await http.options("/threads", headers=headers)
    assert (read.status_code, changed.status_code) == (200, 403)
    for answer in (read, changed, asked_before):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_a_param_that_nobody_knows_is_ignored_on_the_websocket(server: Server) -> None:
    async with server.chat() as chat:
        await chat.subscribe(channels=["values"], namespaces=[[]], depth=3)
        message = {"role": "user", "content": "tokens=1"}
        started = await chat.ask("run.start", input={"messages": [message], "x": 1}, config={})
        await chat.finished(started["run_id"])


async def test_a_failed_login_is_an_accepted_handshake_and_a_close(server: Server) -> None:
    async with await server.connect() as stream:
        await stream.send_all(bare.upgrade_request("/threads/t/stream", "nonsense"))
        head, rest = await bare.read_head(stream)
        frames = await bare.frames_to_the_end(stream, rest)
    assert head.startswith(b"HTTP/1.1 101 ")
    assert [(opcode, int.from_bytes(data[:2], "big")) for opcode, data in frames] == [
        (bare.CLOSE, codes.UNAUTHORIZED),
    ]
