"""Makes every fixture. `python make.py` makes all, `python make.py unet step` only these."""

import importlib
import sys

import torch

PARTS = ("ops", "unet", "optimizer", "q_sample", "step", "schedulers", "diffusers_dir", "diffusers_samples")

if __name__ == "__main__":
    torch.set_num_threads(1)  # the order of sums, and with it the last bits, follows the number of threads
    for part in sys.argv[1:] or PARTS:
        importlib.import_module(part).make()
