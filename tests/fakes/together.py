"""A backend whose decode steps have several sequences, on the CPU."""

from __future__ import annotations

import time

import numpy as np

from tango_plugins import TangoError
from tango_runtime.backends.ort_cpu import OrtCpuBackend


class TogetherBackend(OrtCpuBackend):
    """Decodes one sequence after the other, as if it were one step.

    Attributes:
        steps: Number of sequences of each step.
        failures: Steps that will fail.
        spoiled: The sequence of the next step whose logits are not numbers.
        slept_ms: Milliseconds that all steps took at least.
    """

    def __init__(self, bundle):
        super().__init__(bundle)
        self.steps, self.failures, self.spoiled, self.slept_ms = [], 0, None, 0

    def batch(self, sequences):
        self.sequences = sequences

    def decode_together(self, steps):
        assert 1 <= len(steps) <= self.sequences
        assert len({id(cache) for cache, _ in steps}) == len(steps)
        if self.failures:
            self.failures -= 1
            raise TangoError("the device failed", "")
        self.steps.append(len(steps))
        time.sleep(0.001)
        self.slept_ms += 1
        found = [self.extend(cache, [self.embed(np.array([token], np.int64))]) for cache, token in steps]
        if self.spoiled is not None:
            found[self.spoiled][:] = np.nan
            self.spoiled = None
        return found

    def decode(self, cache, token):
        return self.decode_together([(cache, token)])[0]
