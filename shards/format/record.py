"""JSON as typed records: checked once where it is read, written back with the same bytes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt

Size = Annotated[StrictInt, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(strict=True)]
Length = Annotated[float, Field(gt=0, lt=1e6, strict=True)]


class Record(BaseModel):
    """A JSON object. Facts that other versions add are kept, and written back."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def tree(self) -> dict[str, object]:
        """For JSON: what was read or set, without defaults."""
        return self.model_dump(mode="json", exclude_unset=True)
