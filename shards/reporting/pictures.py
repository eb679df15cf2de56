"""Pictures of single sessions: some are embedded in the page of a dataset, others are files beside it.

    report/index.html
    report/sessions/0005.png    the fifth session of the dataset; loaded when it is opened

File names are numbers, because the names of sessions may stay in the laboratory (`shards.reporting.anonymous`). The
arrays of a session are read when it is drawn, so the memory does not depend on the number of sessions.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.core import files
from shards.core.progress import progress
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.preprocessing import space
from shards.reporting import html, quality_figures, session_views
from shards.reporting.distribution import Outlying, in_words
from shards.reporting.session_facts import all_facts
from shards.reporting.windows_view import Given

FOLDER = "sessions"  # beside the page
DRAWN = 12  # sessions with a picture, by default
_EXAMPLES, _MOST_EXAMPLES = 6, 12  # sessions embedded by default; more than six only with more than five cohorts

_ARRAYS = (
    *("baseline", "brain", "carpet", "displacement", "patch", "roi"),
    *("scores", "scores_space", "scores_time", "start"),
)
_GUIDE = (
    "Top: the mean image in three planes of the grid. Thin blue lines are the edges of the kept patches. The "
    "brain mask is outlined in orange, the MNI152 brain with white dashes (only for scans in MNI space; the "
    "outlines should agree). The left of the picture is the left of the brain.",
    "Below, on one time axis: the z-scored signal of each parcel; the saliency of every window; a carpet plot "
    "of z-scored voxels, from the edge to the centre of the brain; DVARS of the parcel means; framewise "
    "displacement, if the confounds table of the scan has it; and the global signal. The strip above the carpet "
    "shows the kept windows, the pale bands below it the most salient ones. In the carpet, a stripe over the whole "
    "height is a global change; a stripe only at the edge is mostly motion. A good ranking avoids spikes of DVARS "
    "and does not simply follow the global signal.",
    "For rankers that use both, thin lines show the two parts of a score: how well a window is predicted from "
    "other parcels (space), and from the windows before and after it (time). The score is at most the smaller "
    "of the two. Noise is low in both; a spike can be high in space, but not in time, because it cannot be "
    "predicted from other windows.",
)


@dataclass(frozen=True)
class Drawn:
    """Where the picture of a session is: `#NAME` on the page, or a file beside it; its caption and width."""

    source: str
    caption: str
    width: int


def choose(sessions: Sequence[SessionRecord], outlying: Outlying, embed: int | None, total: int | None) -> list[str]:
    """The keys of the sessions to draw; those to embed come first.

    They are the two of worst quality, then one of each cohort in turn; after those to embed, all others of outlying
    quality, and again one of each cohort in turn. Within a cohort, sessions are sorted by a hash of the key, which is
    arbitrary but reproducible.

    Parameters
    ----------
    sessions : sequence of SessionRecord
    outlying : Outlying
    embed : int or None
        Number of sessions to embed; None: see `number_embedded`.
    total : int or None
        Number of sessions to draw; None: all.
    """
    total = len(sessions) if total is None else min(total, len(sessions))
    queues: dict[str, list[str]] = defaultdict(list)
    for session in sorted(sessions, key=lambda one: hashlib.sha256(one.key.encode()).digest()):
        queues[session.cohort].append(session.key)
    turns = [
        queues[cohort][turn]
        for turn in range(max(map(len, queues.values()), default=0))
        for cohort in sorted(queues)
        if turn < len(queues[cohort])
    ]
    # a dict keeps the order of the first insertion
    examples = list(dict.fromkeys([*list(outlying)[:2], *turns]))[: number_embedded(sessions, embed)]
    return list(dict.fromkeys([*examples, *outlying, *turns]))[:total]


def number_embedded(sessions: Sequence[SessionRecord], embed: int | None) -> int:
    """The number of sessions to embed: the given one, else six, and up to twelve with more than five cohorts."""
    if embed is not None:
        return min(embed, len(sessions))
    return min(max(_EXAMPLES, len({one.cohort for one in sessions}) + 2), _MOST_EXAMPLES, len(sessions))


def draw(
    dataset: Dataset, outlying: Outlying, chosen: Sequence[str], embedded: int, folder: Path, given: Given
) -> tuple[list[html.Part], dict[str, Drawn]]:
    """Draw sessions, and write the files beside the page. Pictures of an earlier page are removed.

    Parameters
    ----------
    dataset : Dataset
    outlying : Outlying
    chosen : sequence of str
        Keys of the sessions to draw.
    embedded : int
        The number of the first of them that are embedded.
    folder : Path
        Folder of the page.
    given : Given
        For the interactive views.

    Returns
    -------
    parts : list of Part
        The embedded pictures, with an explanation, and links to their interactive views.
    drawn : dict of str to Drawn
        The picture of each drawn session.

    Raises
    ------
    DatasetError
        If a sample is damaged.
    """
    outline = space.template()
    number = {session.key: place for place, session in enumerate(dataset.sessions, 1)}
    parts: list[html.Part] = [html.Text(words) for words in _GUIDE] if chosen[:embedded] else []
    views = session_views.start(folder)
    drawn: dict[str, Drawn] = {}
    written: set[Path] = set()
    with progress("draw", len(chosen), "sessions", bool(chosen)) as advance:
        for place, key in enumerate(chosen):
            session = dataset.sessions[number[key] - 1]
            shown = quality_figures.Shown(dataset.grid, dataset.frames, session, dataset.read(session, _ARRAYS))
            words = shown.words()
            if key in outlying:
                words += f" Outlying: {in_words(outlying[key])}."
            name = f"{number[key]:04}"
            picture = html.Picture.of(shown.draw(outline), alt(key), words, f"picture-{name}")
            if place < embedded:
                facts = html.Facts(all_facts(session, dataset.grid), small=True)
                parts += [html.Heading(key), facts, picture, session_views.write(views, dataset, session, given)]
                drawn[key] = Drawn(f"#{picture.name}", words, picture.width)
            else:
                path = folder / FOLDER / f"{name}.png"
                files.write_atomically(path, picture.png)
                written.add(path)
                drawn[key] = Drawn(f"{FOLDER}/{path.name}", words, picture.width)
            advance(1, key)
    _remove_others(folder / FOLDER, written)
    return parts, drawn


def alt(key: str) -> str:
    """Description of the picture of a session, for those who cannot see it."""
    return (
        "Three planes of the mean image with mask and patch grid; parcels, saliency, carpet, DVARS and global signal "
        f"over time; {key}"
    )


def _remove_others(folder: Path, written: set[Path]) -> None:
    for path in folder.glob("[0-9]*.png"):
        if path not in written:
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
