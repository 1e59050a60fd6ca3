"""What is around a call that cannot be handed it: for the names of the older design only.

The project's one ContextVar that anything reads to act on. `compat.open_infrastructure` sets it;
only `create_user_engine`, `create_scoped_dispatcher_context` and the older names look, and only
for what they are not given.
"""

from __future__ import annotations

import dataclasses
from contextvars import ContextVar
from typing import Any, Final

from creche._errors import CrecheError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Their types are of layers above this one."""

    infrastructure: Any  # an Infrastructure
    journals: Any  # Journals on its store
    quotas: Any  # ToolQuotas


surroundings: Final[ContextVar[Surroundings | None]] = ContextVar("creche_compat", default=None)


def look_around(wanted: str) -> Surroundings:
    """What `compat.open_infrastructure` has opened around this call.

    Raises CrecheError, which says to pass `wanted` instead.
    """
    found = surroundings.get()
    if found is None:
        msg = f"pass {wanted}, or open creche.compat.open_infrastructure(...) around the call"
        raise CrecheError(msg)
    return found


def around_of(infrastructure: object) -> Surroundings | None:
    """What is around this call, if it is that infrastructure's: for who was passed it by hand."""
    found = surroundings.get()
    return found if found is not None and found.infrastructure is infrastructure else None
