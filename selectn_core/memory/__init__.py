"""How device and host memory are laid out, and what a plan makes of them."""
