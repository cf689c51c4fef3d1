"""What NPT trains: curriculum, teacher, losses of layers and output, monitoring."""
