"""Show the configurations that ship with SLIM-Brain, and explain every key.

    slim-brain config --list [--json]
    slim-brain config show KIND NAME
    slim-brain config explain KIND [KEY] [--json]

`--list` shows the configurations of pretrainings, cohorts, tasks and clusters that commands find by name. `show` prints
one of them: the start of a file of your own. `explain` says of every key its type, unit, default and meaning.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from shards.core.cli import DONE, WRONG, Parser, call_of
from shards.core.keys import Key, explain
from shards.core.presets import KINDS, find, presets

# Kinds of settings and the modules that define them, which are imported when needed.
MODELS = {
    "pretrain": "slim.config:PretrainSettings",
    "finetune": "slim.config:FinetuneSettings",
    "shards": "shards.conversion.settings:ConvertSettings",
    "cohort": "shards.cohorts.cohort_file:CohortSettings",
    "task": "slim.evaluation.task:Task",
    "slurm": "launchers.cluster.scheduler:SlurmSettings",
}
# A description of each kind, and a call that takes such a configuration.
USES = {
    "pretrain": ("pretraining", "pretrain", "NAME data=DATASET"),
    "cohort": ("cohorts", "make-shards", "NAME --out DATASET"),
    "task": ("tasks", "probe", "RUN --data DATASET --task NAME"),
    "slurm": ("clusters", "slurm pretrain", "CONFIG --slurm NAME --nodes N --gpus-per-node G"),
    "model": ("models", "pretrain", "CONFIG model=NAME"),
}
_WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {"show": _show, "explain": _explain}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    parser = Parser(
        "config", __doc__.strip().replace("slim-brain config", call_of("config")), "explain pretrain run.steps"
    )
    parser.add_argument("command", nargs="?", choices=list(commands), help="COMMAND --help shows more")
    parser.add_argument("--list", action="store_true", help="list all configurations that ship, one a line")
    args = parser.parse_args(words)
    if not args.list:
        parser.print_help(sys.stderr)
        return WRONG
    return _list(args.json)


def _list(as_json: bool) -> int:
    found = {kind: [*presets(kind).values()] for kind in KINDS}
    width = max(len(preset.name) for kind in found.values() for preset in kind)
    for kind, ones in found.items():
        title, command, words = USES[kind]
        print(f"{title} ({call_of(command)} {words}):")
        for preset in ones:
            print(f"  {preset.name:<{width}}  {preset.description}")
        print()
    if as_json:
        facts = {
            kind: [{"name": p.name, "path": str(p.path), "description": p.description} for p in ones]
            for kind, ones in found.items()
        }
        print(json.dumps(facts))
    return DONE


def _show(words: list[str]) -> int:
    parser = Parser(
        "config show", "Print a configuration that ships with SLIM-Brain.", "cohort example_bids > lab.yaml"
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("name", metavar="NAME", help="a name that --list shows")
    args = parser.parse_args(words)
    path = find(args.kind, args.name, "NAME")
    text = path.read_text(encoding="utf-8")
    print(text, end="")
    if args.json:
        print(json.dumps({"kind": args.kind, "name": args.name, "path": str(path), "text": text}))
    return DONE


def _explain(words: list[str]) -> int:
    parser = Parser("config explain", "Explain the keys of a kind of configuration.", "pretrain optimizer")
    parser.add_argument("kind", choices=MODELS, metavar="KIND", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("key", nargs="?", metavar="KEY", help="a key or a section, such as run or run.steps")
    args = parser.parse_args(words)
    module, _, name = MODELS[args.kind].partition(":")
    found = explain(getattr(import_module(module), name), args.key)
    for key in found:
        print("\n".join(_lines(key)))
    if args.json:
        print(json.dumps([key.facts() for key in found]))
    return DONE


def _lines(key: Key) -> list[str]:
    if key.type == "section":
        return ["", f"{key.name}: {key.description}"]
    default = "required" if key.required else f"default: {_yaml(key.default)}"
    facts = "; ".join(filter(None, (key.type, f"unit: {key.unit}" if key.unit else "", default)))
    return [
        key.name,
        *textwrap.wrap(key.description, _WIDTH - 4, initial_indent="    ", subsequent_indent="    "),
        *textwrap.wrap(f"[{facts}]", _WIDTH - 4, initial_indent="    ", subsequent_indent="     "),
    ]


def _yaml(value: Any) -> str:
    """A value as it is written in a configuration."""
    return value if isinstance(value, str) and value else json.dumps(value)
