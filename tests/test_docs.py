"""The documentation names what the code has: every exit code, event, option and file that it speaks of."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import edge.errors
import edge.events
from apps.cli.main import COMMANDS, EXIT_CODES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_exit_code_is_documented():
    classes = [value for value in vars(edge.errors).values() if isinstance(value, type)]
    codes = {0, *(value.exit_code for value in classes if issubclass(value, edge.errors.EdgeError))}
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", text_of("docs/cli.md"), re.MULTILINE)}
    assert codes <= table
    assert all(re.search(rf"\b{code} ", EXIT_CODES) for code in codes)


def test_every_event_is_documented():
    names = {value for name, value in vars(edge.events).items() if name.isupper() and name != "SCHEMA"}
    page = text_of("docs/events.md")
    assert edge.events.SCHEMA in page
    assert not {name for name in names if f"`{name}`" not in page}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_line_is_understood(page):
    import importlib

    from apps.cli.parsing import Parser

    lines = re.findall(r"^ *(?:\| .*`)?(streamo-edge [a-z]+ [^`\n]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    for line in lines:
        words = shlex.split(line)[1:]
        parser = Parser(prog=line)
        importlib.import_module(COMMANDS[words[0]][0]).configure(parser)
        parser.parse_args(words[1:])
