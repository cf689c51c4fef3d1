"""NPT beside its base model: comparison, report, generations."""
