"""The one reader of tables: what labs' spreadsheets hold, and rows that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.core import tables
from shards.core.errors import ConfigError, RunRefused

pytestmark = pytest.mark.fast


def write(folder: Path, content: str | bytes, name: str = "t.tsv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, content: str | bytes) -> tables.TableFile:
    return tables.read(write(folder, content), "a table")


@pytest.mark.parametrize(
    "content",
    [
        "id\tage\tnote\n01\t20\tfine\n02\t30\tn/a\n",
        "id\tage\tnote\t\n01\t20\tfine\t\n02\t30\t\t\n",  # a tab at the end of each line
        "id\tage\tnote\n01\t20\tfine\t\t\n02\t30\t\n",  # tabs at the ends of rows alone
        "\ufeffid\tage\tnote\r\n01\t20\tfine\r\n02\t30\tN/A\r\n",  # byte order mark, line ends of Windows
        "id\tage\tnote\r01\t20\tfine\r02\t30\tn/a\r",  # of an old Macintosh
        '"id"\t"age"\t"note"\n"01"\t"20"\t"fine"\n"02"\t"30"\t""\n',  # quotes around every field
        "\nid , age , note\n01 , 20 , fine\n\n02 , 30 ,\n\n",  # commas, blanks around fields, empty lines
        "id;age;note\n01;20;fine\n02;30;\n",  # Excel where the comma is the decimal point
        "id  age note\n01 20   fine\n02 30 n/a\n",  # blanks, as ABCD's motion tables
        "id\tage\tnote\n01\t20\tfine\n02\t30\tn/a\n".encode("utf-16"),  # Excel's "Unicode text"
    ],
)
def test_one_table_in_many_spellings(tmp_path, content):
    table = read(tmp_path, content)
    assert table.columns == ("id", "age", "note") and len(table) == 2
    assert table.texts("id") == ["01", "02"] and table.values("id") == ["01", "02"]  # zeros are kept
    assert table.values("age") == [20, 30] and table.texts("note") == ["fine", None]
    np.testing.assert_array_equal(table.numbers("age"), [20.0, 30.0])


def test_only_na_of_bids_and_empty_fields_are_missing(tmp_path):
    words = ["None", "NA", "null", "NaN", "n/a", "", "-", "N/A"]
    table = read(tmp_path, "id\tdrug\n" + "".join(f"{n}\t{word}\n" for n, word in enumerate(words)))
    assert table.texts("drug") == ["None", "NA", "null", "NaN", None, None, "-", None]
    assert table.values("drug") == table.texts("drug")


def test_a_missing_number_may_be_written_nan(tmp_path):
    """As Matlab's writetable does; in a column of text NaN is text."""
    table = read(tmp_path, "id\tage\tname\n1\t20.5\tNaN\n2\tNaN\tx\n3\tn/a\ty\n")
    assert table.values("age") == [20.5, None, None] and table.values("name") == ["NaN", "x", "y"]
    np.testing.assert_array_equal(table.numbers("age"), [20.5, np.nan, np.nan])


def test_quotes_never_reach_beyond_their_line(tmp_path):
    text = 'id\tnote\tage\n1\t"lenses\t20\n2\tok\t30\n3\tscreen at 5"\t40\n'
    table = read(tmp_path, text)
    assert table.values("age") == [20, 30, 40] and table.texts("note") == ['"lenses', "ok", 'screen at 5"']
    quoted = read(tmp_path, 'id,note,age\n1,"left, then right",20\n2,"he said ""no""",30\n')
    assert quoted.texts("note") == ["left, then right", 'he said "no"'] and quoted.values("age") == [20, 30]
    with pytest.raises(ConfigError, match=r"rows: got 2 fields in line 2, expected 3, as in the header"):
        read(tmp_path, 'id,note,age\n1,"two\nlines",20\n')


def test_only_line_feeds_end_a_line(tmp_path):
    table = read(tmp_path, "id\tnote\n1\tfell asleep\u2028at the end\n2\tx\u0085y\x0bz\n")
    assert table.texts("note") == ["fell asleep\u2028at the end", "x\u0085y\x0bz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id\tage\n1\t20\t30\n", r"rows: got 3 fields in line 2, expected 2"),
        ("id\tage\n\n1\n", r"rows: got 1 fields in line 3, expected 2"),
        ("id\tage\tage\n1\t2\t3\n", r"header: got column age twice"),
        ("", r"an empty file \(0 bytes\)"),
        ("\n \n", r"no line with text"),
        ("id\tage\n1\t\x00\n", r"binary content"),
        ("id\tname\n1\tJ\u00f6rg\n".encode("latin-1"), r"bytes that are not UTF-8 in line 2.*Save it as UTF-8"),
        (b"/annex/objects/MD5E-s1--00.tsv\n", r"a pointer of git-annex.*datalad get"),
        ("<!DOCTYPE html><title>403</title>", r"an HTML page"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_line(tmp_path, content, message):
    path = write(tmp_path, content)
    for kind in (ConfigError, RunRefused):
        with pytest.raises(kind, match=message) as caught:
            tables.read(path, "a table", kind)
        assert "\n" not in caught.value.line() and caught.value.line().startswith(f"{path}: ")


def test_a_value_that_is_no_number_is_named_with_its_line(tmp_path):
    table = read(tmp_path, "onset\tduration\n0\t1\n\n12,5\t1\n")
    with pytest.raises(ConfigError, match=r"t\.tsv: onset: got '12,5' in line 4, expected a number or n/a"):
        table.numbers("onset")


fields = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters='\t"'), max_size=6).map(
    str.strip
)


@given(rows=st.lists(st.tuples(st.integers(1, 99).map(str), fields), max_size=8))
def test_what_pandas_writes_is_read_back(tmp_path_factory, rows):
    """Fields are text as it stands; only quotes, tabs and line ends, which BIDS forbids in a field, are left out."""
    path = tmp_path_factory.mktemp("t") / "t.tsv"
    pd.DataFrame(rows, columns=["id", "text"]).to_csv(path, sep="\t", index=False)
    table = tables.read(path, "a table")
    assert table.texts("id") == [one for one, _ in rows]
    assert table.texts("text") == [None if two.lower() in ("", "n/a") else two for _, two in rows]
