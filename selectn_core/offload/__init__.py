"""The data plane: units are copied in while others compute."""
