"""Tests of the compiled Triton transform and RandAugment on a GPU."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from tests.data.device.triton_kernel_cases import *  # noqa: F403
from tests.data.device.triton_randaugment_cases import *  # noqa: F403
