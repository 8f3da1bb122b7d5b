"""Select-N on Ray Serve: HTTP ingress, OpenAI protocol, replicas and the command line."""
