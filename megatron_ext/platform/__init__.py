"""Adapts a run to its machine: CUDA with NCCL, or CPU with gloo. No other package replaces parts of `torch.cuda`."""
