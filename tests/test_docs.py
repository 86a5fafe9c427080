"""What the pages say can be done: links lead somewhere, commands parse, the README's examples run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from server_process import ServerProcess, running_server

from runtime.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("runtime/models/*/*.md")])
ADDRESS = "http://127.0.0.1:8000"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """The shell commands in the blocks of a page, continued lines joined, comments cut off."""
    for language, text in blocks(page):
        if language == "":
            for line in text.replace("\\\n", " ").splitlines():
                yield line.partition(" #")[0].strip()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_osp_commands_parse(page: Path) -> None:
    for line in commands(page):
        if line.startswith("osp "):
            words = shlex.split(line)
            group = click.Context(main)
            command = main.get_command(group, words[1])
            assert command is not None, line
            command.make_context(words[1], words[2:], parent=group).close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_placeholder_is_left(page: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|TBD|XXX|[A-Z]+_(TABLE|TREE|HERE))\b", page.read_text("utf-8"))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in PAGES:
        mentioned = set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", page.read_text("utf-8"), re.MULTILINE))
        assert {a or b for a, b in mentioned} <= targets, page


SOURCES = ("trainer", "quant", "runtime", "benchmarks", "deploy", "tests")


def test_the_readme_tree_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    tree = readme[readme.index("## Where is what") : readme.index("tests/          mirrors")]
    modules = [*ROOT.glob("trainer/*.py"), *ROOT.glob("quant/*.py"), *ROOT.glob("runtime/*.py")]
    modules += ROOT.glob("runtime/engine/*.py")
    missing = [str(m.relative_to(ROOT)) for m in modules if m.name != "__init__.py" and m.name not in tree]
    assert not missing
    there = {file.name for part in SOURCES for file in (ROOT / part).rglob("*.py")}
    assert set(re.findall(r"\b(\w+\.py)\b", tree)) <= there


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """`osp serve` with no model named."""
    with running_server() as running:
        yield running


def test_the_readme_client_example_runs(server: ServerProcess) -> None:
    (code,) = (text for language, text in blocks(ROOT / "README.md") if language == "python")
    assert ADDRESS in code
    script = code.replace(ADDRESS, server.url)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readme_curl_example_runs(server: ServerProcess) -> None:
    (line,) = (line for line in commands(ROOT / "README.md") if line.startswith("curl"))
    command = ["curl", "--silent", "--fail-with-body", *shlex.split(line.replace(ADDRESS, server.url))[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert '"finish_reason":' in done.stdout
