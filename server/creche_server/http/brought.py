"""What a request brings, checked against a model: its query, or its body."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Literal, TypeVar

import trio
from pydantic import BaseModel, ValidationError
from quart import request
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

MOST_BODY_BYTES: Final = 1024 * 1024
BODY_TIMEOUT: Final = 60.0  # seconds for all of a body

Model = TypeVar("Model", bound=BaseModel)
Part = Literal["query", "body"]


class UnfitError(Exception):
    """The query or the body is not what the address asks for."""

    def __init__(self, problems: Iterable[tuple[str, str]], *, part: Part) -> None:
        """`problems` are pairs of a field's name, empty for the whole, and a sentence."""
        super().__init__(f"the request's {part} does not fit; see `details`")
        self.details = [{"field": field, "problem": problem} for field, problem in problems]


def query(model: type[Model]) -> Model:
    """The query string; its numbers come as words. Raises UnfitError."""
    try:
        return model.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise UnfitError(_problems_of(error), part="query") from None


async def _received() -> bytes:
    # Not `get_data()`: from Quart 0.23 on that looks at the size once all of it is there.
    data = bytearray()
    with trio.move_on_after(BODY_TIMEOUT) as waiting:
        async for part in request.body:
            data += part
            if len(data) > MOST_BODY_BYTES:
                raise RequestEntityTooLarge
    if waiting.cancelled_caught:
        raise RequestTimeout
    return bytes(data)


async def body(model: type[Model]) -> Model:
    """The JSON body; an empty one stands for `{}`. Raises UnfitError."""
    data = await _received()
    try:
        return model.model_validate_json(data or b"{}")
    except ValidationError as error:
        raise UnfitError(_problems_of(error), part="body") from None


def _problems_of(error: ValidationError) -> Iterator[tuple[str, str]]:
    for item in error.errors(include_input=False, include_url=False):
        yield ".".join(map(str, item["loc"])), item["msg"]
