"""Every rule where it must speak, on the lines that the sample marks, and nowhere else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.server.scan.scanning import SAMPLE, files_below, marked, scan_files, scan_text, told

from creche_server.scan import RULES, scan_sources


class TestTheSample:
    @pytest.mark.parametrize("name", sorted(path.name for path in SAMPLE.glob("*.py")))
    def test_is_told_line_by_line(self, name: str) -> None:
        """Exactly what is marked: a line without a mark is a near miss."""
        files = files_below(SAMPLE)
        expected = marked(files)
        found = Counter((item.path, item.line, item.rule) for item in scan_sources(files).findings)
        missing = sorted((expected - found).elements())
        surplus = sorted((found - expected).elements())
        assert [item for item in missing if Path(item[0]).name == name] == []
        assert [item for item in surplus if Path(item[0]).name == name] == []

    def test_breaks_every_rule(self) -> None:
        broken = {rule for _, _, rule in marked(files_below(SAMPLE))}
        unreadable = {item.rule for item in scan_text("def (:\n").findings}
        assert broken | unreadable == {rule.id for rule in RULES}

    def test_has_what_its_escapes_explain(self) -> None:
        explained = {
            (Path(item.finding.path).name, item.finding.line, item.finding.rule, item.reason)
            for item in scan_sources(files_below(SAMPLE)).explained
        }
        assert explained == {
            ("escapes.py", 6, "CR001", "filled on import only"),
            ("escapes.py", 9, "CR001", "only read"),
            ("escapes.py", 10, "CR001", "only read"),
            ("escapes.py", 17, "CR009", "said where the statement begins"),
            ("escapes.py", 21, "CR007", "one user is all there is"),
            ("escapes.py", 28, "CR006", "the default is never written"),
            ("escapes.py", 36, "CR002", "only read"),
        }


class TestARule:
    def test_has_an_id_of_its_own_and_says_why_and_what_instead(self) -> None:
        assert len({rule.id for rule in RULES}) == len(RULES)
        assert [rule.id for rule in RULES] == sorted(rule.id for rule in RULES)
        for rule in RULES:
            assert rule.name
            assert "\n" not in rule.name
            assert rule.why.endswith(".")
            assert rule.instead.endswith(".")


class TestAName:
    """What is shared is found by whatever name it goes."""

    @pytest.mark.parametrize(
        ("imported", "decorator"),
        [
            ("import functools", "functools.cache"),
            ("import functools as f", "f.lru_cache"),
            ("from functools import lru_cache as memo", "memo(maxsize=1)"),
            ("from functools import cache as pure", "pure"),
            ("import joblib\nmemory = joblib.Memory", "memory.cache"),
        ],
    )
    def test_may_be_an_alias_of_a_cache(self, imported: str, decorator: str) -> None:
        text = f"{imported}\n@{decorator}\ndef of(user_id):\n    return user_id\n"
        assert [item.rule for item in scan_text(text).findings] == ["CR007"]

    def test_that_is_local_hides_an_import(self) -> None:
        text = """\
            import os
            def local(os):
                os.environ["a"] = "b"
            def outer():
                import os as system
                def inner():
                    system.environ["a"] = "b"
                return inner
        """
        assert told(scan_text(text)) == ["7 CR009"]

    def test_of_a_class_body_is_not_seen_by_its_methods(self) -> None:
        text = """\
            class A:
                list = tuple
                def method(self, given=list()): return given
                def other(self):
                    def inner(given=list()): return given
                    return inner
        """
        assert told(scan_text(text)) == ["5 CR006"]

    @pytest.mark.parametrize(
        "imported",
        [
            "from app.state import Registry",
            "from app import Registry",
            "from .state import Registry",
            "from . import Registry",
            "from ..app.state import Registry",
            "import app.state\nRegistry = app.state.Registry",
        ],
    )
    def test_is_followed_through_packages(self, imported: str) -> None:
        files = {
            "src/app/__init__.py": "from app.state import Registry\n",
            "src/app/state.py": "class Registry:\n    def __init__(self):\n        self.a = {}\n",
            "src/app/main.py": f"{imported}\nKEPT = Registry()\n",
        }
        found = [item.symbol for item in scan_files(files).findings]
        assert found == ["app.main.KEPT"]

    def test_of_a_module_of_ours_is_not_the_standard_librarys(self) -> None:
        files = {
            "app/__init__.py": "",
            "app/http/__init__.py": "",
            "app/http/client.py": "class HTTPConnection: pass\n",
            "app/main.py": """\
                import http.client
                from app.http.client import HTTPConnection
                A = http.client.HTTPConnection("a")
                B = HTTPConnection()
            """,
        }
        found = [item.symbol for item in scan_files(files).findings]
        assert found == ["app.main.A"]

    def test_that_is_declared_global_is_the_modules(self) -> None:
        text = """\
            from os import environ
            def outer(environ):
                def inner():
                    global environ
                    environ["a"] = "b"
                return inner
        """
        assert told(scan_text(text)) == ["4 CR003", "5 CR009"]

    def test_that_imports_itself_ends(self) -> None:
        files = {"a.py": "from b import X\nY = X()\n", "b.py": "from a import X\nZ = X()\n"}
        assert told(scan_files(files)) == []

    def test_of_a_class_that_derives_from_itself_ends(self) -> None:
        assert told(scan_text("class A(B): pass\nclass B(A): pass\nX = A()\n")) == []


class TestAnEscape:
    @pytest.mark.parametrize(
        ("line", "rules"),
        [
            ("A = {}  # creche: shared only read", []),
            ("A = {}  #creche:shared only read", []),
            ("A = {}  # noqa  # creche: shared only read", []),
            ("A = {}  # creche: shared only read  # noqa", []),
            ("A = {}  # creche: shared", ["CR001", "CR090"]),
            ("A = {}  # creche: shared   ", ["CR001", "CR090"]),
            ("A = {}  # creche: shared ...", ["CR001", "CR090"]),
            ("A = {}  # creche: shared # noqa", ["CR001", "CR090"]),
            ("A = {}  # creche: sharedly yes", ["CR001"]),
            ("A = {}  # creche: borrowed", ["CR001"]),
            ("A = '# creche: shared x', {}", ["CR001"]),
            ("A = ()  # creche: shared only read", ["CR091"]),
            ("A = ()  # creche: shared", ["CR091"]),
        ],
    )
    def test_needs_a_reason_and_a_finding(self, line: str, rules: list[str]) -> None:
        assert [item.rule for item in scan_text(f"{line}\n").findings] == rules

    def test_counts_for_all_that_is_found_on_its_line(self) -> None:
        scan = scan_text("A, B = [], {}  # creche: shared only read\n")
        assert told(scan) == []
        assert [item.finding.symbol for item in scan.explained] == ["main.A", "main.B"]

    def test_does_not_count_at_the_end_of_a_statement(self) -> None:
        assert told(scan_text("A = {\n}  # creche: shared only read\n")) == ["1 CR001", "2 CR091"]
