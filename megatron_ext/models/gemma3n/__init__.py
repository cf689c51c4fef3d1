"""Parts of a layer that Gemma 3n has beside Gemma 3's: AltUp's residual streams, Laurel, and sparse activations."""
