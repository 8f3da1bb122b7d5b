"""One engine: a model on a device, its requests, and what it can still take on."""
