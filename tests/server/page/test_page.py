"""The page at `/`, as a person with a browser meets it."""

from __future__ import annotations

import re
import signal
from http import HTTPStatus
from typing import Final

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect
from tests.server.page.conftest import PageServer

MARKUP: Final = "<img src=x onerror=\"document.title='hit'\"><script>alert(1)</script>"

REMEMBER_SOCKETS: Final = """
    window.sockets = [];
    window.WebSocket = class extends WebSocket {
        constructor(...given) { super(...given); window.sockets.push(this); }
    };
"""


def ask(page: Page, words: str) -> None:
    page.get_by_label("Your message").fill(words)
    page.keyboard.press("Enter")


def answer_of(tokens: int) -> str:
    """What the scripted model says."""
    return "".join(f"tok{number} " for number in range(tokens)).strip()


def turns(page: Page, status: str | None = None) -> Locator:
    """The runs that the page shows, those with that status only if one is given."""
    return page.locator(".turn:not(.pending)" + (f"[data-status={status}]" if status else ""))


def hear(page: Page, words: str) -> None:
    """Wait until an answer under way has come to those words."""
    turns(page, "running").locator(".prose", has_text=words).wait_for()


def words_of(page: Page) -> list[int]:
    """The numbers of the tokens in the last answer."""
    answer = turns(page).locator(".prose").last.inner_text()
    return [int(word.removeprefix("tok")) for word in answer.split()]


def stop_button(page: Page) -> Locator:
    return page.get_by_role("button", name="Stop")


class TestGettingIn:
    def test_the_printed_link_opens_the_page_and_works_once(
        self,
        server: PageServer,
        browser: Browser,
        context: BrowserContext,
    ):
        page = context.new_page()
        page.goto(server.link)
        expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
        expect(page).to_have_url(f"{server.url}/")  # the ticket has left the address bar

        with browser.new_context() as another:
            late = another.new_page()
            response = late.goto(server.link)
            assert response is not None
            assert response.status == HTTPStatus.UNAUTHORIZED
            expect(late.get_by_role("heading", name="You need a fresh link")).to_be_visible()

    def test_without_a_session_the_page_explains_how_to_get_in(
        self,
        server: PageServer,
        context: BrowserContext,
    ):
        page = context.new_page()
        response = page.goto(server.url)
        assert response is not None
        assert response.status == HTTPStatus.UNAUTHORIZED
        expect(page.locator("pre")).to_have_text("creche link")

    def test_a_refusal_that_is_final_is_told_in_words(
        self,
        server: PageServer,
        context: BrowserContext,
        page: Page,
    ):
        expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
        page.get_by_label("Your message").fill("never sent")
        page.evaluate("location.hash = 'x'.repeat(300)")  # longer than an id may be
        expect(page.get_by_role("alert")).to_contain_text("does not accept this thread")
        expect(page.get_by_role("button", name="Send")).to_be_disabled()

        context.clear_cookies()
        page.evaluate("location.hash = 'another-thread'")
        expect(page.get_by_role("alert")).to_contain_text("creche link")
        server.log_in(context)
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


class TestAsking:
    def test_an_answer_streams_and_ends(self, page: Page):
        ask(page, "tokens=80 delay_ms=20")
        hear(page, "tok2 ")
        expect(turns(page, "done").locator(".prose")).to_have_text(answer_of(80))
        expect(page.get_by_role("status")).to_contain_text("Done in")
        expect(page.locator(".asked")).to_have_count(1)  # what was asked is not shown twice

    def test_enter_sends_and_shift_enter_begins_a_line(self, page: Page):
        box = page.get_by_label("Your message")
        box.press_sequentially("first")
        box.press("Shift+Enter")
        box.press_sequentially("second")
        expect(box).to_have_value("first\nsecond")
        box.press("Enter")
        expect(box).to_have_value("")
        expect(turns(page, "done").locator(".asked p")).to_have_text("first\nsecond")

    def test_a_tool_call_is_shown_with_its_result_or_its_error(self, page: Page):
        ask(page, 'tokens=3 tool=calculator:{"expression":"37*91"}')
        expect(turns(page, "done")).to_have_count(1)
        call = page.locator("details.tool")
        expect(call.locator("summary")).to_have_text(re.compile(r"calculator.*37\*91.*3367"))
        expect(call.locator("pre").first).to_be_hidden()
        call.locator("summary").click()
        expect(call.locator("pre").first).to_have_text('{\n  "expression": "37*91"\n}')
        expect(call.locator("pre").last).to_have_text("3367")

        ask(page, 'tokens=3 tool=calculator:{"expression":"2+*2"}')
        call = page.locator("details.tool[data-status=failed]")
        call.locator("summary").click()
        expect(call.get_by_role("heading", name="Error")).to_be_visible()
        expect(call.locator("pre").last).to_contain_text("cannot be calculated")

    def test_a_run_that_fails_says_why_and_gives_a_reference(self, page: Page):
        ask(page, "tokens=4 fail=the model is out to lunch")
        end = turns(page, "failed").locator(".end")
        expect(end).to_contain_text("The run failed: the model is out to lunch")
        expect(end).to_contain_text(re.compile(r"Reference \w+"))

    def test_stop_really_stops_and_the_page_says_so(self, page: Page, context: BrowserContext):
        ask(page, "hang")
        stop_button(page).click()
        end = turns(page, "stopped").locator(".end")
        expect(end).to_have_text(re.compile(r"^Stopped, all cleaned up within \d+ ms$"))
        expect(stop_button(page)).to_be_hidden()

        thread = page.url.partition("#")[2]
        history = context.request.get(f"{page.url.partition('#')[0]}threads/{thread}/history")
        assert [state["metadata"]["status"] for state in history.json()] == ["cancelled"]

    @pytest.mark.parametrize("how", ["mouse", "keyboard"])
    def test_who_has_stopped_a_run_can_type_on(self, page: Page, how: str):
        ask(page, "hang")
        if how == "mouse":
            stop_button(page).click()
        else:
            stop_button(page).press("Enter")
        expect(page.get_by_label("Your message")).to_be_focused()
        expect(turns(page, "stopped")).to_have_count(1)
        expect(page.get_by_label("Your message")).to_be_focused()
        page.keyboard.type("tokens=1 at once")
        page.keyboard.press("Enter")
        expect(turns(page, "done").locator(".asked")).to_contain_text("tokens=1 at once")

    def test_a_queued_second_question_is_answered_after_the_first(self, page: Page):
        ask(page, "tokens=120 delay_ms=20")
        hear(page, "tok1 ")
        ask(page, "tokens=2 the second")
        waiting = page.locator(".pending", has_text="Waiting for the answer above")
        waiting.wait_for()
        expect(turns(page, "done")).to_have_count(2)
        expect(waiting).to_have_count(0)
        expect(turns(page).locator(".prose")).to_have_text([answer_of(120), answer_of(2)])

    def test_a_question_that_waits_survives_a_reload_and_can_be_withdrawn(self, page: Page):
        ask(page, "hang")
        expect(turns(page, "running")).to_have_count(1)
        ask(page, "hang again")
        expect(page.locator(".pending")).to_contain_text("Waiting")
        page.reload()
        expect(page.locator(".pending")).to_have_text(re.compile("hang again.*Waiting"))
        page.get_by_role("button", name="Withdraw").click()
        expect(page.locator(".pending")).to_contain_text("Withdrawn")
        stop_button(page).click()
        expect(turns(page, "stopped")).to_have_count(2)

    def test_another_agent_can_be_chosen(self, page: Page):
        page.get_by_label("Agent").select_option("parrot")
        expect(page.get_by_text("Repeats what it hears.")).to_be_visible()
        ask(page, "pretty Polly")
        expect(turns(page, "done").locator(".prose")).to_have_text("pretty Polly")


class TestReading:
    def test_markup_in_an_answer_is_text_and_never_html(self, page: Page):
        # The calculator's error, and so the assistant's answer, repeat the expression.
        expression = MARKUP.replace('"', '\\"')
        ask(page, f'{MARKUP} tokens=1 tool=calculator:{{"expression":"{expression}"}}')
        expect(turns(page, "done").locator(".prose")).to_contain_text("<img src=x onerror=")
        expect(turns(page).locator(".asked")).to_contain_text(MARKUP)
        expect(page.locator("#transcript :is(img, script)")).to_have_count(0)
        expect(page).not_to_have_title("hit")

        page.get_by_label("Agent").select_option("parrot")
        ask(page, MARKUP)
        expect(turns(page, "done").nth(1).locator(".prose")).to_have_text(MARKUP)
        expect(page.locator("#transcript :is(img, script)")).to_have_count(0)
        expect(page).not_to_have_title("hit")

    def test_a_little_markdown_is_understood(self, page: Page):
        page.get_by_label("Agent").select_option("parrot")
        ask(page, "A **bold** *word* `code`.\n\n1. one\n2. two\n\n```python\nx = [**y]\n```\n2*3*4")
        prose = turns(page, "done").locator(".prose")
        expect(prose.locator("strong")).to_have_text("bold")
        expect(prose.locator("em")).to_have_text("word")
        expect(prose.locator("p code")).to_have_text("code")
        expect(prose.locator("ol li")).to_have_text(["one", "two"])
        expect(prose.locator("pre[data-language=python]")).to_have_text("x = [**y]")
        expect(prose.locator("p").last).to_have_text("2*3*4")

    def test_what_a_subagent_says_is_folded_away_under_its_name(self, page: Page):
        page.get_by_label("Agent").select_option("foreman")
        ask(page, "polly")
        turn = turns(page, "done")
        expect(turn.locator(".prose")).to_have_text("It said 6 letters.")
        thought = turn.locator("details.thought")
        expect(thought.locator("summary")).to_have_text("What parrot wrote")
        expect(thought.locator("p")).not_to_be_visible()
        thought.locator("summary").click()
        expect(thought.locator("p")).to_have_text("polly ")

    def test_words_read_the_same_whole_and_in_pieces(self, page: Page):
        words = (
            "# Head\ntext **bold** *and* `tick\n- one\n  more\n    - deep\n\n3) three\n"
            "```js\na = `b`\n\n  c\n```\n1986. A year\n1987. in a paragraph\n~~~\nopen\n"
        )
        words += "~~~\n" + "A sentence of words. " * 500 + "- no item\n\n```\n" + "line\n" * 2000
        different = page.evaluate(
            """async (words) => {
                const { Prose, blocksOf } = await import("/ui/prose.js");
                const shown = (node) => { node.normalize(); return node.innerHTML; };
                const whole = (until) => {
                    const node = document.createElement("div");
                    new Prose(node).update(words.slice(0, until));
                    return shown(node);
                };
                for (const [step, end] of [[1, 400], [7, 400], [211, words.length]]) {
                    const node = document.createElement("div");
                    const prose = new Prose(node);
                    for (let until = step; until <= end; until += step) {
                        prose.update(words.slice(0, until));
                        const pieces = shown(node.cloneNode(true));
                        if (pieces !== whole(until)) return [step, until, pieces, whole(until)];
                    }
                }
                return blocksOf(words).map((block) => block.source).join("") === words;
            }""",
            words,
        )
        assert different is True

    def test_a_reader_who_scrolled_up_is_left_there(self, page: Page):
        ask(page, "tokens=900")
        ask(page, "tokens=9000 delay_ms=15")
        hear(page, "tok5 ")
        scroller = page.locator("#scroller")
        scroller.hover()
        page.mouse.wheel(0, -300)
        latest = page.get_by_role("button", name="Latest")
        expect(latest).to_be_visible()
        place = "node => [node.scrollTop, node.scrollHeight]"
        top, height = scroller.evaluate(place)
        hear(page, "tok60 ")
        assert scroller.evaluate(place)[0] == top
        assert scroller.evaluate(place)[1] > height

        latest.click()
        expect(latest).to_be_hidden()
        stop_button(page).click()


class TestComingBack:
    def test_a_reload_in_mid_answer_misses_and_repeats_nothing(self, page: Page):
        ask(page, "tokens=200 delay_ms=20")
        hear(page, "tok20 ")
        page.reload()
        expect(turns(page, "done").locator(".prose")).to_have_text(answer_of(200))
        expect(page.locator(".asked")).to_have_count(1)

    def test_a_connection_that_breaks_in_mid_answer_is_resumed(self, page: Page):
        page.add_init_script(REMEMBER_SOCKETS)
        page.reload()
        ask(page, "tokens=9000 delay_ms=20")
        hear(page, "tok20 ")
        page.evaluate("sockets[0].close(3000)")
        hear(page, f"tok{words_of(page)[-1] + 40} ")
        assert page.evaluate("sockets.length") == 2
        stop_button(page).click()
        turns(page, "stopped").wait_for()
        assert words_of(page) == list(range(len(words_of(page))))

    def test_a_second_tab_watches_the_same_run_live(self, page: Page, context: BrowserContext):
        ask(page, "tokens=9000 delay_ms=20 watch me")
        hear(page, "tok1 ")
        other = context.new_page()
        other.goto(page.url)
        expect(turns(other, "running").locator(".asked")).to_contain_text("watch me")
        hear(other, "tok1 ")
        hear(other, f"tok{words_of(other)[-1] + 1} ")

        stop_button(other).click()
        for tab in (page, other):
            turns(tab, "stopped").wait_for()
        assert words_of(page) == words_of(other) == list(range(len(words_of(page))))
        ask(page, "tokens=1 and this")
        expect(turns(other, "done").locator(".asked")).to_contain_text("and this")

    def test_a_server_restart_is_survived_without_duplicates(self, server: PageServer, page: Page):
        ask(page, "tokens=5")
        expect(turns(page, "done")).to_have_count(1)
        ask(page, "hang")
        expect(turns(page, "running")).to_have_count(1)

        server.end(signal.SIGTERM)
        expect(turns(page, "stopped").locator(".end")).to_contain_text("the server was shut down")
        expect(page.get_by_role("alert")).to_contain_text("The server is restarting")
        ask(page, "tokens=7")
        expect(page.locator(".pending")).to_contain_text("as soon as there is a connection")

        server.start()
        expect(turns(page)).to_have_count(3)
        expect(turns(page, "done").locator(".prose")).to_have_text([answer_of(5), answer_of(7)])
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator(".asked")).to_have_count(3)

    def test_after_a_crash_the_thread_is_shown_as_it_is_stored(
        self,
        server: PageServer,
        page: Page,
    ):
        ask(page, "tokens=5")
        expect(turns(page, "done")).to_have_count(1)
        ask(page, "tokens=10000 delay_ms=10")
        hear(page, "tok10 ")

        server.end(signal.SIGKILL)
        server.start()
        page.evaluate("window.dispatchEvent(new Event('online'))")  # do not wait to try again
        expect(turns(page, "failed").locator(".end")).to_contain_text("The server stopped")
        expect(turns(page)).to_have_count(2)
        said = words_of(page)
        assert said == list(range(len(said)))


class TestThreads:
    def test_picking_an_older_thread_shows_its_messages(self, page: Page):
        ask(page, "tokens=3 the older one")
        expect(turns(page, "done")).to_have_count(1)
        page.get_by_role("button", name="New thread").click()
        expect(turns(page)).to_have_count(0)
        ask(page, "tokens=4 the newer one")
        expect(turns(page, "done").locator(".prose")).to_have_text(answer_of(4))

        page.get_by_role("link", name="tokens=3 the older one").click()
        expect(turns(page, "done").locator(".prose")).to_have_text(answer_of(3))
        expect(page.get_by_role("heading", level=1)).to_have_text("tokens=3 the older one")
        page.go_back()
        expect(turns(page, "done").locator(".prose")).to_have_text(answer_of(4))

    def test_a_deleted_thread_is_gone_here_and_told_elsewhere(
        self,
        page: Page,
        context: BrowserContext,
    ):
        ask(page, "tokens=2 delete me")
        expect(turns(page, "done")).to_have_count(1)
        other = context.new_page()
        other.goto(page.url)
        expect(turns(other, "done")).to_have_count(1)

        page.bring_to_front()  # a tab in the background is drawn once a second
        link = page.get_by_role("link", name="tokens=2 delete me")
        link.hover()
        page.get_by_role("button", name="Delete tokens=2 delete me").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(link).to_have_count(0)
        expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
        expect(other.get_by_role("alert")).to_have_text("This thread was deleted.")

    def test_on_a_narrow_screen_what_came_of_a_tool_is_not_cut(self, page: Page):
        page.set_viewport_size({"width": 380, "height": 700})
        ask(page, 'tokens=1 tool=calculator:{"expression":"123456*7 + 123456*8 + 123456*9"}')
        outcome = page.locator("details.tool .outcome")
        expect(outcome).to_have_text("2962944")
        assert outcome.evaluate("e => e.scrollWidth <= e.clientWidth"), "it is there whole"
        gist = page.locator("details.tool .gist")
        assert gist.evaluate("e => e.clientWidth") > 150, "so are its arguments, nearly"
        assert page.evaluate("document.documentElement.scrollWidth") == 380

    def test_on_a_narrow_screen_the_list_is_a_drawer(self, page: Page):
        page.set_viewport_size({"width": 380, "height": 700})
        ask(page, "tokens=2 seen on a phone")
        expect(turns(page, "done")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") == 380
        link = page.get_by_role("link", name="tokens=2 seen on a phone")
        expect(link).to_be_hidden()
        page.get_by_role("button", name="Show threads").click()
        expect(link).to_be_visible()
        page.keyboard.press("Escape")
        expect(link).to_be_hidden()


def begin_at_the_clerks(page: Page) -> None:
    page.get_by_label("Agent").select_option("clerk")
    ask(page, "Plan a trip.")


class TestQuestions:
    def test_are_asked_in_forms_and_the_run_goes_on_with_the_answers(self, page: Page):
        begin_at_the_clerks(page)
        name = page.get_by_role("region", name="What is your name?")
        expect(name).to_be_visible()
        expect(turns(page, "parked")).to_contain_text("Waiting for your answer")
        name.get_by_label("Answer").fill("Ada")
        page.keyboard.press("Enter")
        expect(name).to_contain_text("Answered: Ada")

        where = page.get_by_role("region", name="Where to?")
        where.get_by_label("to").select_option("Rome")
        where.get_by_label("days").fill("many")
        where.get_by_role("button", name="Answer").click()
        expect(where.get_by_role("alert")).to_contain_text("This is no integer: many")
        where.get_by_label("days").fill("2.5")
        where.get_by_role("button", name="Answer").click()
        expect(where.get_by_role("alert")).to_contain_text("does not fit")
        where.get_by_label("days").fill("2")
        where.get_by_role("button", name="Answer").click()

        pay = page.get_by_role("region", name="May the tool pay be called?")
        expect(pay).to_contain_text('"amount": 5')
        pay.get_by_role("button", name="Approve").click()
        expect(turns(page, "done")).to_contain_text("Ada: 2 days in Rome, paid 5")
        expect(turns(page)).to_have_count(1)
        expect(pay).to_contain_text("Approved")
        expect(page.locator(".asks form:visible")).to_have_count(0)

    def test_are_still_there_after_a_reload_and_can_be_declined(self, page: Page):
        begin_at_the_clerks(page)
        name = page.get_by_role("region", name="What is your name?")
        expect(name).to_be_visible()
        page.reload()
        name.get_by_role("button", name="Decline").click()
        expect(turns(page, "failed")).to_contain_text("The question was declined.")
        expect(name).to_contain_text("Declined")

    def test_end_with_a_run_that_is_stopped(self, page: Page):
        begin_at_the_clerks(page)
        name = page.get_by_role("region", name="What is your name?")
        expect(name).to_be_visible()
        stop_button(page).click()
        expect(turns(page, "stopped")).to_be_visible()
        expect(name).to_contain_text("Not answered")

    def test_outlive_the_server(self, page: Page, server: PageServer):
        begin_at_the_clerks(page)
        # The run that is told of the answer may ask anew before we look.
        name = page.get_by_role("region", name="What is your name?").first
        expect(name).to_be_visible()
        server.end()
        expect(turns(page, "stopped")).to_contain_text("the server was shut down")
        server.start()
        name.get_by_label("Answer").fill("Ada")
        name.get_by_role("button", name="Answer").click()
        expect(name).to_contain_text("Answered: Ada")
        expect(turns(page)).to_have_count(2)  # another run, which is told of it, and asks anew
        expect(page.get_by_role("region", name="What is your name?")).to_have_count(2)
