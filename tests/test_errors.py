"""Errors are what callers of a Python library expect, and survive the way back from a worker process."""

from __future__ import annotations

import pickle

import pytest

from shards.errors import ArgumentError, ConfigError, DatasetError, RunRefused, SampleCorrupt, UserError


@pytest.mark.parametrize("kind", [ConfigError, ArgumentError, RunRefused, DatasetError, SampleCorrupt])
def test_wrong_values_are_value_errors(kind: type[UserError]):
    assert issubclass(kind, ValueError)
    assert issubclass(kind, TypeError) == (kind is ArgumentError)
    error = pickle.loads(pickle.dumps(kind("file", "field", 1, 2, "Do that")))
    assert type(error) is kind and str(error) == error.line() == "file: field: got 1, expected 2. Do that"
