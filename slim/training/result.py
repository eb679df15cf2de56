"""How far a training came, for the launcher that started it; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended.

    Attributes
    ----------
    finished : bool
        Whether all steps are done.
    step, steps : int
        Optimizer steps done, and of the run in all.
    stopped : str or None
        What stopped it before its end.
    resumed_from : str or None
        Name of the checkpoint it continued from.
    loss : float or None
        Of the last step.
    seconds : float
    warnings : list of str
        What the user should look at.
    """

    finished: bool
    step: int
    steps: int
    stopped: str | None = None
    resumed_from: str | None = None
    loss: float | None = None
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
