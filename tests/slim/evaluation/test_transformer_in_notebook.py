"""The transformer in a real notebook: its progress is one output of the cell, and can be silenced."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs

nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient and ipykernel")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

CELL = """
from slim import SlimBrainTransformer
made = SlimBrainTransformer({run!r}, pooling="mean", verbose={verbose}).fit({images!r})
"""


def test_progress_is_one_output_of_the_cell(dataset: Path, cohort: Path, tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run", dataset, ALIGNED))
    images = [str(source.bold) for source in find_runs(cohort / "cohort.yaml")[:3]]
    cells = [CELL.format(run=run, images=images, verbose=verbose) for verbose in (False, True)]
    cells.append('import os; os.environ["SLIM_PROGRESS"] = "0"' + cells[1])
    cells.append("made")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
    silent, shown, off, last = (cell.outputs for cell in book.cells)
    assert [one.output_type for one in shown] == ["display_data"]
    assert shown[0].data["text/plain"].startswith("encode: 3/3 images, ")
    assert '<progress value="3" max="3">' in shown[0].data["text/html"]
    assert silent == [] and off == []
    assert "verbose=True" in last[0].data["text/plain"]
