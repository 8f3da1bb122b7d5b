"""How a bus is divided between replicas."""
