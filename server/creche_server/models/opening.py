"""Opens the model that the settings name, for as long as the process lives."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

import trio

from creche import Model, ToolSpec
from creche.testing import ScriptedModel, open_pacer


class UnknownModelError(ValueError):
    """The settings name a model that there is none of."""


@contextlib.asynccontextmanager
async def open_models(
    spec: str,
    tools: Sequence[ToolSpec] = (),
    *,
    attempts: int = 3,
) -> AsyncIterator[Mapping[str, Model]]:
    """The models by name; `default` is `spec`: `local`, `scripted` or `openai:NAME`.

    `tools` are those that the first answers will probably be offered. `attempts` is how often
    an endpoint is asked at most, where its failures may pass.

    Raises UnknownModelError, and ModelError where a model cannot be opened.
    """
    kind, _, name = spec.partition(":")
    # A provider's library is imported by those who use it: each costs half a second.
    if kind == "local" and not name:
        from creche_server.models.local import open_local_model  # noqa: PLC0415

        async with open_local_model() as model, trio.open_nursery() as nursery:
            nursery.start_soon(model.warm_up, tools)  # nobody has to wait for it
            yield {"default": model}
            nursery.cancel_scope.cancel()
    elif kind == "scripted" and not name:
        async with open_pacer() as pacer:
            yield {"default": ScriptedModel(pacer)}
    elif kind == "openai" and name:
        from creche_server.models.openai import open_openai_model  # noqa: PLC0415
        from creche_server.models.retrying import RetryingModel  # noqa: PLC0415

        async with open_openai_model(name) as model:
            yield {"default": RetryingModel(model, attempts=attempts)}
    else:
        msg = f"there is no model {spec!r}: use local, scripted or openai:NAME"
        raise UnknownModelError(msg)
