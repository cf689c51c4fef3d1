"""Writing a checkpoint's files: in the step that saves, or from a copy while training continues."""
