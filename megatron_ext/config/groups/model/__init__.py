"""Parts of the base model's config group: fields that belong together, with their checks."""
