"""Commands, decoded without any I/O: a struct or an error that can be sent back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.running import MISLEADING

from creche_server.wire.commands import (
    COMMANDS,
    InputMessage,
    RunCancel,
    RunStart,
    StateGet,
    Subscribe,
    TreeGet,
    Unsubscribe,
    WireError,
    decode_command,
)

ASKED = {"input": {"messages": [{"content": "hello"}]}}


def frame(method: str, params: Any = None, number: Any = 7) -> str:
    return json.dumps({"id": number, "method": method, "params": {} if params is None else params})


def problem(text: str | bytes) -> WireError:
    with pytest.raises(WireError) as info:
        decode_command(text)
    assert info.value.message
    return info.value


class TestAGoodCommand:
    @pytest.mark.parametrize(
        ("method", "params", "command"),
        [
            ("subscription.subscribe", {}, Subscribe()),
            (
                "subscription.subscribe",
                {"since": 5, "epoch": "e", "channels": ["messages"]},
                Subscribe(channels=("messages",), since=5, epoch="e"),
            ),
            ("subscription.subscribe", {"epoch": None}, Subscribe()),
            ("subscription.unsubscribe", {"subscription_id": "s"}, Unsubscribe("s")),
            ("run.cancel", {"run_id": "r"}, RunCancel(run_id="r")),  # type: ignore[arg-type]
            (
                "run.cancel",
                {"run_id": "r", "wait": True, "reason": "user"},
                RunCancel(run_id="r", wait=True),  # type: ignore[arg-type]
            ),
            ("agent.getTree", {}, TreeGet()),
            ("agent.getTree", {"run_id": "r"}, TreeGet(run_id="r")),  # type: ignore[arg-type]
            ("state.get", {}, StateGet()),
            ("state.get", {"namespaces": [], "of": "a newer client"}, StateGet()),
        ],
    )
    def test_becomes_its_struct(self, method: str, params: dict[str, Any], command: Any) -> None:
        assert decode_command(frame(method, params)) == (7, command)

    def test_needs_no_params_where_all_have_defaults(self) -> None:
        assert decode_command('{"id":1,"method":"state.get"}') == (1, StateGet())

    def test_to_start_a_run_is_for_the_assistant_unless_it_says_so(self) -> None:
        _, command = decode_command(frame("run.start", ASKED))
        assert isinstance(command, RunStart)
        assert (command.assistant_id, command.multitask_strategy) == ("assistant", "enqueue")
        assert command.input.messages == (InputMessage("hello"),)

    @pytest.mark.parametrize("strategy", ["enqueue", "reject", "interrupt", "rollback"])
    def test_says_what_becomes_of_what_runs_already(self, strategy: str) -> None:
        _, command = decode_command(frame("run.start", {**ASKED, "multitask_strategy": strategy}))
        assert isinstance(command, RunStart)
        assert command.multitask_strategy == strategy

    @given(
        st.text(),
        st.none() | st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=256),
    )
    def test_keeps_the_words_and_the_id_of_a_message(self, words: str, name: str | None) -> None:
        try:
            words.encode()
        except UnicodeEncodeError:
            return
        message = {"role": "user", "content": words, **({"id": name} if name else {})}
        _, command = decode_command(frame("run.start", {"input": {"messages": [message]}}))
        assert isinstance(command, RunStart)
        said = command.input.messages[0].to_message()
        assert said.content == words
        assert said.id == name if name else len(said.id) == 32

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
    def test_joins_the_parts_of_a_message(self, parts: list[str]) -> None:
        content = [{"type": "text", "text": part} for part in parts]
        params = {"input": {"messages": [{"content": content}]}}
        _, command = decode_command(frame("run.start", params))
        assert isinstance(command, RunStart)
        assert command.input.messages[0].to_message().content == "".join(parts)


class TestABadCommand:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("", None),
            ("nonsense", None),
            ("[1]", None),
            ("7", None),
            ("{}", None),
            ('{"id": 7}', 7),
            ('{"id": 7.5, "method": "state.get"}', None),
            ('{"id": null, "method": "state.get"}', None),
            ('{"id": 7, "method": null}', 7),
            ('{"id": 7, "method": "state.get", "params": null}', 7),
            ('{"id": 7, "method": "state.get", "params": {}} x', None),
            ('{"id": 7, "method": "state.get", "params": {"a": }}', None),
            ('{"id": 7, "method": "state.get\ud800"}', None),
        ],
    )
    def test_is_told_with_its_id_where_that_can_be_read(
        self,
        text: str,
        number: int | None,
    ) -> None:
        told = problem(text)
        assert (told.code, told.id) == ("invalid_argument", number)

    @pytest.mark.parametrize(
        ("method", "params"),
        [
            ("run.start", {}),
            ("run.start", {"input": None}),
            ("run.start", {"input": {}}),
            ("run.start", {"input": {"messages": []}}),
            ("run.start", {"input": {"messages": {}}}),
            ("run.start", {"input": {"messages": ["hello"]}}),
            ("run.start", {"input": {"messages": [{"role": "user"}]}}),
            ("run.start", {"input": {"messages": [{"role": "system", "content": "x"}]}}),
            ("run.start", {"input": {"messages": [{"role": "assistant", "content": "x"}]}}),
            ("run.start", {"input": {"messages": [{"role": "tool", "content": "x"}]}}),
            ("run.start", {"input": {"messages": [{"content": 5}]}}),
            ("run.start", {"input": {"messages": [{"content": [{"type": "image"}]}]}}),
            *(
                ("run.start", {"input": {"messages": [{"content": "x", "id": each}]}})
                for each in ("", "x" * 257, *MISLEADING)
            ),
            ("run.start", {**ASKED, "assistant_id": 5}),
            ("run.start", {**ASKED, "metadata": []}),
            ("run.start", {**ASKED, "multitask_strategy": "queue"}),
            ("run.start", {**ASKED, "multitask_strategy": None}),
            ("run.start", {**ASKED, "on_disconnect": "stop"}),
            ("run.start", {**ASKED, "on_disconnect": "cancel", "disconnect_grace": -1}),
            ("run.start", {**ASKED, "on_disconnect": "cancel", "disconnect_grace": "1"}),
            ("run.start", {**ASKED, "on_disconnect": "cancel", "disconnect_grace": 1e9}),
            ("run.cancel", {}),
            ("run.cancel", {"run_id": None}),
            ("run.cancel", {"run_id": "r", "wait": "yes"}),
            ("run.cancel", {"run_id": "r", "wait": 1}),
            ("run.cancel", {"run_id": "r", "reason": "shutdown"}),
            ("subscription.subscribe", {"since": -1}),
            ("subscription.subscribe", {"since": 1.5}),
            ("subscription.subscribe", {"since": None}),
            ("subscription.subscribe", {"channels": "messages"}),
            ("subscription.unsubscribe", {}),
        ],
    )
    def test_is_told_what_is_wrong_with_it(self, method: str, params: dict[str, Any]) -> None:
        told = problem(frame(method, params))
        assert (told.code, told.id) == ("invalid_argument", 7)
        assert told.message.startswith(f"{method}: ")

    def test_that_there_is_none_of_is_told_which_there_are(self) -> None:
        told = problem(frame("x" * 10_000))
        assert (told.code, told.id) == ("unknown_command", 7)
        assert all(name in told.message for name in COMMANDS)
        assert len(told.message) < 400

    @pytest.mark.parametrize("data", [b"", b"{}", frame("state.get").encode()])
    def test_in_a_binary_frame_is_told_so(self, data: bytes) -> None:
        told = problem(data)
        assert (told.code, told.id) == ("invalid_argument", None)
        assert "binary" in told.message

    @pytest.mark.parametrize("depth", [1_000, 10_000, 200_000])
    @pytest.mark.parametrize("place", ["params", "frame", "metadata"])
    def test_that_is_too_deep_is_told_so(self, depth: int, place: str) -> None:
        deep = "[" * depth + "]" * depth
        text = {
            "frame": deep,
            "params": f'{{"id":7,"method":"run.start","params":{deep}}}',
            "metadata": frame("run.start", ASKED)[:-2] + f', "metadata": {{"a": {deep}}}}}}}',
        }[place]
        try:
            decode_command(text)
        except WireError as told:
            assert told.code == "invalid_argument"

    @given(st.text())
    def test_of_any_text_is_told(self, text: str) -> None:
        problem(text)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        ),
        st.sampled_from([*COMMANDS, "x"]),
    )
    def test_with_any_params_is_a_struct_or_told(self, params: Any, method: str) -> None:
        try:
            number, command = decode_command(frame(method, params))
        except WireError as told:
            assert told.code in {"invalid_argument", "unknown_command"}
        else:
            assert number == 7
            assert isinstance(command, COMMANDS[method])


def test_commands_cannot_be_changed() -> None:
    for kind in COMMANDS.values():
        assert kind.__struct_config__.frozen
    assert issubclass(Subscribe, msgspec.Struct)
    with pytest.raises(TypeError):
        COMMANDS["x"] = StateGet  # type: ignore[index]
