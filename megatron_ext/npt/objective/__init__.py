"""NPT's training objective: curriculum, teacher, losses of the layers and of the output, and monitoring."""
