"""Frames as a server sends them, read back by wsproto."""

from __future__ import annotations

import pytest
import wsproto
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection
from wsproto.events import TextMessage

from creche_server.wire.frames import text_frame


def read(data: bytes) -> list[str]:
    """Whole messages, as a stock client understands them."""
    client = Connection(wsproto.ConnectionType.CLIENT)
    client.receive_data(data)
    messages, parts = list[str](), list[str]()
    for event in client.events():
        assert isinstance(event, TextMessage)
        parts.append(event.data)
        if event.message_finished:
            messages.append("".join(parts))
            parts.clear()
    assert not parts
    return messages


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 128, 65535, 65536, 65537, 200_000])
def test_a_frame_of_any_length_is_read_back(length: int) -> None:
    assert read(text_frame(b"x" * length)) == ["x" * length]


@given(st.lists(st.text(max_size=300), max_size=10))
def test_frames_that_are_joined_are_read_one_by_one(texts: list[str]) -> None:
    assert read(b"".join(text_frame(text.encode()) for text in texts)) == texts


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (0, "8100"),
        (125, "817d"),
        (126, "817e007e"),
        (65535, "817effff"),
        (65536, "817f0000000000010000"),
    ],
)
def test_the_length_takes_as_few_bytes_as_it_can(length: int, header: str) -> None:
    """RFC 6455, section 5.2: the minimal number of bytes must be used."""
    assert text_frame(b"x" * length) == bytes.fromhex(header) + b"x" * length
