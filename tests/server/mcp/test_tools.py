"""What MCP says of tools and results, as creche has it."""

from __future__ import annotations

import re
from typing import Any

import mcp_types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from creche import ToolDefinitionError
from creche_server.mcp.tools import checker, closed, result_of, tool_name, tool_of

TEXT = mcp_types.TextContent(text="words")


class TestAName:
    @pytest.mark.parametrize(
        ("server", "name", "expected"),
        [
            ("time", "get_current_time", "time__get_current_time"),
            ("a-b_c", "Do-It", "a-b_c__Do-It"),
            ("s", "x" * 61, "s__" + "x" * 61),
        ],
    )
    def test_is_the_servers_and_its_own(self, server: str, name: str, expected: str) -> None:
        assert tool_name(server, name) == expected

    @given(server=st.from_regex(r"\A[a-z]{1,32}\Z"), name=st.text(max_size=200))
    def test_is_one_that_every_endpoint_takes(self, server: str, name: str) -> None:
        made = tool_name(server, name)
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", made)
        assert made.startswith(f"{server}__")

    @pytest.mark.parametrize(
        ("one", "other"), [("a.b", "a_b"), ("a.b", "a/b"), ("x" * 70, "x" * 71)]
    )
    def test_stays_its_own_when_it_is_mended(self, one: str, other: str) -> None:
        assert tool_name("s", one) != tool_name("s", other)


class TestASchema:
    @pytest.mark.parametrize(
        ("schema", "is_closed"),
        [
            ({"type": "object", "properties": {"a": {}}}, True),
            ({"type": "object"}, True),
            ({"type": "object", "additionalProperties": True}, False),
            ({"type": "object", "additionalProperties": {"type": "string"}}, False),
            ({"type": "object", "patternProperties": {"^x": {}}}, False),
            ({"type": "object", "allOf": [{"properties": {"b": {}}}]}, False),
            ({"$ref": "#/$defs/A", "$defs": {"A": {}}}, False),
        ],
    )
    def test_takes_no_properties_that_it_does_not_name(
        self, schema: dict[str, Any], is_closed: bool
    ) -> None:
        made = closed(schema)
        assert (made.get("additionalProperties") is False) == is_closed
        assert (checker("t", made)({"unknown": 1}) is not None) == (
            is_closed or schema.get("additionalProperties") == {"type": "string"}
        )

    def test_may_refer_to_its_own_parts_and_to_nothing_else(self) -> None:
        own = closed(
            {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
        )
        assert checker("t", own)({"a": 1}) is None
        assert checker("t", own)({"a": "1"}) == "'1' is not of type 'integer' - at `$.a`"
        far = closed({"properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}})
        assert checker("t", far)({"a": 1}) == "the schema refers to something that is not in it"

    def test_complains_in_few_words(self) -> None:
        check = checker("t", closed({"properties": {"a": {"type": "integer"}}}))
        complaint = check({"a": "x" * 100_000})
        assert complaint is not None
        assert len(complaint) < 400

    def test_that_is_none_makes_no_tool(self) -> None:
        async def call(arguments: dict[str, Any]) -> None: ...

        described = mcp_types.Tool(name="t", input_schema={"type": "object", "properties": 3})
        with pytest.raises(ToolDefinitionError, match="'s__t': its schema is none"):
            tool_of("s", described, call)


class TestAResult:
    @pytest.mark.parametrize(
        ("content", "structured", "expected"),
        [
            ([TEXT, TEXT], None, "words\nwords"),
            ([TEXT], {"a": 1}, "words"),
            ([], {"a": [1]}, '{"a":[1]}'),
            ([], [1, None], "[1,null]"),
            ([], None, ""),
            (
                [mcp_types.ImageContent(data="aGk=", mime_type="image/png"), TEXT],
                None,
                "[image of type image/png, not shown]\nwords",
            ),
            (
                [mcp_types.AudioContent(data="aGk=", mime_type="audio/wav")],
                {"a": 1},
                '[audio of type audio/wav, not shown]\n{"a":1}',
            ),
            (
                [mcp_types.ResourceLink(name="log", uri="file:///log")],
                None,
                "[resource log: file:///log]",
            ),
            (
                [
                    mcp_types.EmbeddedResource(
                        resource=mcp_types.TextResourceContents(uri="x://a", text="inside")
                    ),
                    mcp_types.EmbeddedResource(
                        resource=mcp_types.BlobResourceContents(uri="x://b", blob="aGk=")
                    ),
                ],
                None,
                "inside\n[resource x://b, binary, not shown]",
            ),
        ],
    )
    def test_is_text(self, content: list[Any], structured: Any, expected: str) -> None:
        result = mcp_types.CallToolResult(content=content, structured_content=structured)
        assert result_of(result) == expected
