"""Settings of a process's C libraries: the allocator, and OpenMP."""
