"""The precisions that networks are trained in, by the names that command lines give them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """How numbers are held and multiplied; the optimizer's state is 32-bit in all of them."""

    products: str = "highest"  # of float32 matrices: torch.set_float32_matmul_precision
    autocast: torch.dtype | None = None  # of the forward pass
    parameters: torch.dtype = torch.float32
    scaled: bool = False  # losses, on their way backward: fp16 has few exponents

    @property
    def numbers(self) -> torch.dtype:
        """Of what a layer reads and of its gradients."""
        return self.autocast or self.parameters

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """Within it float32 matrices are multiplied so, the optimizer's too."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.products)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def forward(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)


PRECISIONS = {
    "fp32": Precision(),
    "tf32": Precision(products="high"),
    "bf16": Precision(products="high", autocast=torch.bfloat16),
    "fp16": Precision(products="high", autocast=torch.float16, scaled=True),
    "bf16-params": Precision(products="high", parameters=torch.bfloat16),
}
