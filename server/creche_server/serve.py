"""Where everything is opened, and so where everything is closed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import ip_address
from typing import Final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.typing import ASGIFramework

from creche import (
    AgentClassRegistry,
    AuditSink,
    AuditUnavailableError,
    Infrastructure,
    ModelAgent,
    Supervisor,
    Tool,
    UserId,
    end_lost_runs,
    open_journals,
    open_supervisor,
)
from creche_server.admission import Sockets
from creche_server.application import Application
from creche_server.assistant import TOOL_NAMES, assistant_with, calculator, clock, history_tool
from creche_server.audit import open_data
from creche_server.auth import Auth
from creche_server.data_directory import address_file, load_key
from creche_server.database import open_database
from creche_server.door import Door
from creche_server.http import make_app
from creche_server.lookups import Lookups
from creche_server.mcp import mcp_sources
from creche_server.models import Offer, open_models
from creche_server.outbox import Flusher
from creche_server.packages import packages_of
from creche_server.services import Services
from creche_server.settings import Settings
from creche_server.tracing import FLUSH_TIMEOUT, open_tracing
from creche_server.websocket import serve_chat

_log: Final = logging.getLogger("creche.serve")

_DELIVERY_TIMEOUT: Final = 2.0  # seconds for the last words and the final flush
_SLACK: Final = 0.5  # seconds that all of it together may take longer than it should


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stop:
    """How a server is told to go: `soon` lets runs finish in the grace, `now` does not."""

    soon: trio.Event = dataclasses.field(default_factory=trio.Event)
    now: trio.Event = dataclasses.field(default_factory=trio.Event)


@dataclasses.dataclass(frozen=True, slots=True)
class Listening:
    """What is known once the server can be reached."""

    url: str
    page_link: str  # carries a one-time ticket


async def serve(
    settings: Settings,
    application: Application | None = None,
    *,
    stop: Stop,
    announce: Callable[[Listening], None] = lambda _: None,
    audit_sink: AuditSink | None = None,
    loaded: Sequence[str] = (),
) -> None:
    """Serve until told to stop, then leave in order; see `Stop`.

    The application's agents come first, and `assistant` is there beside them. `audit_sink` takes
    the audit's records instead of what the settings say. `loaded` names the modules that the
    agents were found in, whose state is counted beside that of the agents' own. Raises
    AlreadyServedError, AuditTamperedError, McpServerError, TracingUnavailableError, OSError if
    the address cannot be had, ValueError as `check_provided` does, and what opening the database
    or the model raises.
    """
    application = application or Application()
    check_provided(application, settings)
    sources = mcp_sources(settings.mcp, os.environ)
    async with open_tracing(settings.otlp_endpoint) as tracer:
        async with open_data(settings, audit_sink) as audit:
            auth = Auth(load_key(settings.data), origins=settings.origins)
            async with open_database(settings.database_url, migrates=False) as store:
                if lost := await end_lost_runs(store):
                    runs = "1 run" if lost == 1 else f"{lost} runs"
                    _log.warning("%s of a server that died ended as lost", runs)
                tools = (calculator, clock, history_tool(store))
                registry = all_agents(application.registry, settings.mcp.for_assistant)
                if "assistant" in application.registry:
                    _log.info("the agent 'assistant' is your own, in place of creche's")
                async with open_models(
                    settings.model,
                    offers(registry, tools),
                    calibrations=settings.data / "local-model.json",
                    attempts=settings.model_attempts,
                ) as models:
                    infrastructure = Infrastructure(
                        agents=registry,
                        tools=tools,
                        tool_sources=sources,
                        models=models,
                        tool_policy=application.tool_policy,
                        approver=application.approver,
                        limits=settings.limits,
                        store=store,
                        audit=audit,
                        tracer=tracer,
                    )
                    async with open_journals(store, settings.limits, audit=audit) as journals:
                        # Connections outlive runs, so that they can pass on the last word.
                        async with open_connections() as connections:
                            grace = _grace(settings)
                            async with open_supervisor(
                                infrastructure,
                                journals,
                                grace=grace,
                            ) as supervisor:
                                lookups = Lookups(store, audit)
                                connections.background.start_soon(lookups.serve)
                                services = Services(
                                    supervisor=supervisor,
                                    store=store,
                                    ping=store.ping,
                                    auth=auth,
                                    audit=audit,
                                    lookups=lookups,
                                    settings=settings,
                                    flusher=connections.flusher,
                                    leaving=connections.leaving,
                                    packages=packages_of(registry, tools, loaded),
                                )
                                connections.background.start_soon(_hurry, stop, supervisor)
                                await _accept_until_stopped(services, connections, stop, announce)
                                if supervisor.count:
                                    runs = (
                                        "1 run has"
                                        if supervisor.count == 1
                                        else (f"{supervisor.count} runs have")
                                    )
                                    _log.info("%s %g s to finish", runs, grace)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Connections:
    """What connections live in."""

    nursery: trio.Nursery  # creche: shared it is theirs; open_connections opens it
    background: trio.Nursery  # creche: shared it serves them all, and ends when they are gone
    flusher: Flusher
    leaving: trio.Event  # sends them home


@contextlib.asynccontextmanager
async def open_connections() -> AsyncIterator[Connections]:
    """Where connections live, with the flusher that writes for them.

    Resource handling: leaving the block by its end gives them 2 s to deliver what is left.
    """
    flusher = Flusher()
    leaving = trio.Event()
    async with trio.open_nursery() as background:
        background.start_soon(flusher.serve)
        async with trio.open_nursery() as nursery:
            yield Connections(nursery, background, flusher, leaving)
            leaving.set()
            nursery.cancel_scope.deadline = trio.current_time() + _DELIVERY_TIMEOUT
        background.cancel_scope.cancel()


async def _accept_until_stopped(
    services: Services,
    connections: Connections,
    stop: Stop,
    announce: Callable[[Listening], None],
) -> None:
    """Listen on the one port; leaving stops accepting, and leaves the connections be."""
    settings = services.settings
    app: ASGIFramework = make_app(services)
    sockets = Sockets(settings.max_connections_per_user)
    door = Door(
        app,
        functools.partial(serve_chat, services=services, sockets=sockets),
        max_connections=settings.max_connections,
        refused=functools.partial(_audit_full_house, services),
    )
    await connections.nursery.start(  # creche: shared the application ends with its connections
        _serve_lifespan,
        app,
        services.leaving,
        door,
    )
    async with trio.open_nursery() as accepting:
        listeners: list[trio.SocketListener] = await accepting.start(
            functools.partial(
                trio.serve_tcp,
                door.serve_connection,
                settings.port,
                host=settings.host,
                backlog=1024,
                handler_nursery=connections.nursery,
            ),
        )
        address, port = listeners[0].socket.getsockname()[:2]
        url = local_url(settings.host, port)
        if is_open(address):
            _log.warning("open to the network on %s port %d, without TLS", settings.host, port)
        ticket, _ = services.auth.mint_ticket(UserId(settings.user), "page")
        agents = services.supervisor.infrastructure.registry.names()
        with address_file(settings.data, url=url, user=settings.user, agents=agents):
            announce(Listening(url=url, page_link=f"{url}/?ticket={ticket}"))
            await stop.soon.wait()
        accepting.cancel_scope.cancel()


async def _audit_full_house(services: Services) -> None:
    """A connection is turned away. If that cannot be audited, it is turned away all the same."""
    with contextlib.suppress(AuditUnavailableError):
        await services.audit.record("limit_hit", resource="connections", operation="connect")


def local_url(host: str, port: int) -> str:
    """Where this machine finds the server; nobody can connect to 0.0.0.0, or ought to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  nothing is bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_open(address: str) -> bool:
    """Whether other machines can reach what listens on this IP address."""
    return not ip_address(address.partition("%")[0]).is_loopback


async def _serve_lifespan(
    app: ASGIFramework,
    leaving: trio.Event,
    door: Door,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Quart's start-up and shut-down, which hypercorn would otherwise do per worker."""
    lifespan = Lifespan(ASGIWrapper(app), Config(), {})
    async with trio.open_nursery() as nursery:
        await nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        task_status.started()
        await leaving.wait()
        await door.leave()
        await lifespan.wait_for_shutdown()
        nursery.cancel_scope.cancel()


async def _hurry(stop: Stop, supervisor: Supervisor) -> None:
    """Cut the grace short when somebody asks a second time."""
    await stop.now.wait()
    supervisor.cancel_all("shutdown")


def _grace(settings: Settings) -> float:
    """How long runs may finish by themselves, so that all the rest fits into the time-out."""
    ending = (
        settings.cleanup_timeout + settings.limits.last_words_timeout + _DELIVERY_TIMEOUT + _SLACK
    )
    if settings.otlp_endpoint is not None:
        ending += FLUSH_TIMEOUT
    return max(0.0, settings.shutdown_timeout - ending)


def check_provided(application: Application, settings: Settings) -> None:
    """Raise ValueError for an agent that wants a tool or an MCP server that is not there.

    Opens nothing, so that nothing is left of a server that could not have run.
    """
    servers = tuple(settings.mcp.servers)
    for name in application.registry:
        for wanted in application.registry.describe(name).tool_sources:
            if wanted not in servers:
                msg = (
                    f"agent {name!r} wants the MCP server {wanted!r}, which the settings do not "
                    f"name: they need [mcp.servers.{wanted}]"
                )
                raise ValueError(msg)
    application.registry.check_provided(TOOL_NAMES, servers)


def all_agents(own: AgentClassRegistry, sources: tuple[str, ...] = ()) -> AgentClassRegistry:
    """The embedder's agents first, then `assistant`, unless they have one of that name.

    `sources` are the tool sources that the assistant has.
    """
    registry = AgentClassRegistry()
    for name in own:
        agent = own.describe(name)
        registry.register(
            name,
            agent.agent_class,
            description=agent.description,
            version=agent.version,
            requires=agent.requires,
        )
    if "assistant" not in registry:
        registry.register("assistant", assistant_with(sources))
    return registry


def offers(agents: AgentClassRegistry, provided: Sequence[Tool]) -> list[Offer]:
    """What the default model will be asked with by each agent that asks it, in their order."""
    by_name = {tool.name: tool for tool in provided}
    found: list[Offer] = []
    for name in agents:
        agent = agents.describe(name)
        if issubclass(agent.agent_class, ModelAgent) and agent.agent_class.model == "default":
            tools = (by_name.get(tool) if isinstance(tool, str) else tool for tool in agent.tools)
            specs = [tool.spec for tool in tools if tool is not None]
            found.append(Offer(agent.agent_class.instructions, specs))
    return found
