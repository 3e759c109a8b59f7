"""Tests run from the repository root, on one thread: two threads on two busy cores can be slower than one, and less exact."""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
