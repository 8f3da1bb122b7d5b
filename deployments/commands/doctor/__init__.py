"""`selectn doctor`: checks of the machine that a configuration is to be served on."""
