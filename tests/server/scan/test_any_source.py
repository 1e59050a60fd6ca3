"""Whatever is given to it, the scanner answers: it never crashes."""

from __future__ import annotations

import ast
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.scan.scanning import SAMPLE, files_below, scan_text, told

from creche_server.scan import scan_sources

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = ("asyncio", "collections", "ctypes", "email", "importlib", "json", "logging", "unittest")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_standard_library_is_scanned(package: str) -> None:
    """Real code of all styles, every file of which the running Python parses."""
    files = {str(path): path.read_bytes() for path in sorted((LIBRARY / package).rglob("*.py"))}
    scan = scan_sources(files)
    assert scan.files == len(files) > 0
    assert [item for item in scan.findings if item.rule == "CR000"] == []
    assert scan.places > len(files)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"def (:\n", 1),
        (b"a = 1\nb = (\n", 2),
        (b"a = 1\n  b = 2\n", 2),
        (b"a\0b", 1),
        (b"\xff\xfe", 1),
        (b"# -*- coding: nonsense -*-\n", 1),
        (b"# -*- coding: ascii -*-\na = '\xe4'\n", 1),
        (b"(" * 100_000, 1),
        (b"a = " + b"-" * 100_000 + b"1\n", 1),
        (b"a = " + b"[" * 90 + b"]" * 90 + b"\n" + b"+".join([b"1"] * 20_000) + b"\n", 1),
        (b"return '''", 1),
    ],
)
def test_what_cannot_be_parsed_is_a_finding_on_its_line(data: bytes, line: int) -> None:
    scan = scan_sources({"good.py": b"A = {}\n", "odd.py": data})
    found = {item.path: item for item in scan.findings}
    assert found["good.py"].rule == "CR001"
    odd = found["odd.py"]
    assert (odd.rule, odd.line) == ("CR000", line)
    assert odd.message.startswith("cannot be parsed: ")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", None),
        (b"\xef\xbb\xbfA = {}\n", 1),
        (b"a = 1\r\n\r\nA = {}\r\n", 3),
        (b"a = 1\rA = {}\r", 2),
        (b"a = 1\n\x0cA = {}", 2),
        (b"# -*- coding: latin-1 -*-\na = '\xe4'\nA = {}\n", 3),
        ('a = """\u2028\x1c\x85"""; A = {}\n'.encode(), 1),
        (rb"a = '\d'; A = {}", 1),
    ],
)
def test_odd_encodings_and_line_ends_are_read(data: bytes, line: int | None) -> None:
    findings = scan_sources({"odd.py": data}).findings
    found = [(item.rule, item.line) for item in findings]
    assert found == ([] if line is None else [("CR001", line)])
    assert all("A = {}" in item.source for item in findings)


def test_what_parses_but_is_nested_too_deeply_to_be_looked_at_is_a_finding() -> None:
    (finding,) = scan_text(f"A = {'+'.join('1' * 1500)}\n").findings
    assert (finding.rule, finding.message) == ("CR000", "cannot be parsed: it is nested too deeply")


def test_functions_that_return_each_others_results_are_read_once_each() -> None:
    """Thirty that call all thirty: without notes that is thirty to the fourth."""
    text = "".join(
        f"def f{n}(a):\n" + "".join(f"    if a: return f{m}(a)\n" for m in range(30))
        for n in range(30)
    )
    with_result = text + "".join(f"A{n} = f{n}(1)\n" for n in range(30))
    start = time.process_time()
    assert told(scan_text(with_result)) == []
    assert time.process_time() - start < 5


def test_columns_are_characters() -> None:
    (finding,) = scan_text("ä = 'öü'; B = {}\n").findings
    assert (finding.column, finding.source) == (11, "ä = 'öü'; B = {}")


def _statements() -> Iterator[str]:
    """Every statement of the sample that stands by itself."""
    for data in files_below(SAMPLE).values():
        text = data.decode()
        for statement in ast.parse(text).body:
            yield ast.get_source_segment(text, statement) or "pass"


STATEMENTS = tuple(_statements())
HEADS = (
    *("if a:", "while a:", "for a in b:", "with a as b:", "try:", "def a(b={}, *c, d=[], **e):"),
    *("async def a(self, user_id):", "class A(B, metaclass=C):", "class cls(type):"),
    *("match a:\n case {'b': [*c], **d}:", "async def a():\n async with b as (c, self.d):"),
    *(
        "def __new__():",
        "def __new__(*cls):",
        "def __call__(): ",
        "@cache\ndef a(b, /, c=(d := [])):",
    ),
)


def _nested(parts: list[str], heads: list[str]) -> str:
    text = "\n".join(parts)
    for head in heads:
        depth = head.count("\n") + 1
        body = "\n".join(" " * depth + line for line in text.split("\n"))
        ending = "\nfinally: pass" if head == "try:" else ""
        text = f"{head}\n{body}{ending}"
    return text


@given(
    st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=4),
    st.lists(st.sampled_from(HEADS), max_size=4),
)
def test_any_statement_may_stand_anywhere(parts: list[str], heads: list[str]) -> None:
    """Scans it, or says why not; a body that Python itself refuses (`global` twice) parses."""
    text = _nested(parts, heads)
    scan = scan_sources({"any.py": text.encode()})
    assert "CR000" not in {item.rule for item in scan.findings}
    for finding in scan.findings:
        assert 1 <= finding.line <= text.count("\n") + 1
        assert finding.column >= 1


@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace"))
)
def test_any_bytes_are_answered(data: bytes) -> None:
    assert scan_sources({"any.py": data}).files == 1


@given(st.sampled_from(sorted(files_below(SAMPLE).values())), st.data())
def test_a_file_cut_anywhere_is_answered(whole: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    assert scan_sources({"any.py": whole[start:end]}).files == 1


def test_files_of_one_name_are_kept_apart() -> None:
    scan = scan_sources({"a/main.py": b"A = {}\n", "b/main.py": b"from main import A\n"})
    assert told(scan) == ["1 CR001"]
