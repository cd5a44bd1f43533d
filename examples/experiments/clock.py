"""How long an epoch takes."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Clock:
    """Seconds of an epoch, on the wall and of the processor.

    They count from the end of the first step, in which kernels may be compiled, and are scaled to all steps.
    """

    began: tuple[float, float] = (0.0, 0.0)

    def first_step_done(self) -> None:
        """Begin to count."""
        self.began = (time.perf_counter(), time.process_time())

    def read(self, steps: int) -> dict[str, float]:
        """Return the seconds of an epoch of so many steps; of a single step they cannot be told."""
        scale = steps / (steps - 1) if steps > 1 else 0.0
        wall, processor = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        return {"seconds": wall * scale, "processor_seconds": processor * scale}
