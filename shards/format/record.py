"""Typed records for JSON: checked once when they are read, and written with the same bytes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt

Size = Annotated[StrictInt, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(strict=True)]
Length = Annotated[float, Field(gt=0, lt=1e6, strict=True)]


class Record(BaseModel):
    """A JSON object. Fields of other versions are kept and written again."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def tree(self) -> dict[str, object]:
        """The fields that were read or set, without defaults, as JSON-serialisable data."""
        return self.model_dump(mode="json", exclude_unset=True)
