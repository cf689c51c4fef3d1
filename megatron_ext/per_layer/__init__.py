"""PLE: per-layer embedding. A small token embedding for every layer, gated into the residual stream."""
