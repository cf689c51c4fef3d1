"""Connects checkpoints to EleutherAI's lm-evaluation-harness (`lm_eval`), which runs public benchmarks."""
