"""Secrets are not shown: by their key in data, by their look in sentences."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creche import redact_text, redact_value
from creche._redaction import REDACTED, is_secret_key, redact_json

SECRET_KEYS = (
    "password",
    "Password",
    "passwd",
    "db_password",
    "secret",
    "client-secret",
    "clientSecret",
    "token",
    "accessToken",
    "access.token",
    "ID_TOKEN",
    "auth",
    "X-Auth-Token",
    "Authorization",
    "credential",
    "aws_credentials",
    "cookie",
    "Set-Cookie",
    "apikey",
    "APIKEY",
    "apiKey",
    "api_key",
    "API-KEY",
    "OPENAI_API_KEY",
    "privateKey",
    "private key",
    "accessKeyId",
    "aws.access.key",
    "token2",
    "APIkey",
    "accesskey",
)
PLAIN_KEYS = (
    "author",
    "authors",
    "monkey",
    "input_tokens",
    "max_tokens",
    "tokenizer",
    "secretary",
    "key",
    "primary_key",
    "keyApi",
    "access",
    "private",
    "api",
    "name",
    "",
    "cookies",
)


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_a_key_with_a_secret_word_is_secret(key: str) -> None:
    assert is_secret_key(key)
    assert redact_value({key: "x"}) == {key: REDACTED}


@pytest.mark.parametrize("key", PLAIN_KEYS)
def test_a_key_that_only_contains_its_letters_is_not(key: str) -> None:
    assert not is_secret_key(key)
    assert redact_value({key: "x"}) == {key: "x"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(SECRET_KEYS), inner)
    ),
    max_leaves=15,
)


def under_secret_keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        own = [item for key, item in value.items() if is_secret_key(key)]
        return own + [x for item in value.values() for x in under_secret_keys(item)]
    return [x for item in value for x in under_secret_keys(item)] if isinstance(value, list) else []


def without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        items = value.items()
        return {key: without_secrets(item) for key, item in items if not is_secret_key(key)}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_any_data_keeps_all_but_its_secrets(value: Any) -> None:
    before = copy.deepcopy(value)
    shown = redact_value(value)
    assert value == before
    assert all(item == REDACTED for item in under_secret_keys(shown))
    assert without_secrets(shown) == without_secrets(value)


def test_whatever_is_under_a_secret_key_goes_as_a_whole() -> None:
    assert redact_value({"auth": {"user": "ada", "pin": [1, 2]}}) == {"auth": REDACTED}


CREDENTIALS = (
    "postgresql://ada:hunter2@db:5432/x refused",
    "redis://:hunter2@cache:6379/0 timed out",
    "amqp://ada:hun%2Fter2-hunter2@mq",
    "GET failed: Authorization: Bearer hunter2hunter2",
    "authorization: basic aHVudGVyMg==hunter2",
    "password=hunter2",
    "authorization=hunter2",
    "auth: hunter2",
    "cookie: hunter2",
    "credentials='hunter2'",
    "password: hunter2, user: ada",
    "api_key = 'hunter2'",
    'token="hunter2 with blanks"',
    "?access_key=hunter2",
    "OPENAI_API_KEY=hunter2 is not set",
    "DB_PASSWORD=hunter2",
    "bad options {'password': 'hunter2', 'port': 1}",
    'bad body {"api_key": "hunter2"}',
    "no such key: sk-hunter2hunter2",
    "ghp_hunter2hunter2 is revoked",
    "{'password_hash': 'hunter2'}",
    "{'tokenValue': 'hunter2'}",
    "{'x-auth-id': 'hunter2'}",
    "{'api.key': 'hunter2'}",
    "{'secret': {'v': ('hunter2', 'hunter2')}}",
    "{'password': ['u', 'hunter2']}",
    "client_secret_id: 'hunter2'",
    r"'password': 'a\' hunter2'",
    r"said \"access_token\":\"hunter2\" and left",
    "dbpassword=hunter2;port=1",
    "APIkey: hunter2",
    "token='hunter2 that is not closed",
    "secret=(1, {'a': 'hunter2', 'b': [hunter2",
)


@pytest.mark.parametrize("text", CREDENTIALS)
def test_a_credential_in_a_sentence_is_not_shown(text: str) -> None:
    assert "hunter2" not in redact_text(text)
    assert REDACTED in redact_text(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{'password': 'x', 'port': 1}", "{'password': [redacted], 'port': 1}"),
        ('Found: {"token": {"a": [1, "]"]}} in 3 ms', 'Found: {"token": [redacted]} in 3 ms'),
        (r"'password': 'a\' b' tail", "'password': [redacted] tail"),
        ("call(secret=(1, f(2)), user='ada')", "call(secret=[redacted], user='ada')"),
        ("Authorization: Bearer abcdefgh, ok", "Authorization: Bearer [redacted], ok"),
    ],
)
def test_what_follows_a_secret_stays(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert redact_json(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"password": "x", "n": 1}', '{"password":"[redacted]","n":1}'),
        (
            r'{"body": "{\"access_token\":\"x\"}"}',
            r'{"body":"{\"access_token\":\"[redacted]\"}"}',
        ),
        ("[\"{'token': 1}\"]", "[\"{'token': [redacted]}\"]"),
        ("the token is missing", "the token is missing"),
        ('{"author": "ada",  "n": 1}', '{"author": "ada",  "n": 1}'),
        ("/home/ada is a path, not a secret", "/home/ada is a path, not a secret"),
    ],
)
def test_a_result_is_looked_into_whatever_it_is(text: str, shown: str) -> None:
    assert redact_json(text) == shown


@pytest.mark.parametrize(
    "piece",
    ["a", "ab=c ", "token: {", "\\", '"', "a.b-c_", "password:'", "token:\\'", "x:", "secret=["],
)
def test_a_long_text_takes_a_time_in_proportion(piece: str) -> None:
    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        begun = time.process_time()
        redact_text(text)
        return time.process_time() - begun

    assert seconds(160_000) < 0.05 + 30 * seconds(16_000)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/notes.txt: not found", "~/notes.txt: not found"),
        ("open '/Users/ada/x y.txt'", "open '~/x y.txt'"),
        ("/home/ann/.ssh/id", "~/.ssh/id"),
        ("the home /root is full", "the home ~ is full"),
        (r"C:\Users\ada\x.txt", r"~\x.txt"),
        ('File "/home/ada/app.py", line 7', 'File "~/app.py", line 7'),
        ("PATH=/usr/bin:/home/ada/bin", "PATH=/usr/bin:~/bin"),
        ("file:///home/ada/x", "file://~/x"),
        ("gcc -I/home/ada/include", "gcc -I~/include"),
        (r"'one\n/home/ada/x'", r"'one\n~/x'"),
        ("/var/home/ada/x and /mnt/c/Users/ada/x", "~/x and ~/x"),
        ("/home/ada/home/page.html", "~/home/page.html"),
    ],
    ids=range(12),
)
def test_a_home_path_does_not_say_whose(text: str, shown: str) -> None:
    assert redact_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: the author has 7 input_tokens",
        "see https://example.com/a/b?c=d",
        "the token is missing",
        "division by zero",
        "the homepage /homepage is fine",
        "/tmp/x/home/y is no home, and src/home/page.js is none",
        "https://example.com/home/news and /srv/Users/list",
        "/x/root is none",
    ],
)
def test_other_sentences_stay_as_they_are(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("text", CREDENTIALS)
def test_a_sentence_that_is_redacted_twice_is_the_same(text: str) -> None:
    """An error passes more than one place where that is done."""
    assert redact_text(redact_text(text)) == redact_text(text)


@given(st.text())
def test_any_text_can_be_redacted_twice_to_the_same(text: str) -> None:
    once = redact_text(text)
    assert redact_text(once) == once
