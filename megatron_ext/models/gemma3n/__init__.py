"""Parts of a layer that Gemma 3n has and Gemma 3 lacks: AltUp's residual streams, Laurel, and sparse activations."""
