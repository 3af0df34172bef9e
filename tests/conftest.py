"""Shared set-up: tests share two cores with others, so torch gets one."""

import torch

torch.set_num_threads(1)
