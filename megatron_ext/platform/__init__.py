"""Adapts a run to its machine: CUDA with NCCL, or CPU with gloo. Only this package replaces parts of `torch.cuda`."""
