"""Settings for every test."""

from __future__ import annotations

import torch
from hypothesis import settings

# The same examples on every run, and no deadline: the machines that run this are shared.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("fixed")

torch.manual_seed(0)
# Small models: a second thread costs more than it gives.
torch.set_num_threads(1)
