"""Benchmarks of speed: our code and a plain alternative take turns in one run.

The wait policy of OpenMP is the one that the commands use. It is set here because the benchmarks import torch directly.
"""

from utils.cli import set_wait_policy

set_wait_policy()
