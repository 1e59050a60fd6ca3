"""Flags before environment before `creche.toml` before defaults."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest
from tests.server.running import MISLEADING

from creche import Limits
from creche_server.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no creche.toml is, unless a test writes one."""
    monkeypatch.chdir(tmp_path)


def test_without_any_configuration_there_are_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "local")
    assert settings.data == Path(".creche")
    assert settings.database_url == "sqlite:///.creche/creche.db"
    assert settings.limits == Limits()


def test_a_flag_beats_the_environment_which_beats_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("creche.toml").write_text('port = 1\nhost = "file"\nuser = "file"\n')
    monkeypatch.setenv("CRECHE_PORT", "2")
    monkeypatch.setenv("CRECHE_HOST", "environment")
    settings = load_settings(port=3, host=None)
    assert (settings.port, settings.host, settings.user) == (3, "environment", "file")


def test_a_flag_of_zero_is_a_flag() -> None:
    assert load_settings(port=0).port == 0


def test_every_limit_that_can_be_set_arrives() -> None:
    settings = load_settings(
        run_timeout=1,
        tool_timeout=2,
        cleanup_timeout=3,
        runs_per_user=4,
        runs_per_thread=5,
        approval_timeout=6,
    )
    limits = settings.limits
    assert (limits.run_timeout, limits.tool_timeout, limits.cleanup_timeout) == (1, 2, 3)
    assert (limits.runs_per_user, limits.runs_per_thread) == (4, 5)
    assert limits.approval_timeout == 6


def test_a_database_url_is_taken_as_it_is() -> None:
    url = "postgresql://u:p@h/d"
    assert load_settings(database=url).database_url == url


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("port", "x"),
        ("shutdown_timeout", 0),
        ("shutdown_timeout", -1),
        ("max_connections", 0),
        ("max_connections_per_user", 0),
        ("runs_per_user", 0),
        ("log_level", "loud"),
        ("no_such_setting", 1),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(flag: str, value: object) -> None:
    with pytest.raises(pydantic.ValidationError) as info:
        load_settings(**{flag: value})
    assert info.value.errors()[0]["loc"] == (flag,)


def test_a_name_that_there_is_none_of_is_refused_in_the_file() -> None:
    Path("creche.toml").write_text("prot = 8001\n")
    with pytest.raises(pydantic.ValidationError, match="prot"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("", ()),
        ("https://a.example", ("https://a.example",)),
        ("https://a.example/", ("https://a.example",)),
        (
            " https://A.example:8443 ,http://b.example/, ",
            ("https://a.example:8443", "http://b.example"),
        ),
    ],
)
def test_origins_come_in_a_row_as_browsers_send_them(
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    origins: tuple[str, ...],
) -> None:
    monkeypatch.setenv("CRECHE_ORIGINS", text)
    assert load_settings().origins == origins


@pytest.mark.parametrize("text", ["*", "a.example", "https://", "https://a/b", "https://a?b"])
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="no origin"):
        load_settings(origins=["https://fine.example", text])


@pytest.mark.parametrize(
    ("text", "operators"), [("", ()), ("olga", ("olga",)), (" olga ,otto, ", ("olga", "otto"))]
)
def test_operators_come_in_a_row(
    monkeypatch: pytest.MonkeyPatch, text: str, operators: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CRECHE_OPERATORS", text)
    assert load_settings().operators == operators


@pytest.mark.parametrize("user", ["", " ", "none", *MISLEADING], ids=ascii)
def test_an_operator_that_can_be_no_user_is_refused(user: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        load_settings(operators=["olga", user])


@pytest.mark.parametrize("user", ["", " ", "none", *MISLEADING], ids=ascii)
def test_a_user_that_can_be_none_is_refused(user: str) -> None:
    """Else the server starts, and its own link fails."""
    with pytest.raises(pydantic.ValidationError):
        load_settings(user=user)


def test_settings_do_not_change() -> None:
    with pytest.raises(pydantic.ValidationError):
        Settings().port = 1


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318"),
        ("https://otel.example.com/tenant", "https://otel.example.com/tenant"),
        ("https://otel.example.com/v1/traces", "https://otel.example.com"),
    ],
)
def test_a_collectors_url_is_its_base(said: str, kept: str) -> None:
    assert load_settings(otlp_endpoint=said).otlp_endpoint == kept


@pytest.mark.parametrize(
    "said",
    [
        "collector:4318",
        "grpc://c:4317",
        "http://",
        "http://ada:pw@c",
        "http://c?key=x",
        "http://c:x",
    ],
)
def test_a_collectors_url_is_plain(said: str) -> None:
    with pytest.raises(pydantic.ValidationError) as info:
        load_settings(otlp_endpoint=said)
    assert info.value.errors()[0]["loc"] == ("otlp_endpoint",)
