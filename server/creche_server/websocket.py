"""One chat client: a reader of commands, and a sender that follows its thread's journal.

The connection owns neither run nor journal. It may go at any moment; runs go on without it,
and a later connection resumes from the last `seq` that the client saw.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import h11
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from creche import (
    AuditKind,
    AuditUnavailableError,
    CrecheError,
    IdKind,
    InvalidContextError,
    IsolationError,
    Journal,
    LimitExceededError,
    NoSuchQuestionError,
    Run,
    RunId,
    RunRecord,
    RunTree,
    ThreadDeletedError,
    ThreadId,
    UserExecutionContext,
    UserId,
    check_id,
    is_connection_of,
    new_connection_id,
    new_id,
)
from creche._auditing import note_mix_up
from creche_server.admission import RefusedError, Sockets, admit, audited
from creche_server.door import HEAD_TIMEOUT, SEND_TIMEOUT, error_body
from creche_server.outbox import Outbox
from creche_server.recall import UnknownRunError, open_interrupts, recall
from creche_server.resuming import in_parts, start_of
from creche_server.services import Services
from creche_server.wire import codes, replies
from creche_server.wire.commands import (
    MAX_COMMAND_BYTES,
    InputRespond,
    RunCancel,
    RunStart,
    StateGet,
    Subscribe,
    TreeGet,
    Unsubscribe,
    WireError,
    decode_command,
)
from creche_server.wire.frames import text_frame
from creche_server.wire.runs import run_node, thread_node

_log: Final = logging.getLogger("creche.websocket")

PING_INTERVAL: Final = 20.0  # seconds; a client that does not answer one is gone
_HANDSHAKE_TIMEOUT: Final = 1.0  # seconds to make a handshake of bytes that are there
_COMMANDS_AT_ONCE: Final = 32  # that wait for something, of one connection
_LAST_WORD_TIMEOUT: Final = 1.2  # seconds to pass on what is left, when the process goes
_CLOSE_TIMEOUT: Final = 0.5  # seconds for the peer to answer a close frame


async def serve_chat(
    stream: trio.SocketStream,
    received: bytes,
    request: h11.Request,
    *,
    services: Services,
    sockets: Sockets,
) -> None:
    """Serve an upgrade request to the end of its connection.

    `received` is everything read so far, the request's head included.
    """
    outbox = Outbox(stream, received, services.flusher, stall_timeout=SEND_TIMEOUT)
    async with outbox, trio.open_nursery() as nursery:
        nursery.start_soon(outbox.serve)
        # All bytes of the request are there. If it is faulty, trio-websocket answers that and
        # closes, but never says so here.
        with trio.fail_after(_HANDSHAKE_TIMEOUT):
            proposal = await wrap_server_stream(nursery, outbox, max_message_size=MAX_COMMAND_BYTES)
        with trio.fail_after(HEAD_TIMEOUT):
            if codes.SUBPROTOCOL not in proposal.proposed_subprotocols:
                words = f"offer the WebSocket subprotocol {codes.SUBPROTOCOL}"
                body = error_body(HTTPStatus.BAD_REQUEST, words)
                headers = [(b"content-type", b"application/json")]
                await proposal.reject(400, extra_headers=headers, body=body)
                nursery.cancel_scope.cancel()
                return
            socket = await proposal.accept(subprotocol=codes.SUBPROTOCOL)
        try:
            # Refused after the handshake: a browser is told close codes, but no HTTP status.
            user_id, thread_id = admit(request, services)
            with sockets.held(user_id):
                client = ChatClient(socket, outbox, services, user_id, thread_id)
                client.look_up("thread", thread_id, "connect")
                await client.serve()
        except RefusedError as refusal:
            reference = new_id()[:12]
            _log.info(
                "refused a WebSocket from %s: %s",
                _peer_of(stream),
                refusal.message,
                extra={"correlation_id": reference},
            )
            told = await audited(refusal, services.audit, reference)
            await _close(socket, told.code, told.message)
        nursery.cancel_scope.cancel()


class ChatClient:
    """One authenticated socket on one thread."""

    def __init__(
        self,
        socket: WebSocketConnection,
        outbox: Outbox,
        services: Services,
        user_id: UserId,
        thread_id: ThreadId,
    ) -> None:
        self._socket = socket
        self._outbox = outbox
        self._services = services
        self._user_id = user_id
        self._thread_id = thread_id
        self._connection_id = new_connection_id(user_id)
        self._correlation_id = self._connection_id[:12]  # of what no run's context is there for
        self._subscription: tuple[str, trio.CancelScope] | None = None
        self._caught_up: Callable[[], bool] = lambda: True
        self._progress = trio.lowlevel.ParkingLot()  # woken by whatever the sender has sent
        self._waiting_commands = 0
        self._state_turn = trio.Lock()

    async def serve(self) -> None:
        """Read commands until the peer leaves or the process does."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_alive, nursery.cancel_scope)
                nursery.start_soon(self._say_goodbye, nursery.cancel_scope)
                await self._read_commands(nursery)
                nursery.cancel_scope.cancel()
        finally:
            if self._outbox.too_slow:
                _log.info("a client was too slow and is disconnected")

    async def _read_commands(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                frame = await self._socket.get_message()
            except ConnectionClosed:
                return
            await self._outbox.relieved()  # who does not read replies is not read from, either
            try:
                command_id, command = decode_command(frame)
            except WireError as error:
                await self._refuse(error.id, error, "send")
                continue
            if isinstance(command, RunStart) and not command.resume:
                # Its place in the thread's order is settled here, in the order of the frames.
                await self._start_run(nursery, command_id, command)
            elif isinstance(command, Subscribe):
                self._subscribe(nursery, command_id, command)
            elif isinstance(command, Unsubscribe):
                self._unsubscribe(command_id, command)
            else:
                method, work = self._waiting(command)
                await self._spawn(nursery, command_id, method, work)

    def _waiting(
        self, command: RunStart | RunCancel | InputRespond | TreeGet | StateGet
    ) -> tuple[str, Callable[[], Awaitable[dict[str, Any]]]]:
        """What does a command that waits, and the command's name. A `RunStart` is an answer."""
        if isinstance(command, RunStart):
            return "run.start", functools.partial(self._resume, command)
        if isinstance(command, RunCancel):
            return "run.cancel", functools.partial(self._cancel_run, command)
        if isinstance(command, InputRespond):
            return "input.respond", functools.partial(self._respond, command)
        if isinstance(command, TreeGet):
            return "agent.getTree", functools.partial(self._tree, command)
        return "state.get", functools.partial(self._state, command)

    # --- commands that wait: bounded tasks of the connection's nursery

    async def _spawn(
        self,
        nursery: trio.Nursery,
        command_id: int,
        method: str,
        work: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        if await self._is_at_its_cap(command_id, method):
            return
        self._waiting_commands += 1
        nursery.start_soon(self._answer, command_id, method, work)

    async def _is_at_its_cap(self, command_id: int, method: str) -> bool:
        """Whether too many commands wait already; says so to the client."""
        if self._waiting_commands < _COMMANDS_AT_ONCE:
            return False
        message = f"{_COMMANDS_AT_ONCE} commands of this connection are under way already"
        full = LimitExceededError(message, retry_after=1.0)
        await self._refuse(command_id, full, method, kind="limit_hit", resource="commands")
        return True

    async def _answer(
        self,
        command_id: int,
        method: str,
        work: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        try:
            self._reply(replies.success(command_id, await work()))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the peer is gone, which the reader finds out by itself
        except Exception as error:  # noqa: BLE001  boundary: one command
            await self._refuse(command_id, error, method)
        finally:
            self._waiting_commands -= 1

    async def _start_run(self, nursery: trio.Nursery, command_id: int, command: RunStart) -> None:
        if await self._is_at_its_cap(command_id, "run.start"):
            return
        try:
            context = UserExecutionContext.from_request(
                user_id=self._user_id,
                thread_id=self._thread_id,
                metadata=command.metadata,
            ).with_connection(self._connection_id)
            if command.on_disconnect == "cancel":
                run: Run = await nursery.start(self._submit_and_watch, context, command)
            else:
                run = await self._submit(context, command)
        except Exception as error:  # noqa: BLE001  boundary: one command
            await self._refuse(command_id, error, "run.start")
            return
        await self._spawn(nursery, command_id, "run.start", functools.partial(self._accepted, run))

    async def _submit(self, context: UserExecutionContext, command: RunStart) -> Run:
        messages = tuple(message.to_message() for message in command.input.messages)
        return await self._services.supervisor.submit(
            context,
            command.assistant_id,
            messages,
            multitask_strategy=command.multitask_strategy,
            disconnect_grace=self._grace_of(command),
        )

    def _grace_of(self, command: RunStart) -> float | None:
        if command.on_disconnect == "continue":
            return None
        own = command.disconnect_grace
        return self._services.settings.disconnect_grace if own is None else own

    async def _submit_and_watch(
        self,
        context: UserExecutionContext,
        command: RunStart,
        *,
        task_status: trio.TaskStatus[Run],
    ) -> None:
        """Who asked for a run watches it, subscribed or not, for as long as the socket lives."""
        journals = self._services.supervisor.journals
        async with journals.attached(self._user_id, self._thread_id) as journal:
            with journal.watchers.watching():
                run = await self._submit(context, command)
                task_status.started(run)
                with contextlib.suppress(CrecheError):  # how it ended is told to who asks
                    await run.ended()

    async def _accepted(self, run: Run) -> dict[str, Any]:
        await run.accepted()
        position = self._services.supervisor.position(run)
        return {"run_id": run.run_id, **({"queued": position} if position else {})}

    async def _cancel_run(self, command: RunCancel) -> dict[str, Any]:
        check_id("run_id", command.run_id)
        run = self._services.supervisor.find(self._user_id, command.run_id)
        if run is not None and run.thread_id == self._thread_id:
            run.cancel(command.reason)
            if not command.wait:
                return {"run_id": run.run_id, "status": "cancelling"}
            outcome = await run.concluded()
            return {
                "run_id": run.run_id,
                "status": outcome.status,
                "receipt": outcome.receipt.to_dict(),
            }
        record = await self._past_run(command.run_id, "run.cancel")
        return {"run_id": record.run_id, "status": record.status, "receipt": record.receipt}

    async def _past_run(self, run_id: RunId, operation: str) -> RunRecord:
        """A run of this thread that is not live. Raises WireError."""
        record = await self._services.store.run(self._user_id, run_id)
        if record is None or record.thread_id != self._thread_id:
            # Asked after the reply: from here to its sending nobody else has a turn.
            self.look_up("run", run_id, operation)
            msg = "there is no such run on this thread"
            raise WireError(msg, code="no_such_run", id=None)
        return record

    async def _tree(self, command: TreeGet) -> dict[str, Any]:
        supervisor = self._services.supervisor
        if command.run_id is None:
            runs = supervisor.runs(self._user_id, self._thread_id)
            return {"tree": thread_node([run.tree() for run in runs])}
        check_id("run_id", command.run_id)
        run = supervisor.find(self._user_id, command.run_id)
        if run is not None and run.thread_id == self._thread_id:
            return {"tree": run_node(run.tree())}
        record = await self._past_run(command.run_id, "agent.getTree")
        return {"tree": run_node(RunTree.of_record(record))}

    async def _resume(self, command: RunStart) -> dict[str, Any]:
        (entry,) = command.resume
        return await self._respond(
            InputRespond(entry.interrupt_id, entry.payload, entry.status, command.run_id)
        )

    async def _respond(self, command: InputRespond) -> dict[str, Any]:
        segment = command.run_id or RunId(new_id())
        try:
            run = await self._services.supervisor.answer(
                self._user_id,
                self._thread_id,
                command.interrupt_id,
                command.response,
                declined=command.status == "cancelled",
                run_id=segment,
            )
        except NoSuchQuestionError:
            # Asked after the reply: from here to its sending nobody else has a turn.
            self.look_up("question", command.interrupt_id, "input.respond")
            raise
        if run is None:
            return {}
        # The id that its events carry from here on, and, where it was parked, its own.
        parent = {"parent_run_id": run.run_id} if segment != run.run_id else {}
        return {"run_id": segment, **parent}

    async def _state(self, command: StateGet) -> dict[str, Any]:
        if command.before is not None:
            check_id("before", command.before)
        # One at a time, and only once what was answered before is on its way: each may be
        # megabytes long, and who asks need not be one who reads.
        async with self._state_turn:
            await self._outbox.relieved()
            try:
                recalled = await recall(
                    self._services.store,
                    self._user_id,
                    self._thread_id,
                    limit=command.limit,
                    before=command.before,
                )
            except UnknownRunError:
                assert command.before is not None
                self.look_up("run", command.before, "state.get")  # as above
                raise
            interrupts = await open_interrupts(self._services.store, self._user_id, self._thread_id)
        return {**recalled.to_dict(), **interrupts}

    # --- the subscription

    def _subscribe(self, nursery: trio.Nursery, command_id: int, command: Subscribe) -> None:
        if self._subscription is not None:
            message = "this socket is subscribed already; unsubscribe first, or open another"
            self._reply(replies.error(command_id, "invalid_argument", message))
            return
        scope = trio.CancelScope()
        self._subscription = (new_connection_id(self._user_id), scope)
        nursery.start_soon(self._follow, command_id, command, self._subscription)

    def _unsubscribe(self, command_id: int, command: Unsubscribe) -> None:
        if self._subscription is None or self._subscription[0] != command.subscription_id:
            message = "there is no such subscription on this socket"
            self._reply(replies.error(command_id, "no_such_subscription", message))
            self._note_subscription(command.subscription_id)
            return
        self._subscription[1].cancel()
        self._reply(replies.success(command_id, {}))

    def _note_subscription(self, subscription_id: str) -> None:
        """Audit, after the reply, one that is another user's: its id says so itself."""
        try:
            foreign = not is_connection_of(subscription_id, self._user_id)
        except InvalidContextError:
            return  # no more than a mistake
        if foreign:
            self._services.audit.record_nowait(
                "connection_mismatch",
                user=self._user_id,
                resource="subscription",
                operation="subscription.unsubscribe",
                outcome="absent",
                correlation_id=self._correlation_id,
            )

    async def _follow(
        self,
        command_id: int,
        command: Subscribe,
        subscription: tuple[str, trio.CancelScope],
    ) -> None:
        """Send the thread's events as they become visible: the sender of this subscription."""
        subscription_id, scope = subscription
        journals = self._services.supervisor.journals
        answered = False
        try:
            with scope:
                async with journals.attached(self._user_id, self._thread_id) as journal:
                    self._check_owned(journal)
                    since, reset = start_of(journal, command)
                    result = {
                        "subscription_id": subscription_id,
                        "epoch": journal.epoch,
                        "since": since,
                        "replayed_events": journal.visible - since,
                        **({"reset": True} if reset else {}),
                    }
                    self._reply(replies.success(command_id, result))
                    answered = True
                    with journal.watchers.watching():
                        await self._send_events(journal, since, scope)
        except ThreadDeletedError as error:
            self._reply(replies.error(None, "no_such_thread", str(error)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the peer is gone, which the reader finds out by itself
        except Exception as error:  # noqa: BLE001  boundary: one command
            if not answered:
                await self._refuse(command_id, error, "subscribe")
                return
            self._note_mix_up(error, "subscribe")
            # Never a silent gap: the client comes back and resumes from what it has.
            _log.error("a subscription failed", exc_info=error)
            await _close(self._socket, codes.OUR_FAULT, "the event log cannot be read just now")
        finally:
            self._subscription = None
            self._caught_up = lambda: True
            self._progress.unpark_all()

    async def _send_events(
        self,
        journal: Journal,
        after: int,
        subscribed: trio.CancelScope,
    ) -> None:
        sent = after
        self._caught_up = lambda: sent >= journal.visible
        while True:
            entries = await journal.read(after=sent)
            self._check_owned(journal)
            for frames, last in in_parts(entries):
                if sent >= entries[0].seq:  # others get their turn between the parts of a replay
                    await trio.lowlevel.checkpoint()
                await self._outbox.relieved()
                if subscribed.cancel_called:
                    return  # woken before the unsubscribe, which has been answered meanwhile
                self._outbox.post(frames)
                sent = last
                self._progress.unpark_all()

    def _check_owned(self, journal: Journal) -> None:
        """The last of the layers that ask: what is shown here is this socket's user's."""
        if (journal.user_id, journal.thread_id) != (self._user_id, self._thread_id):
            msg = "a socket shows the thread of its own user only"
            raise IsolationError(
                msg,
                kind="user_mismatch",
                user=self._user_id,
                owner=journal.user_id,
                resource=f"thread {journal.thread_id}",
            )

    # --- the connection's own life

    async def _keep_alive(self, connection: trio.CancelScope) -> None:
        while True:
            await trio.sleep(PING_INTERVAL)
            try:
                with trio.fail_after(PING_INTERVAL):
                    await self._socket.ping()
            except (trio.TooSlowError, ConnectionClosed):
                connection.cancel()
                return

    async def _say_goodbye(self, connection: trio.CancelScope) -> None:
        await self._services.leaving.wait()
        with trio.move_on_after(_LAST_WORD_TIMEOUT):
            while not self._caught_up():
                await self._progress.park()
            await self._outbox.flushed()
        await _close(self._socket, codes.DRAINING, "the server is shutting down")
        connection.cancel()

    # --- what is told, and what of it is audited

    def look_up(self, kind: IdKind, id: str, operation: str) -> None:  # noqa: A002
        """Have it found out after the reply whether that id, which is absent, is another's."""
        lookups = self._services.lookups
        lookups.ask(kind, id, self._user_id, operation, correlation_id=self._correlation_id)

    async def _refuse(
        self,
        command_id: int | None,
        error: Exception,
        operation: str,
        *,
        kind: AuditKind | None = None,
        resource: str = "run",
    ) -> None:
        """Audit what is more than a mistake, then reply; `unavailable` if that cannot be.

        `kind` is for what the error itself does not tell. Waits for nothing else: what is to be
        looked up after the reply must find it sent.
        """
        self._note_mix_up(error, operation)
        if isinstance(error, WireError):
            kind, resource = error.kind, error.resource
        elif isinstance(error, InvalidContextError) and not isinstance(error, IsolationError):
            kind = "invalid_context"
        if kind is not None:
            try:
                await self._services.audit.record(
                    kind,
                    user=self._user_id,
                    resource=resource,
                    operation=operation,
                    outcome=str(error),
                    correlation_id=self._correlation_id,
                )
            except AuditUnavailableError as unavailable:
                error = unavailable
        self._reply_failure(command_id, error)

    def _note_mix_up(self, error: Exception, operation: str) -> None:
        note_mix_up(
            self._services.audit,
            error,
            operation,
            user=self._user_id,
            correlation_id=self._correlation_id,
        )

    def _reply(self, reply: bytes) -> None:
        try:
            self._outbox.post(text_frame(reply))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # nobody is there to be told; the reader ends the connection

    def _reply_failure(self, command_id: int | None, error: Exception) -> None:
        if isinstance(error, WireError):
            self._reply(replies.error(command_id, error.code, error.message))
            return
        if isinstance(error, UnknownRunError):
            self._reply(replies.error(command_id, "no_such_run", str(error)))
            return
        code = replies.code_of(error)
        if code is None:
            reference = self._correlation_id
            _log.error("a command failed", exc_info=error, extra={"correlation_id": reference})
            message = f"the server failed at this command; reference: {reference}"
            self._reply(replies.error(command_id, "unknown_error", message))
            return
        retry_after = getattr(error, "retry_after", None)
        self._reply(replies.error(command_id, code, str(error), retry_after=retry_after))


def _peer_of(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:  # it is gone already
        return "nobody any more"


async def _close(socket: WebSocketConnection, code: int, reason: str) -> None:
    with trio.move_on_after(_CLOSE_TIMEOUT, shield=True):
        await socket.aclose(code, reason)
