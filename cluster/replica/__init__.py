"""A replica's side of the protocol."""
