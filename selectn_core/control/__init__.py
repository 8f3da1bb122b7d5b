"""The online stage: before every step, what joins it and what is offloaded while it runs."""
