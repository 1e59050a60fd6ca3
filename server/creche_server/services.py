"""What every connection is handed, in one frozen object."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

import trio

from creche import SecurityAudit, Store, Supervisor
from creche_server.auth import Auth
from creche_server.lookups import Lookups
from creche_server.outbox import Flusher
from creche_server.packages import OURS
from creche_server.settings import Settings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Services:
    """Shared by all connections; nothing in it belongs to a user."""

    supervisor: Supervisor
    store: Store
    ping: Callable[[], Awaitable[None]]  # raises if the store does not answer
    auth: Auth
    audit: SecurityAudit
    lookups: Lookups
    settings: Settings
    flusher: Flusher
    leaving: trio.Event  # set when runs have ended and connections should say goodbye
    packages: tuple[str, ...] = OURS  # whose modules' state is counted
