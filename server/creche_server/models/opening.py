"""Opens the model that the settings name, for as long as the process lives."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from creche import Model, ToolSpec
from creche.testing import ScriptedModel, open_pacer

if TYPE_CHECKING:
    from creche_server.models.local import LocalModel


class UnknownModelError(ValueError):
    """The settings name a model that there is none of."""


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """What an agent's answers will be asked for with: its instructions and its tools."""

    instructions: str
    tools: Sequence[ToolSpec]


@contextlib.asynccontextmanager
async def open_models(
    spec: str,
    offers: Sequence[Offer] = (),
    *,
    attempts: int = 3,
    calibrations: Path | None = None,
) -> AsyncIterator[Mapping[str, Model]]:
    """The models by name; `default` is `spec`: `local`, `scripted` or `openai:NAME`.

    `offers` are those that the first answers will probably be made, the likeliest first; a file
    `calibrations` keeps what the local model measures of them. `attempts` is how often an
    endpoint is asked at most, where its failures may pass.

    Raises UnknownModelError, and ModelError where a model cannot be opened.
    """
    kind, _, name = spec.partition(":")
    # A provider's library is imported by those who use it: each costs half a second.
    if kind == "local" and not name:
        from creche_server.models.local import open_local_model  # noqa: PLC0415

        async with open_local_model(calibrations=calibrations) as model:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_warm_up, model, offers)  # nobody has to wait for it
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


async def _warm_up(model: LocalModel, offers: Sequence[Offer]) -> None:
    for offer in offers:
        await model.warm_up(offer.tools, offer.instructions)
