"""Growing a model: its stacks, the phases of training, what each phase trains, and a new stack's initial weights."""
