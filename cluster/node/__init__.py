"""What a node knows of its hardware and of the processes on it."""
