"""The forms of the element-wise kernels that a CPU can run, for the tests that go through all of them."""

from __future__ import annotations

import pytest

from giong.engine.elementwise import Kernels


def interpreted_triton() -> Kernels:
    """The Triton kernels as its interpreter runs them on the CPU."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for the GPU here, and test_cuda.py tests its kernels there")
    from giong.engine.triton_kernels import TRITON

    return TRITON
