"""A replica: an engine, a tokenizer, and a door in front of them."""
