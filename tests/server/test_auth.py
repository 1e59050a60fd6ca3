"""Who may come in: tokens, tickets, sessions, origins, alone and through the server."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.running import MISLEADING, Server, open_server

from creche import InvalidContextError, UserId
from creche_server.auth import TOKEN_PREFIX, Auth, NotAuthenticatedError, Purpose
from creche_server.data_directory import load_key

KEY = b"k" * 32
ADA = UserId("ada")


def bearer(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"Authorization", f"Bearer {token}".encode("latin-1"))]


class TestTokens:
    @given(st.text(min_size=1, max_size=40))
    def test_speak_for_the_user_that_they_were_made_for(self, user: str) -> None:
        auth = Auth(KEY)
        try:
            token = auth.mint_token(user, seconds=60)
        except InvalidContextError:
            return
        assert Auth(KEY).check_token(token) == user
        assert token.startswith(TOKEN_PREFIX)
        assert token.isascii()

    @pytest.mark.parametrize("user", ["", " ", "none", "x" * 257, *MISLEADING], ids=ascii)
    def test_are_not_made_for_nobody(self, user: str) -> None:
        with pytest.raises(InvalidContextError):
            Auth(KEY).mint_token(user, seconds=60)

    @pytest.mark.parametrize("seconds", [-1, -1e9])
    def test_expire(self, seconds: float) -> None:
        with pytest.raises(NotAuthenticatedError, match="expired"):
            Auth(KEY).check_token(Auth(KEY).mint_token("ada", seconds=seconds))

    def test_of_another_key_are_none(self) -> None:
        token = Auth(b"o" * 32).mint_token("ada", seconds=60)
        with pytest.raises(NotAuthenticatedError):
            Auth(KEY).check_token(token)

    def test_with_any_character_changed_are_none(self) -> None:
        auth = Auth(KEY)
        token = auth.mint_token("ada", seconds=60)
        for position in range(len(token)):
            other = "A" if token[position] != "A" else "B"
            changed = token[:position] + other + token[position + 1 :]
            try:
                user = auth.check_token(changed)
            except NotAuthenticatedError:
                continue
            # The last character of base64 has bits that mean nothing.
            assert (user, position) == ("ada", len(token) - 1)

    @given(st.text(max_size=60), st.text(max_size=60))
    def test_that_were_never_made_are_none(self, before: str, after: str) -> None:
        canary = "cAnArY-7f3a"  # which is in none of our sentences, as any words of theirs may be
        for token in (before + after, before + canary + after):
            for text in (token, TOKEN_PREFIX + token):
                with pytest.raises(NotAuthenticatedError) as info:
                    Auth(KEY).check_token(text)
                assert canary not in str(info.value)

    def test_are_no_sessions_and_sessions_are_no_tokens(self) -> None:
        auth = Auth(KEY)
        session = auth.mint_session(ADA)
        assert auth.check_session(session) == ADA
        with pytest.raises(NotAuthenticatedError):
            auth.check_token(session)
        with pytest.raises(NotAuthenticatedError):
            auth.check_token(TOKEN_PREFIX + session)
        with pytest.raises(NotAuthenticatedError):
            auth.check_session(auth.mint_token("ada", seconds=60).removeprefix(TOKEN_PREFIX))

    @pytest.mark.parametrize(
        "header",
        ["", "Bearer", "Bearer ", "Basic {}", "{}", "Bearer{}", "Token {}", "Bearer x {}"],
    )
    def test_come_in_a_bearer_header(self, header: str) -> None:
        auth = Auth(KEY)
        token = auth.mint_token("ada", seconds=60)
        with pytest.raises(NotAuthenticatedError):
            auth.check_authorization(header.format(token))
        for spelling in ("Bearer {}", "bearer {}", "BEARER   {} "):
            assert auth.check_authorization(spelling.format(token)) == ADA


class TestTickets:
    def test_are_good_once(self) -> None:
        auth = Auth(KEY)
        ticket, seconds = auth.mint_ticket(ADA, "websocket")
        assert seconds == 30
        assert auth.use_ticket(ticket, "websocket") == ADA
        with pytest.raises(NotAuthenticatedError):
            auth.use_ticket(ticket, "websocket")

    @pytest.mark.parametrize(("purpose", "seconds"), [("websocket", 30), ("page", 600)])
    def test_expire(
        self,
        monkeypatch: pytest.MonkeyPatch,
        purpose: Purpose,
        seconds: int,
    ) -> None:
        auth, now = Auth(KEY), time.time()
        monkeypatch.setattr(time, "time", lambda: now)
        in_time, too_late = (auth.mint_ticket(ADA, purpose)[0] for _ in range(2))
        now += seconds - 0.001
        assert auth.use_ticket(in_time, purpose) == ADA
        now += 0.001
        with pytest.raises(NotAuthenticatedError):
            auth.use_ticket(too_late, purpose)

    def test_are_good_for_one_purpose_and_gone_after_the_wrong_one(self) -> None:
        auth = Auth(KEY)
        ticket, seconds = auth.mint_ticket(ADA, "page")
        assert seconds == 600
        with pytest.raises(NotAuthenticatedError):
            auth.use_ticket(ticket, "websocket")
        with pytest.raises(NotAuthenticatedError):
            auth.use_ticket(ticket, "page")

    def test_never_repeat(self) -> None:
        auth = Auth(KEY)
        assert len({auth.mint_ticket(ADA, "websocket")[0] for _ in range(1000)}) == 1000

    def test_in_a_flood_stay_bounded_and_the_newest_are_good(self) -> None:
        auth = Auth(KEY)
        tickets = [auth.mint_ticket(ADA, "websocket")[0] for _ in range(10_100)]
        assert len(auth._tickets) <= 10_000
        assert auth.use_ticket(tickets[-1], "websocket") == ADA
        with pytest.raises(NotAuthenticatedError):
            auth.use_ticket(tickets[0], "websocket")

    def test_cost_little_however_many_there_are(self) -> None:
        """Minting is done on the event loop, by anybody who has logged in."""
        auth = Auth(KEY)

        def cost() -> float:
            began = time.process_time()
            for _ in range(200):
                auth.mint_ticket(ADA, "websocket")
            return time.process_time() - began

        first = min(cost() for _ in range(3))
        for _ in range(20):
            cost()
        assert min(cost() for _ in range(3)) < 8 * first

    def test_of_one_user_in_a_flood_do_not_cost_another_theirs(self) -> None:
        auth = Auth(KEY)
        bobs, _ = auth.mint_ticket(UserId("bob"), "page")
        for _ in range(10_001):  # as many as there may be at all
            auth.mint_ticket(ADA, "websocket")
        assert auth.use_ticket(bobs, "page") == "bob"


class TestOrigins:
    @pytest.mark.parametrize(
        ("origin", "host", "allowed"),
        [
            (None, "127.0.0.1:8000", True),
            ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
            ("https://chat.example.com", "chat.example.com", True),
            ("HTTP://LOCALHOST:8000", "localhost:8000", True),
            ("https://app.example.com", "127.0.0.1:8000", True),
            ("http://127.0.0.1:8001", "127.0.0.1:8000", False),
            ("http://evil.example", "127.0.0.1:8000", False),
            ("https://app.example.com.evil.example", "127.0.0.1:8000", False),
            ("http://127.0.0.1:8000.evil.example", "127.0.0.1:8000", False),
            ("http://127.0.0.1:8000@evil.example", "127.0.0.1:8000", False),
            ("null", "127.0.0.1:8000", False),
            ("", "127.0.0.1:8000", False),
            ("null", "", False),
            ("", "", False),
            ("null", None, False),
            ("http://[", "127.0.0.1:8000", False),
            ("http://x]", "x]", False),
            ("file://", "127.0.0.1:8000", False),
        ],
    )
    def test_are_ours_or_those_that_we_were_told_of(
        self,
        origin: str | None,
        host: str | None,
        allowed: bool,
    ) -> None:
        auth = Auth(KEY, origins=["https://app.example.com"])
        assert auth.allows_origin(origin, host) is allowed


class TestAWebSocket:
    async def test_without_a_good_token_is_closed_with_4401(
        self,
        server: Server,
        complaints: list[str],
    ) -> None:
        for headers in (
            [],
            bearer("nonsense"),
            bearer("creche_nonsense"),
            bearer("creche_\xe9"),
            [(b"Authorization", b"")],
            [(b"Authorization", b"Basic YTpi")],
            [(b"Cookie", f"{server.auth.session_cookie}=x".encode())],
        ):
            async with server.chat(headers=headers) as chat:
                code, reason = await chat.end()
                assert code == 4401, headers
                assert reason, headers
                assert chat.frames == []

    async def test_with_an_expired_token_is_told_so(self, server: Server) -> None:
        async with server.chat(headers=bearer(server.token(seconds=-1))) as chat:
            assert await chat.end() == (4401, "the bearer token has expired")

    async def test_with_a_session_cookie_alone_is_refused(self, server: Server) -> None:
        """A cookie travels by itself, with whatever page opens the socket."""
        auth = server.auth
        cookie = f"{auth.session_cookie}={auth.mint_session(ADA)}".encode()
        async with server.chat(headers=[(b"Cookie", cookie)]) as chat:
            assert (await chat.end())[0] == 4401

    @pytest.mark.parametrize("origin", [b"http://evil.example", b"null", b"http://[", b""])
    async def test_from_another_page_is_closed_with_4403(
        self,
        server: Server,
        complaints: list[str],
        origin: bytes,
    ) -> None:
        headers = [*bearer(server.token()), (b"Origin", origin)]
        async with server.chat(headers=headers) as chat:
            assert (await chat.end())[0] == 4403

    async def test_from_a_page_that_we_were_told_of_is_taken(self, tmp_path: Path) -> None:
        async with open_server(tmp_path, origins=["https://app.example.com"]) as server:
            for origin in (b"https://app.example.com", server.url.encode()):
                headers = [*bearer(server.token()), (b"Origin", origin)]
                async with server.chat(headers=headers) as chat:
                    await chat.ask("state.get")

    async def test_comes_in_by_a_ticket_once(self, server: Server) -> None:
        async with server.http() as http:
            minted = await http.post("/auth/tickets")
            assert minted.status_code == 201
            assert minted.json()["expires_in"] == 30
        path = f"/threads/t/stream?ticket={minted.json()['ticket']}"
        async with server.chat(headers=[], path=path) as chat:
            await chat.ask("state.get")
        async with server.chat(headers=[], path=path) as chat:
            assert (await chat.end())[0] == 4401

    async def test_by_a_ticket_is_its_users(self, server: Server) -> None:
        async with server.chat(user="bob") as bob, server.http("bob") as http:
            await bob.subscribe()
            await bob.run("tokens=1 said by bob")
            ticket = (await http.post("/auth/tickets", json={"purpose": "websocket"})).json()
        path = f"/threads/thread-a/stream?ticket={ticket['ticket']}"
        async with server.chat(headers=[], path=path) as chat:
            state = await chat.ask("state.get")
            assert "said by bob" in state["values"]["messages"][0]["content"]

    async def test_does_not_come_in_by_the_pages_ticket(self, server: Server) -> None:
        async with server.http() as http:
            ticket = (await http.post("/auth/tickets", json={"purpose": "page"})).json()["ticket"]
        path = f"/threads/t/stream?ticket={ticket}"
        async with server.chat(headers=[], path=path) as chat:
            assert (await chat.end())[0] == 4401


class TestHttp:
    async def test_is_for_those_with_a_token(self, server: Server) -> None:
        expired = {"Authorization": f"Bearer {server.token(seconds=-1)}"}
        async with server.http(None) as http:
            for method, path in (
                ("GET", "/threads"),
                ("POST", "/threads"),
                ("GET", "/threads/x"),
                ("DELETE", "/threads/x"),
                ("GET", "/threads/x/state"),
                ("GET", "/threads/x/history"),
                ("POST", "/agents/search"),
                ("GET", "/agents/assistant"),
                ("POST", "/auth/tickets"),
            ):
                for headers in ({}, {"Authorization": "Bearer nonsense"}, expired):
                    answer = await http.request(method, path, headers=headers)
                    assert answer.status_code == 401, path
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json()["error"] == "unauthenticated"

    async def test_gives_no_ticket_for_a_purpose_that_there_is_none_of(
        self,
        server: Server,
    ) -> None:
        async with server.http() as http:
            for body in (b"{", b'{"purpose":"root"}', b'{"purpose":"page","x":1}'):
                assert (await http.post("/auth/tickets", content=body)).status_code == 422

    async def test_asks_who_it_is_before_it_reads_what_is_wanted(self, server: Server) -> None:
        async with server.http(None) as http:
            for path in ("/auth/tickets", "/threads"):
                assert (await http.post(path, content=b"{")).status_code == 401, path


async def logged_in(server: Server, http: httpx2.AsyncClient) -> str:
    """Follow the printed link; returns the Set-Cookie header."""
    answer = await http.get(server.listening.page_link)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    return str(answer.headers["set-cookie"])


class TestThePage:
    async def test_opens_by_the_printed_link_and_stays_open(self, server: Server) -> None:
        async with server.http(None) as http:
            locked = await http.get("/")
            assert locked.status_code == 401
            assert locked.headers["content-type"].startswith("text/html")
            cookie = await logged_in(server, http)
            for wanted in ("HttpOnly", "SameSite=Strict", "Path=/", "Max-Age="):
                assert wanted in cookie
            for _ in range(2):
                page = await http.get("/")
                assert page.status_code == 200
                assert "<html" in page.text
            assert (await http.get("/threads")).json() == []

    async def test_asks_no_other_server_for_anything(self, server: Server) -> None:
        async with server.http(None) as http:
            await logged_in(server, http)
            page = (await http.get("/")).text
            for path in re.findall(r'(?:src|href)="([^"]+)"', page):
                assert not path.startswith(("http:", "https:", "//")), path
                if path.startswith("/ui/"):
                    answer = await http.get(path)
                    assert answer.status_code == 200, path

    async def test_gets_tickets_for_its_websocket_but_none_for_a_page(
        self,
        server: Server,
    ) -> None:
        """Else a cookie that leaks once could be made good for ever."""
        async with server.http(None) as http:
            await logged_in(server, http)
            ticket = await http.post("/auth/tickets", headers={"Origin": server.url})
            assert ticket.status_code == 201
            refused = await http.post(
                "/auth/tickets",
                json={"purpose": "page"},
                headers={"Origin": server.url},
            )
            assert refused.status_code == 401
        path = f"/threads/t/stream?ticket={ticket.json()['ticket']}"
        headers = [(b"Origin", server.url.encode())]
        async with server.chat(headers=headers, path=path) as chat:
            await chat.ask("state.get")

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://["])
    async def test_of_somebody_else_may_not_use_the_cookie(
        self,
        server: Server,
        complaints: list[str],
        origin: str,
    ) -> None:
        async with server.http(None) as http:
            await logged_in(server, http)
            for method, path in (
                ("POST", "/auth/tickets"),
                ("POST", "/threads"),
                ("DELETE", "/threads/x"),
            ):
                answer = await http.request(method, path, headers={"Origin": origin})
                assert answer.status_code == 403, path
                assert "set-cookie" not in answer.headers
                assert "access-control-allow-origin" not in answer.headers

    async def test_of_another_server_on_this_host_has_a_session_of_its_own(
        self,
        tmp_path: Path,
    ) -> None:
        """Cookies know no ports: whoever logged in here last would log the other out."""
        async with open_server(tmp_path / "one") as one, open_server(tmp_path / "two") as two:
            async with one.http(None) as http:
                for server in (one, two):
                    await http.get(server.listening.page_link)
                for server in (one, two):
                    answer = await http.get(f"{server.url}/threads")
                    assert answer.status_code == 200

    async def test_with_a_used_link_goes_on_if_there_is_a_session(self, server: Server) -> None:
        async with server.http(None) as http:
            await logged_in(server, http)
            again = await http.get(server.listening.page_link)
            assert (again.status_code, again.headers["location"]) == (303, "/")
        async with server.http(None) as http:
            assert (await http.get(server.listening.page_link)).status_code == 401

    async def test_does_not_open_by_the_websockets_ticket(self, server: Server) -> None:
        async with server.http() as http:
            ticket = (await http.post("/auth/tickets")).json()["ticket"]
        async with server.http(None) as http:
            assert (await http.get(f"/?ticket={ticket}")).status_code == 401

    async def test_does_not_open_by_a_cookie_that_is_none(
        self,
        server: Server,
        complaints: list[str],
    ) -> None:
        async with server.http(None) as http:
            for value in ("", "x", "x.y.z", "\xe9", "a" * 4000):
                cookie = f"{server.auth.session_cookie}={value}".encode("latin-1")
                headers = httpx2.Headers([(b"Cookie", cookie)])
                assert (await http.get("/", headers=headers)).status_code == 401
                assert (await http.get("/threads", headers=headers)).status_code == 401


async def test_no_long_lived_secret_is_in_a_url(server: Server) -> None:
    link = server.listening.page_link
    assert TOKEN_PREFIX not in link
    assert load_key(server.settings.data).hex() not in link
