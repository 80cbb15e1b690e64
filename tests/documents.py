"""What the documents show a reader: fenced blocks, commands (in blocks and in the text), links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "infra/README.md")]
FILES += sorted((ROOT / "docs").glob("*.md"))

PROGRAMS = (
    "raysemi", "python", "ray", "torchrun", "make", "pip", "pytest", "kubectl", "prometheus", "promtool", "tensorboard",
    "wandb", "tests/soak.py",
)  # fmt: skip
"""What a command in the text begins with."""
EXAMPLES = {
    "N": "2", "M": "fixmatch", "B": "resnet50", "S": "321", "METHOD": "derprop", "SPLIT": "1_16", "SEED": "0",
    "RECIPE": "voc-derprop", "SOURCE": "folder", "DETECTOR": "things", "HxW": "64x96",
}  # fmt: skip
"""What stands for a word in capitals; other such words stay: they are names of files and folders."""
_KEYWORDS = {"do", "done", "then", "{", "}", "(", ")", "&", "|", ";", "&&", "|&"}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    file: str
    line: int
    """Of the first line inside, from 1."""
    language: str
    """Empty: commands of a shell."""
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def blocks() -> list[Block]:
    """All of them; an unclosed one is an error."""
    found = []
    for file in FILES:
        inside: tuple[int, str, list[str]] | None = None
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.lstrip().startswith("```"):
                if inside is not None:
                    inside[2].append(line)
            elif inside is None:
                inside = (number + 1, line.strip().removeprefix("```"), [])
            else:
                text = "\n".join(inside[2]) + "\n"
                found.append(Block(file.relative_to(ROOT).as_posix(), inside[0], inside[1], text))
                inside = None
        assert inside is None, f"{file}: a block is not closed"
    return found


def prose(file: Path) -> str:
    """A document without its fenced blocks, whose lines stay empty."""
    text = file.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def code_in_text() -> Iterator[tuple[str, str]]:
    """(file:line, code) of all that stands between backticks in a document's text."""
    for file in FILES:
        text = prose(file)
        for match in re.finditer(r"`([^`]+)`", text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{file.relative_to(ROOT).as_posix()}:{line}", " ".join(match[1].split()).replace(r"\|", "|")


def commands() -> list[tuple[str, list[str]]]:
    """(file:line, words) of every simple command of a shell in a block, and of every one in the text."""
    found = []
    for block in blocks():
        if block.language:
            continue
        number = block.line
        for line in block.text.replace("\\\n", "\\\0").splitlines():
            found += [(f"{block.file}:{number}", words) for words in simple(line.replace("\\\0", " "))]
            number += 1 + line.count("\0")
    for where, code in code_in_text():
        if re.match(rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)}) ", code):
            found += [(where, words) for words in simple(code)]
    return found


def simple(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell's line: no pipes, no assignments before them; optional parts are taken.

    >>> list(simple("A=1 raysemi verify POOL [--decode] | cat"))
    [['raysemi', 'verify', 'POOL', '--decode'], ['cat']]
    """
    while (opened := re.sub(r"(?<=\s)\[([^][]+)\]", r"\1", line)) != line:
        line = opened
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in _KEYWORDS:
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=\S*", word):
            words.append(example(word))


def example(word: str) -> str:
    """A word with what its capitals stand for."""
    return re.sub(r"(?<![A-Za-z_])[A-Z][A-Za-z]*(?![A-Za-z_])", lambda name: EXAMPLES.get(name[0], name[0]), word)


def links() -> Iterator[tuple[str, Path, str]]:
    """(file:line, file, target) of every link and picture."""
    for file in (*FILES, ROOT / "CHANGELOG.md"):
        text = re.sub(r"`[^`\n]+`", "", prose(file))
        for match in re.finditer(r"\]\(([^)\s]+)\)", text):
            yield f"{file.relative_to(ROOT).as_posix()}:{text.count(chr(10), 0, match.start()) + 1}", file, match[1]


def anchors(file: Path) -> set[str]:
    """Of a document's headings, as code hosts and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
