"""The figures of the report: what is counted, and that they cannot flatter."""

from __future__ import annotations

import pytest
from tests.server.scan.scanning import scan_text

from creche_server.scan import Figures, figures_of

LOOKS_UP = """\
    from contextvars import ContextVar
    user = ContextVar("user")

    def find(): return user.get(){escape}
    def calls(): return find()
    def calls_again(): return calls()
    def is_told(user_id): return user_id
    def mentions(thing): return thing.user_id
    def has_nothing_to_do_with_it(a): return a
"""


def figures(text: str) -> Figures:
    return figures_of(scan_text(text))


class TestTheCoverage:
    def test_counts_whoever_calls_a_function_that_looks_up(self) -> None:
        found = scan_text(LOOKS_UP.format(escape="")).coverage
        assert found.ambient == ("main.calls", "main.calls_again", "main.find")
        assert found.acting == 5
        assert figures(LOOKS_UP.format(escape="")).coverage == 0.4

    def test_counts_an_escape_as_passing_and_says_so(self) -> None:
        text = LOOKS_UP.format(escape="  # creche: shared there is no other way")
        found = figures(text)
        assert (found.coverage, found.acting, found.ambient_explained) == (1.0, 3, 1)

    @pytest.mark.parametrize(
        ("text", "acting"),
        [
            ("def f(user_id): pass", 1),
            ("def f(*, run_id=None): pass", 1),
            ("def f(a: 'UserId'): pass", 1),
            ("def f(run: RunContext): pass", 1),
            ("def f(a): return a._user_id", 1),
            ("def f(a): a.thread_id = 1", 1),
            ("def f(a): return lambda: a.user_id", 1),
            ("def f(owner_user_id): pass", 1),
            ("def f(context: int): pass", 0),
            ("def f(run_id: int): pass", 0),
            ("def f(users): return 'user_id'", 0),
            ("user_id = 1", 0),
        ],
    )
    def test_is_of_functions_that_act_for_a_user(self, text: str, acting: int) -> None:
        assert figures(f"{text}\n").acting == acting

    def test_follows_methods(self) -> None:
        text = """\
            from contextvars import ContextVar
            user = ContextVar("user")
            class A:
                def find(self): return user.get()
                def calls(self): return self.find()
                def calls_not(self): return self.other.find()
        """
        assert scan_text(text).coverage.ambient == ("main.A.calls", "main.A.find")


class TestTheScore:
    def test_is_the_clean_share_of_modules_classes_and_functions(self) -> None:
        found = figures("A = {}\nB = []\nclass C:\n    def m(self): pass\ndef f(): pass\n")
        assert (found.places, found.places_with_findings) == (4, 1)
        assert found.isolation_score == 75.0

    def test_is_multiplied_by_the_coverage(self) -> None:
        found = figures(LOOKS_UP.format(escape=""))
        assert (found.places, found.places_with_findings) == (7, 1)
        assert found.isolation_score == 34.2  # 600 / 7 x 0.4, rounded down

    def test_is_100_only_when_nothing_is_unexplained(self) -> None:
        functions = "".join(f"def f{number}(): pass\n" for number in range(3000))
        assert figures(functions).isolation_score == 100.0
        assert figures(f"A = {{}}\n{functions}").isolation_score == 99.9
        assert figures(f"{functions}# creche: shared nothing\n").isolation_score == 99.9

    def test_of_what_cannot_be_read_is_0(self) -> None:
        assert figures("def (:\n").isolation_score == 0.0

    def test_of_an_empty_file_is_100(self) -> None:
        assert figures("# nothing\n").isolation_score == 100.0


class TestTheGlobalStateCount:
    def test_is_of_objects_and_not_of_all_findings(self) -> None:
        text = """\
            import threading
            A = {}
            B = []  # creche: shared only read
            LOCK = threading.Lock()
            class C:
                items = []
                _instance = None
                def method(self, into=[]):
                    global A
        """
        found = figures(text)
        assert (found.global_state, found.global_state_explained) == (4, 1)
