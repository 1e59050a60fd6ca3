"""`creche chat`: a question, or a conversation until its reader leaves."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import trio

from creche import CrecheError, leaves, new_id
from creche_server.addresses import check_thread_id
from creche_server.cli.api import Api, ClientError, open_api, running_server
from creche_server.cli.conversation import Conversation
from creche_server.cli.endings import EXIT_FAILED, EXIT_STOPPED
from creche_server.cli.screen import Screen
from creche_server.data_directory import DataDirectoryError

_EXIT_MISUSED = 2


def chat(
    data: Path,
    question: str | None,
    *,
    thread: str | None,
    last: bool,
    agent: str | None,
    user: str | None,
) -> int:
    """Ask once, or talk until the input ends. Returns the exit code.

    Who goes on talking on a thread is shown what was said on it; who asks once gets the answer.
    """
    if question is not None and not question.strip():
        return _refused("there is nothing to ask: the question is empty")
    if last and thread is not None:
        return _refused("--last and --thread are two ways to name one thread; use one of them")
    code = EXIT_FAILED
    try:
        if thread is not None:
            check_thread_id(thread)
        api = open_api(data, user)
        if last:
            thread = trio.run(_latest_thread, api)
        conversation = Conversation(
            api,
            Screen(),
            thread_id=thread or new_id(),
            agent=agent or running_server(data).agents[0],
        )
        if question is not None:
            code = _ask_once(conversation, question, goes_on=thread is not None)
        else:
            if thread is not None:
                trio.run(conversation.show_history)
                trio.run(conversation.answer_what_waits)
            code = _talk(conversation)
    except* (CrecheError, DataDirectoryError, OSError) as errors:
        _tell(errors)
    except* KeyboardInterrupt:
        code = EXIT_STOPPED
    return code


def _refused(sentence: str) -> int:
    sys.stderr.write(f"creche: {sentence}\n")
    return _EXIT_MISUSED


def _tell(errors: BaseException) -> None:
    sys.stdout.flush()
    for error in leaves(errors):
        sys.stderr.write(f"creche: {error}\n")


async def _latest_thread(api: Api) -> str:
    """The user's thread that was last changed. Raises ClientError where there is none."""
    threads = await api.get("threads", limit=1)
    if not threads:
        msg = "there is no thread yet; ask without --last"
        raise ClientError(msg)
    return str(threads[0]["thread_id"])


def _ask_once(conversation: Conversation, question: str, *, goes_on: bool) -> int:
    try:
        return trio.run(partial(conversation.ask, question, goes_on=goes_on))
    finally:
        if conversation.begun and sys.stdout.isatty():
            conversation.note_how_to_go_on()


def _talk(conversation: Conversation) -> int:
    """Question and answer, until ^D, or a ^C where nothing is typed.

    Between questions no connection is held: the prompt may wait for hours. A question that
    fails is told of, and the next one may be asked.
    """
    code = 0
    conversation.note_the_beginning()
    while (question := _read_question()) is not None:
        if question:
            code = EXIT_FAILED
            try:
                code = trio.run(conversation.ask, question)
            except* (CrecheError, OSError) as errors:
                _tell(errors)
            except* KeyboardInterrupt:
                code = EXIT_STOPPED
    conversation.note_how_to_go_on()
    return code


def _read_question() -> str | None:
    """What is typed next, empty if it was thrown away, None at the end."""
    if not sys.stdin.isatty():
        try:
            return input().strip()
        except (EOFError, KeyboardInterrupt):
            return None
    import readline  # noqa: PLC0415  gives `input` editing and recall

    try:
        return input("\nyou> ").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        return "" if readline.get_line_buffer() else None
