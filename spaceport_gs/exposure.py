"""Exposure: how a camera turned the scene's colours into those of one photo, as an affine change of colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from spaceport_gs.ops import AdamSettings


@dataclass(frozen=True)
class Exposure:
    """Exposures of views, which are trained in place, with their own Adam each: a view that is not looked at rests.

    The colours of a render become A · colour + b before they are compared with the photo. `V` is missing in that of one
    view.
    """

    values: torch.Tensor  # [V, 3, 4] float32, A | b
    first: torch.Tensor  # [V, 3, 4] Adam's average of the gradient
    second: torch.Tensor  # [V, 3, 4] and of its square
    n_steps: torch.Tensor  # [V] float32

    @staticmethod
    def identity(n_views: int, device: Any = "cpu") -> Exposure:
        """Of `n_views` views, nothing changed yet."""
        import torch

        values = torch.eye(3, 4, device=device).repeat(n_views, 1, 1)
        return Exposure(values, torch.zeros_like(values), torch.zeros_like(values), torch.zeros(n_views, device=device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the fields."""
        return self.values, self.first, self.second, self.n_steps

    def of(self, view: int) -> Exposure:
        """That of one view, in the same memory."""
        return Exposure(*(tensor[view] for tensor in self.tensors()))

    def copy(self) -> Exposure:
        return Exposure(*(tensor.clone() for tensor in self.tensors()))

    def restore(self, other: Exposure) -> None:
        """Takes over what `other` holds; the memory stays."""
        for tensor, source in zip(self.tensors(), other.tensors(), strict=True):
            tensor.copy_(source)

    def update(self, gradient: torch.Tensor, settings: AdamSettings) -> None:
        """One step of Adam on that of one view; gradient [3, 4]."""
        import torch

        self.n_steps.add_(1)
        self.first.lerp_(gradient, 1 - settings.beta1)
        self.second.lerp_(gradient * gradient, 1 - settings.beta2)
        first = self.first / -torch.expm1(self.n_steps * math.log(settings.beta1))
        second = self.second / -torch.expm1(self.n_steps * math.log(settings.beta2))
        self.values.sub_(settings.exposure * first / (second.sqrt() + settings.epsilon))
