"""What the server of forked.py imports once, for all processes that are forked from it."""

import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a device when it is imported, and tests are about CPUs
for name in ("forked", "fastdllm.training.run", "fastdllm.evaluation.run", "deepspeed", "tensorboard"):
    import_module(name)
