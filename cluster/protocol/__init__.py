"""What replicas, nodes and the coordinator say to each other."""
