"""What a request brings, checked against a model: its query, or its body."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from quart import request

Model = TypeVar("Model", bound=BaseModel)


class UnfitError(Exception):
    """The query or the body is not what the address asks for."""

    def __init__(self, error: ValidationError, *, part: str) -> None:
        super().__init__(f"the request's {part} does not fit; see `details`")
        self.details = [
            {"field": ".".join(map(str, item["loc"])), "problem": item["msg"]}
            for item in error.errors(include_input=False, include_url=False)
        ]


def query(model: type[Model]) -> Model:
    """The query string; its numbers come as words. Raises UnfitError."""
    try:
        return model.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise UnfitError(error, part="query") from None


async def body(model: type[Model]) -> Model:
    """The JSON body; an empty one stands for `{}`. Raises UnfitError."""
    data = await request.get_data()
    try:
        return model.model_validate_json(data or b"{}")
    except ValidationError as error:
        raise UnfitError(error, part="body") from None
