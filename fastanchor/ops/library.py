"""The namespace `torch.ops.fastanchor`, which every module of this package defines its operators in."""

import torch

LIBRARY = torch.library.Library("fastanchor", "DEF")
