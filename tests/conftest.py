"""One thread: the models are tiny, and threads that wait for one another would take most of the time."""

import torch

torch.set_num_threads(1)
