"""From a checkpoint to units whose weights lie in host memory."""
