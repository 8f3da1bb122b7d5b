"""What an operator looks at: the status, and decisions in words."""
