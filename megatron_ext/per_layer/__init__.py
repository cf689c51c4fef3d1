"""PLE, per-layer embedding: every layer has a small token embedding, which is gated into the residual stream."""
