"""Find files with a pattern that has named fields: `sub-{subject}/*_run-{run}_bold.nii.gz`.

`{name}` is a field, `*` and `?` match parts of a name, and `**` matches any number of folders. All other characters,
including square brackets, are literal. Links are followed, except circular ones. Hidden files and unfinished downloads
are ignored.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shards.core.errors import ConfigError, RunRefused
from shards.core.files import is_partial, printable

FIELDS = ("subject", "session", "task", "run")
_TOKEN = re.compile(r"\{(\w+)\}|\*\*/?|\*|\?")
_LISTED = 10  # number of names in a note


@dataclass(frozen=True)
class FoundScan:
    """A scan that was found: its names, its file, and why it is refused, if that is known already."""

    subject: str
    bold: Path
    session: str = ""
    task: str = ""
    run: str = ""
    variant: str = ""
    problem: RunRefused | None = None

    def names(self) -> dict[str, str]:
        """Values for the fields of a pattern."""
        return {name: getattr(self, name) for name in FIELDS}


@dataclass
class Found:
    """The result of a search: scans, files that match only the globs of a pattern, and notes."""

    items: list[FoundScan]
    passed_over: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def listed(names: list[str]) -> str:
    """The first of many names, and the number of further ones."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(printable(name) for name in names[:_LISTED]) + more


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Convert a file pattern to a regular expression for relative paths.

    `{name}` as a part of a name matches any characters except `_`, `.` and `/`; as a whole folder name it matches any
    name. A repeated field must match the same text. `*`, `?` and `**` are globs.
    """
    out, seen, at = "", set(), 0
    star = -1  # position of the last `*` in `out`, if only text follows it
    for token in _TOKEN.finditer(pattern):
        out += re.escape(pattern[at : token.start()])
        at = token.end()
        name = token.group(1)
        if name:
            whole = pattern[: token.start()].endswith(("/",)) or token.start() == 0
            whole = whole and (pattern[at : at + 1] == "/")
            out += f"(?P={name})" if name in seen else f"(?P<{name}>{'[^/]+' if whole else '[^/_.]+'})"
            seen.add(name)
        elif token.group() == "*":
            if star >= 0:  # for text between two `*`, only its first match is tried
                out = f"{out[:star]}(?>[^/]*?{out[star + len('[^/]*') :]})"
            star = len(out)
            out += "[^/]*"
            continue
        else:
            out += {"?": "[^/]", "**": ".*", "**/": "(?:.*/)?"}[token.group()]
            if token.group() == "?":
                continue
        star = -1
    return re.compile(out + re.escape(pattern[at:]) + r"\Z", re.DOTALL)


def glob_regex(text: str) -> re.Pattern[str]:
    """Convert a text with the globs `*` and `?` to a regular expression for `fullmatch`."""
    return _glob((piece, piece) for piece in re.split(r"([*?])", text))


def _glob(pieces: Iterable[tuple[str, str]]) -> re.Pattern[str]:
    """Build a regular expression from the pieces of a glob: `*`, `?` or text.

    For text between two `*`, only its first match is tried, so many `*` cost no more than one.
    """
    parts = [""]
    for piece, text in pieces:
        if piece == "*":
            parts.append("")
        else:
            parts[-1] += "." if piece == "?" else re.escape(text)
    first, *between = parts
    last = f".*{between.pop()}" if between else ""
    return re.compile(first + "".join(f"(?>.*?{part})" for part in between if part) + last, re.DOTALL)


def find(path: Path, pattern: str, root: Path) -> Found:
    """Find the scans that match the pattern of a cohort file.

    Raises
    ------
    ConfigError
        If the pattern has other fields than `FIELDS`, is not a relative path, or matches nothing.
    """
    unknown = set(re.findall(r"\{(\w+)\}", pattern)) - set(FIELDS)
    if unknown:
        raise ConfigError(path, "pattern", f"{{{sorted(unknown)[0]}}}", f"only {{{'}, {'.join(FIELDS)}}}")
    parts = pattern.split("/")
    if not parts[0] or any(part == ".." or ("**" in part and part != "**") for part in parts):
        expected = "a path relative to root, without .., and with ** only as a whole folder name"
        raise ConfigError(path, "pattern", pattern, expected)
    regex, found, partial = pattern_regex(pattern), Found([]), []
    search = Search()
    for bold in search.files(root, _TOKEN.sub(lambda token: "*" if token.group(1) else token.group(), pattern)):
        match = regex.match(bold.relative_to(root).as_posix())
        if is_partial(bold.name):
            partial.append(bold.name)
        elif match:  # also a broken link (datalad), so that its scan is refused by name
            found.items.append(_item(bold, match.groupdict()))
        else:
            found.passed_over.append(bold)
    if not found.items:
        hint = "Check root and pattern"
        if found.passed_over:
            name = printable(found.passed_over[0].name)
            hint += f"; {name} matches its globs, but a field cannot match _, . or /"
        raise ConfigError(path, "root", f"no scan under {printable(root)}", f"files that match {pattern}", hint)
    if partial:
        found.notes.append(f"unfinished downloads are left out: {listed(partial)}")
    found.notes += search.notes
    return found


def _item(bold: Path, names: Mapping[str, str]) -> FoundScan:
    subject, session, task, run = (names.get(name, "") for name in FIELDS)
    return FoundScan(subject, bold, session, task, run)


def beside(path: Path, key: str, pattern: str, root: Path, names: Mapping[str, str]) -> Path:
    """The file of a scan for a pattern in the cohort file, such as its mask, under root or next to the cohort file.

    Fields are replaced by the names of the scan. If the file does not exist, the expected path is returned, so that
    only this scan is refused.

    Raises
    ------
    ConfigError
        If the pattern has another field, or several files match it.
    """
    given = {name: value for name, value in names.items() if value}
    fields = re.findall(r"\{([^{}]*)\}", pattern)
    if set(fields) - given.keys() or re.search(r"[{}]", re.sub(r"\{\w+\}", "", pattern)):
        raise ConfigError(path, key, pattern, f"a path with the fields {', '.join(given)} or globs")
    relative = re.sub(r"\{(\w+)\}", lambda match: given[match.group(1)], pattern)
    literal = root / relative  # an absolute path stays as it is
    if os.path.lexists(literal):
        return literal
    matches = list(Search().files(root, pattern.lstrip("/"), given))
    if not matches and os.path.lexists(path.parent / relative):
        return path.parent / relative
    if len(matches) > 1:
        raise ConfigError(path, key, f"{len(matches)} files for {printable(relative)}", "one file per scan")
    return matches[0] if matches else literal


class Search:
    """A search through folders that follows links, and notes folders that cannot be read.

    Attributes
    ----------
    notes : list of str
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._seen: set[tuple[str, int]] = set()

    def files(self, folder: Path, pattern: str, names: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Files (including broken links) below a folder that match a pattern, sorted by name.

        Parameters
        ----------
        folder : Path
        pattern : str
            A path relative to the folder, with globs.
        names : mapping of field to text, optional
            Values for the fields of the pattern.
        """
        words = [part for part in pattern.split("/") if part not in ("", ".")]
        words = [word for word, after in itertools.pairwise([*words, ""]) if (word, after) != ("**", "**")]
        parts = [_PatternPart(word, names or {}) for word in words]
        if not parts:
            return iter(())
        self._seen = set()
        return iter(sorted(set(self._match(folder, parts, (os.path.realpath(folder),)))))

    def _match(self, folder: Path, parts: list[_PatternPart], above: tuple[str, ...]) -> Iterator[Path]:
        state = str(folder), len(parts)
        if state in self._seen:  # several `**` can match a folder in several ways
            return
        self._seen.add(state)
        part, rest = parts[0], parts[1:]
        if part.any_depth:
            yield from self._match(folder, rest, above) if rest else self._files(folder)
            for inner in self.folders(folder):
                real = os.path.realpath(inner)
                if real not in above:  # otherwise a circular link
                    yield from self._match(inner, parts, (*above, real))
        elif part.literal is not None:
            inner = folder / part.literal
            if rest and inner.is_dir():
                yield from self._match(inner, rest, above)
            elif not rest and os.path.lexists(inner) and not inner.is_dir():
                yield inner
        elif rest:
            for inner in self.folders(folder):
                if part.matches(inner.name):
                    yield from self._match(inner, rest, above)
        else:
            yield from (file for file in self._files(folder) if part.matches(file.name))

    def folders(self, folder: Path) -> list[Path]:
        """Folders, and links to folders, in a folder, without hidden ones."""
        return [Path(entry.path) for entry in self._entries(folder) if _is_folder(entry) and entry.name[0] != "."]

    def _files(self, folder: Path) -> list[Path]:
        return [Path(entry.path) for entry in self._entries(folder) if not _is_folder(entry)]

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            note = f"cannot read the folder {printable(folder)} ({error.strerror})"
            self.notes += [note] if note not in self.notes else []
            return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link to itself
        return False


class _PatternPart:
    """A part of a pattern between `/`: text, a glob, or any number of folders."""

    def __init__(self, text: str, names: Mapping[str, str]):
        self.any_depth = text == "**"
        self.hidden = text.startswith(".")
        pieces = re.split(r"(\{\w+\}|[*?])", text)
        filled = [names.get(piece[1:-1], piece) if piece[:1] == "{" else piece for piece in pieces]
        globs = any(piece in ("*", "?") for piece in pieces)
        self.literal = None if globs or self.any_depth else "".join(filled)
        self._regex = _glob(zip(pieces, filled, strict=True))

    def matches(self, name: str) -> bool:
        return (self.hidden or not name.startswith(".")) and self._regex.fullmatch(name) is not None
