"""A kernel that finds no memory for its buffers is an error and not the end of the process."""

from __future__ import annotations

import pytest

from ..processes import python

pytestmark = [pytest.mark.gate, pytest.mark.usefixtures("quickly_compiled")]

# The limit leaves room for the results, two maps, and not for what is computed beside them.
NO_MEMORY = """
import resource, torch, regulate
torch.set_num_threads(1)
{setup}
with torch.no_grad():
    run(torch.zeros({small}))
    x = torch.zeros({large})
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * x.nbytes + {more}, -1))
    try:
        run(x)
    except MemoryError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("setup", "small", "large", "name"),
    [
        ("run = regulate.ConvLSTMCell(1)", (1, 1, 4, 4), (1, 1, 2000, 2000), "regulate_step"),
        (
            "import torch.nn as nn; run = lambda x: regulate.kernels.norm_relu(nn.BatchNorm2d(x.shape[1]), x)",
            (2, 1, 4, 4),
            (2, 2_000_000, 1, 1),
            "regulate_norm_relu",
        ),
    ],
    ids=["step", "norm"],
)
def test_a_failed_allocation_is_an_error_and_not_the_end_of_the_process(setup, small, large, name):
    # The step wants 17 buffers of 16 MB, the norm two sums of 8 bytes for each of two million channels.
    more = 32_000_000 if name == "regulate_step" else 64_000_000  # which the norm itself takes
    done = python(NO_MEMORY.format(setup=setup, small=small, large=large, more=more))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name} found no memory for its buffers")
