"""Pages that are written from the code each time the documentation is built: commands, configurations, packages."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from unittest.mock import patch

from launchers.commands.__main__ import COMMANDS, GROUPS
from launchers.commands.config import MODELS, USES
from shards.core.cli import Parser
from shards.core.keys import Key, keys
from shards.core.presets import KINDS, presets

ROOT = Path(__file__).parents[2]
SUBCOMMANDS = {
    "slurm": ("shards", "pretrain", "finetune", "status", "cancel"),
    "config": ("show", "explain"),
}
# The title of the page of a kind of configuration, and a command that uses such a file or prints one.
TITLES = {
    "pretrain": ("Settings of a pretraining", "slim-brain pretrain lean data=DATASET run.steps=2000"),
    "finetune": ("Settings of a fine-tuning", "slim-brain finetune RUN --data DATASET --task TASK run.epochs=50"),
    "shards": ("Settings of a conversion", "slim-brain make-shards mylab.yaml --out DATASET grid.mm=3"),
    "cohort": ("Keys of a cohort file", "slim-brain config show cohort example_bids > mylab.yaml"),
    "task": ("Keys of a task file", "slim-brain config show task hcp_sex > mytask.yaml"),
    "slurm": ("Keys of a SLURM file", "slim-brain config show slurm example > mycluster.yaml"),
}


def write_reference(folder: Path) -> None:
    """Write the pages of commands and configurations below `folder`; one that is the same is not touched."""
    for name in COMMANDS:
        _write(folder / "commands" / f"{name}.md", _command_page(name))
    for kind in MODELS:
        _write(folder / "configuration" / f"{kind}.md", _settings_page(kind))
    _write(folder / "commands" / "index.md", _commands_index())
    _write(folder / "configuration" / "presets.md", _presets_page())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


class _Found(Exception):
    """Carries the parser of a command out of the command."""


def parser_of(name: str, *words: str) -> argparse.ArgumentParser:
    """The parser of a command, as `slim-brain NAME ... --help` prints it."""

    def found(self: argparse.ArgumentParser, file: object = None) -> None:
        raise _Found(self)

    module = import_module(f"launchers.commands.{name.replace('-', '_')}")
    with patch.object(sys, "argv", ["slim-brain"]), patch.object(Parser, "print_help", found):
        try:
            module.main([*words, "--help"])
        except _Found as caught:
            return caught.args[0]
    raise AssertionError(f"slim-brain {name} --help prints no help")


def _commands_index() -> str:
    lines = ["# Commands", "", "Generated from the parsers; `slim-brain COMMAND --help` prints the same.", ""]
    for title, names in GROUPS.items():
        lines += [f"| {title} | |", "|---|---|"]
        lines += [f"| [`{name}`]({name}.md) | {_doc(name)[0]} |" for name in names]
        lines.append("")
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", *COMMANDS, "```", ""])


def _doc(name: str) -> tuple[str, str]:
    """The first line and the paragraphs of the text at the head of a command's module, without its calls."""
    module = import_module(f"launchers.commands.{name.replace('-', '_')}")
    first, *rest = dedent(module.__doc__ or "").strip().split("\n\n")
    return first, "\n\n".join(part for part in rest if not part.startswith("    "))


def _command_page(name: str) -> str:
    first, rest = _doc(name)
    lines = [f"# slim-brain {name}", "", first, "", rest, ""]
    lines += _parser_lines(parser_of(name))
    for sub in SUBCOMMANDS.get(name, ()):
        parser = parser_of(name, sub)
        lines += [f"## slim-brain {name} {sub}", "", (parser.description or "").partition("\n")[0], ""]
        lines += _parser_lines(parser)
    return "\n".join(lines)


def _parser_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    with patch.dict(os.environ, COLUMNS="90"):
        usage = parser.format_usage().rstrip()
    yield from ("```text", usage, "```", "")
    # argparse has no public list of actions
    for action in sorted(parser._actions, key=lambda action: "--json" in action.option_strings):
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        values = "" if action.nargs == 0 else _values(action)
        if isinstance(action, argparse._HelpAction):
            continue
        yield " ".join(filter(None, (names, f"`{values}`" if values else ""))) or f"`{action.dest}`"
        yield f": {_help(action, parser)}"
        yield ""
    example = (parser.epilog or "").partition("example:")[2].strip()
    if example:
        yield from ("Example:", "", "```bash", example, "```", "")


def _values(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog} if action.help else ""
    required = "required" if action.option_strings and action.required else ""
    return "; ".join(filter(None, (text, required))) or "see the example"


def _settings_page(kind: str) -> str:
    title, example = TITLES[kind]
    module, _, name = MODELS[kind].partition(":")
    found = [*keys(getattr(import_module(module), name))]
    sections = [key for key in found if key.type == "section"]
    lines = [f"# {title}", "", f"Generated from the code; `slim-brain config explain {kind}` prints the same.", ""]
    lines += ["```bash", example, "```", ""]
    shown = [key for key in found if key.type != "section" and not any(_below(key, section) for section in sections)]
    lines += [*_keys(shown)]
    for section in sections:
        deeper = [other for other in sections if _below(other, section)]
        inside = [key for key in found if _below(key, section) and key.type != "section"]
        inside = [key for key in inside if not any(_below(key, other) for other in deeper)]
        lines += [f"## {section.name}", "", section.description, "", *_keys(inside)]
    return "\n".join(lines)


def _below(key: Key, section: Key) -> bool:
    return key.name.startswith(f"{section.name}.")


def _keys(found: list[Key]) -> Iterator[str]:
    for key in found:
        default = "required" if key.required else f"default `{_json(key.default)}`"
        facts = "; ".join(filter(None, (key.type, f"in {key.unit}" if key.unit else "", default)))
        yield from (f"`{key.name}`", f": {key.description}", f"  <br>*{facts}*", "")


def _json(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _presets_page() -> str:
    lines = [
        "# Configurations that ship",
        "",
        "Commands find these by name; `slim-brain config --list` prints them.",
        "",
    ]
    for kind in KINDS:
        title, command, words = USES[kind]
        lines += [f"## {title.capitalize()}", "", "```bash", f"slim-brain {command} {words}", "```", ""]
        lines += ["| name | |", "|---|---|"]
        lines += [f"| `{one.name}` | {one.description} |" for one in presets(kind).values()]
        lines.append("")
    return "\n".join(lines)


def packages_page() -> str:
    """A table of the packages of this project: what each holds, in its own words, and its modules."""
    lines = ["| package | |", "|---|---|"]
    for top in ("shards", "slim", "launchers"):
        for folder in sorted(path.parent for path in (ROOT / top).glob("*/__init__.py")):
            words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            first = words.partition("\n")[0]
            names = ", ".join(sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")))
            lines.append(f"| `{top}/{folder.name}` | {first}<br>*{names}* |")
    return "\n".join([*lines, ""])
