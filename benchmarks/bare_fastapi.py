"""The yardstick: a hand-written WebSocket loop on FastAPI, uvicorn and uvloop, and nothing else.

No auth, no journal, no storage and no cancelling: what somebody writes in an afternoon. It speaks
just enough of the wire for the same load client, and sends events of the same mean size.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

Event = dict[str, Any]

ENDS = 4  # events of a run that carry no text: RUN_STARTED, TEXT_MESSAGE_START, _END, RUN_FINISHED


async def events(thread: str, run: str, count: int, delta: str) -> AsyncIterator[Event]:
    """Yield a run of `count` events, `count - ENDS` of them carrying the text `delta`."""
    yield {"type": "RUN_STARTED", "threadId": thread, "runId": run}
    yield {"type": "TEXT_MESSAGE_START", "messageId": run, "role": "assistant"}
    for _ in range(count - ENDS):
        yield {"type": "TEXT_MESSAGE_CONTENT", "messageId": run, "delta": delta}
    yield {"type": "TEXT_MESSAGE_END", "messageId": run}
    yield {"type": "RUN_FINISHED", "threadId": thread, "runId": run}


async def delta_for(payload: float, count: int) -> str:
    """Return the text that makes a run's events `payload` bytes long on average."""
    total = 0
    seq = 0
    async for event in events(str(uuid4()), uuid4().hex, count, ""):
        seq += 1
        event["seq"] = seq
        total += len(json.dumps(event))
    return "x" * max(1, round((payload * count - total) / (count - ENDS)))


def make_app(count: int, payload: float) -> FastAPI:
    """Return the application: runs of `count` events, `payload` bytes each on average."""
    app = FastAPI()

    @app.websocket("/threads/{thread_id}/stream/events")
    async def stream(  # pyright: ignore[reportUnusedFunction]  (FastAPI uses it)
        websocket: WebSocket, thread_id: str
    ) -> None:
        await websocket.accept()
        delta = await delta_for(payload, count)
        seq = 0
        try:
            while True:
                json.loads(await websocket.receive_text())  # any command starts a run
                async for event in events(thread_id, uuid4().hex, count, delta):
                    seq += 1
                    event["seq"] = seq
                    await websocket.send_text(json.dumps(event))
        except WebSocketDisconnect:
            return

    return app


def main() -> None:
    """Serve on a free port of 127.0.0.1 until told to stop; say where on stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=200, help="events of a run")
    parser.add_argument("--payload", type=float, default=180, help="mean bytes of an event")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    app = make_app(options.events, options.payload)
    sys.stdout.write(f"bare: listening on http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, loop="uvloop", log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
