"""The one writer of a socket, on real sockets."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.running import PATIENCE, eventually
from trio.testing import wait_all_tasks_blocked

from creche_server.outbox import HIGH_WATER, Flusher, Outbox


@contextlib.asynccontextmanager
async def open_outbox(
    *,
    received: bytes = b"",
    stall_timeout: float = 60,
    serve: bool = True,
) -> AsyncIterator[tuple[Outbox, trio.SocketStream]]:
    """An outbox and its peer."""
    ours, theirs = trio.socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    flusher = Flusher()
    outbox = Outbox(trio.SocketStream(ours), received, flusher, stall_timeout=stall_timeout)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flusher.serve)
        if serve:
            nursery.start_soon(outbox.serve)
        async with trio.SocketStream(theirs) as peer:
            yield outbox, peer
        nursery.cancel_scope.cancel()
    await trio.aclose_forcefully(outbox)


async def read(peer: trio.SocketStream, size: int) -> bytes:
    data = b""
    with trio.fail_after(PATIENCE):
        while len(data) < size:
            more = await peer.receive_some(65536)
            assert more, f"ended after {len(data)} bytes"
            data += more
    return data


async def test_a_frame_on_a_quiet_connection_is_written_at_once() -> None:
    async with open_outbox() as (outbox, peer):
        outbox.post(b"hello")
        # No await in between: it is in the kernel already.
        assert os.read(peer.socket.fileno(), 100) == b"hello"


async def test_frames_keep_their_order() -> None:
    async with open_outbox() as (outbox, peer):
        frames = [f"<{number}>".encode() for number in range(1000)]
        for number, frame in enumerate(frames):
            outbox.post(frame)
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()
        assert await read(peer, len(b"".join(frames))) == b"".join(frames)


@settings(max_examples=40, deadline=None)
@given(
    frames=st.lists(st.integers(0, 20_000), max_size=30),
    controls=st.sets(st.integers(0, 30)),
)
async def test_frames_and_control_frames_never_mix(frames: list[int], controls: set[int]) -> None:
    """However large they are, and however slowly they are read."""
    expected: list[bytes] = []
    async with open_outbox() as (outbox, peer):
        got = bytearray()

        async def drain() -> None:
            while True:
                got.extend(await peer.receive_some(1000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            with trio.fail_after(PATIENCE):
                for number, size in enumerate(frames):
                    data = bytes([number]) * size
                    expected.append(data)
                    if number in controls:
                        await outbox.send_all(data)
                    else:
                        await outbox.relieved()
                        outbox.post(data)
                await outbox.flushed()
            await eventually(lambda: len(got) == sum(frames), "all of it has arrived")
            nursery.cancel_scope.cancel()
    assert bytes(got) == b"".join(expected)


async def test_what_is_written_in_many_small_bites_is_not_copied_for_each() -> None:
    """A megabyte in bites of a few kilobytes would be copied a hundred times over."""
    async with open_outbox() as (outbox, peer):
        data = b"x" * 400_000
        outbox.post(data)
        got = b""
        for number in range(5):
            outbox.post(b"more")
            got += await read(peer, 20_000)
            left = 400_000 + 4 * (number + 1) - len(got)
            await eventually(lambda n=left: outbox._queued_bytes < n, "a bite")  # type: ignore[misc]
            assert outbox._queue[0] is data
        got += await read(peer, 400_000 + 20 - len(got))
    assert got == data + b"more" * 5


async def test_a_send_returns_when_the_system_has_it_all() -> None:
    async with open_outbox() as (outbox, peer), trio.open_nursery() as nursery:
        done = trio.Event()

        async def send() -> None:
            await outbox.send_all(b"x" * 300_000)
            done.set()

        nursery.start_soon(send)
        await wait_all_tasks_blocked(0.02)
        assert not done.is_set()
        await read(peer, 300_000)
        with trio.fail_after(PATIENCE):
            await done.wait()


async def test_a_cancelled_send_leaves_no_half_a_frame() -> None:
    async with open_outbox() as (outbox, peer):
        with trio.move_on_after(0.01):
            await outbox.send_all(b"a" * 300_000)
        outbox.post(b"b" * 10)
        assert await read(peer, 300_010) == b"a" * 300_000 + b"b" * 10


async def test_who_wants_to_queue_more_waits_beyond_the_mark() -> None:
    async with open_outbox() as (outbox, peer), trio.open_nursery() as nursery:
        waited = trio.Event()
        outbox.post(b"x" * (HIGH_WATER + 200_000))

        async def wait() -> None:
            await outbox.relieved()
            waited.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked(0.02)
        assert not waited.is_set()
        await read(peer, 400_000)
        with trio.fail_after(PATIENCE):
            await waited.wait()


async def test_a_peer_that_takes_nothing_for_long_is_given_up() -> None:
    async with open_outbox(stall_timeout=0.05) as (outbox, _peer):
        outbox.post(b"x" * 400_000)
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(PATIENCE):
            await outbox.relieved()
        assert outbox.too_slow
        with pytest.raises(trio.BrokenResourceError):
            outbox.post(b"more")
        with pytest.raises(trio.BrokenResourceError):
            await outbox.send_all(b"more")


async def test_a_peer_that_takes_a_little_now_and_then_is_not() -> None:
    """The time-out is for no progress at all, not for a slow line."""
    async with open_outbox(stall_timeout=0.5) as (outbox, peer):
        outbox.post(b"x" * 60_000)
        got = 0
        while got < 60_000:
            await trio.sleep(0.05)
            got += len(await peer.receive_some(5000))
        assert not outbox.too_slow


async def test_a_peer_that_is_gone_is_told_of() -> None:
    async with open_outbox() as (outbox, peer):
        await peer.aclose()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(PATIENCE):
            while True:
                outbox.post(b"x" * 1000)
                await trio.lowlevel.checkpoint()
        assert not outbox.too_slow


async def test_who_waits_is_told_that_the_peer_is_gone() -> None:
    async with open_outbox() as (outbox, peer):
        outbox.post(b"x" * 600_000)

        async def leave() -> None:
            await wait_all_tasks_blocked(0.02)
            await peer.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(PATIENCE):
                await outbox.flushed()


async def test_a_closed_outbox_says_so() -> None:
    async with open_outbox() as (outbox, _peer):
        await outbox.aclose()
        with pytest.raises(trio.ClosedResourceError):
            outbox.post(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await outbox.send_all(b"x")
        await outbox.aclose()


async def test_what_was_received_before_comes_first() -> None:
    async with open_outbox(received=b"abcdef") as (outbox, peer):
        await peer.send_all(b"ghi")
        assert await outbox.receive_some(4) == b"abcd"
        assert await outbox.receive_some() == b"ef"
        assert await outbox.receive_some() == b"ghi"


@pytest.mark.parametrize("close", ["the stream beneath", "the outbox"])
async def test_nothing_is_written_to_whoever_has_the_descriptor_next(close: str) -> None:
    """The kernel gives a number out again at once: one user's words on another's socket."""
    async with open_outbox(serve=False) as (outbox, _peer):
        number = outbox.socket.fileno()
        outbox.post(b"written at once")
        outbox.post(b"canary of the first")  # this one waits for the flusher
        if close == "the outbox":
            await outbox.aclose()
        else:
            outbox._stream.socket.close()
        mine, theirs = socket.socketpair()
        with contextlib.closing(mine), contextlib.closing(theirs):
            os.dup2(mine.fileno(), number) if mine.fileno() != number else None
            try:
                await trio.sleep(0.02)  # ten ticks of the flusher
                theirs.setblocking(False)
                with pytest.raises(BlockingIOError):
                    assert theirs.recv(100) == b""
            finally:
                if mine.fileno() != number:
                    os.close(number)
