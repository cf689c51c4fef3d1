"""NPT, neuro-plastic transformer: the attention output changes the MLP's weights, token by token."""
