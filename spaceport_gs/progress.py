"""How long work tells the outside where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One progress event of one stage."""

    stage: str
    step: int
    """Steps done, 0 … n_steps."""
    n_steps: int
    message: str = ""
    """What is being done, in a few words."""
    figures: Mapping[str, float | int] = field(default_factory=dict)
    """Figures by name, such as loss, psnr, gaussians."""


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """The listener of those who do not want to know."""
