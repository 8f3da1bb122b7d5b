"""The OpenAI API: requests, responses and errors."""
