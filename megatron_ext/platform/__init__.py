"""Where a run happens: CUDA with NCCL, or CPU with gloo. The only place that adapts `torch.cuda`."""
