"""Records the operations, memory and communication of a rehearsed rank."""
