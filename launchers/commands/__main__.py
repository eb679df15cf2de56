"""`slim-brain COMMAND ...`, also `python -m launchers.commands COMMAND ...`: finds the module of a command and runs it.

Only that module is imported: the list of commands comes from the first line of each file, without torch.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.core.cli import DONE, WRONG, run
from shards.core.errors import ConfigError, did_you_mean
from shards.core.extras import require

# In the order of the work; the names are those of the modules, with `-` for `_`.
GROUPS = {
    "Prepare data": ("make-cohort", "make-shards", "train-extractor"),
    "Train": ("pretrain",),
    "Use an encoder": ("probe", "finetune", "embed", "explain", "reconstruct"),
    "Plan, look and share": ("plan", "report", "export", "bench", "experiments"),
    "Run on a cluster": ("slurm",),
    "Configure": ("config",),
}
# Optional packages that a command always needs. They are checked before its work, which may take hours. Other packages
# are checked where they are imported.
NEEDS = {
    "make-shards": ("webdataset", "matplotlib"),
    "pretrain": ("deepspeed",),
    "probe": ("matplotlib",),
    "finetune": ("deepspeed", "matplotlib"),
    "explain": ("matplotlib",),
    "reconstruct": ("matplotlib",),
    "report": ("matplotlib",),
    "experiments": ("deepspeed", "webdataset", "matplotlib"),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of a command; see `shards.core.cli`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(help_text(), file=sys.stdout if words else sys.stderr)
        return DONE if words else WRONG
    if words[0] == "--version":
        from slim import __version__

        print(f"slim-brain {__version__}")
        return DONE
    name, *rest = words
    if name not in COMMANDS:
        hint = did_you_mean(name.replace("_", "-"), COMMANDS)
        raise ConfigError("command line", "COMMAND", name, f"one of {', '.join(COMMANDS)}", hint)
    if not {"-h", "--help"} & set(rest):
        require(*NEEDS.get(name, ()))
    return importlib.import_module(f"launchers.commands.{_module(name)}").main(rest)


def help_text() -> str:
    """All commands in the order of the work, a line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: slim-brain COMMAND ...", "", "SLIM-Brain: a voxel-level, atlas-free foundation model for fMRI."]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}}  {_first_line(name)}" for name in names)]
    more = "slim-brain COMMAND --help shows the options of a command and an example."
    return "\n".join([*lines, "", more, "slim-brain --version shows the version."])


def _module(name: str) -> str:
    return name.replace("-", "_")


def _first_line(name: str) -> str:
    """The first line of the text at the head of a command's module, which is not imported."""
    text = Path(__file__).with_name(f"{_module(name)}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def console(*words: str) -> None:
    """The console script; the files of `tools/` call it with the name of their command."""
    run(lambda: main([*words, *sys.argv[1:]]))


if __name__ == "__main__":
    console()
