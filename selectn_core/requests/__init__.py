"""Requests as their submitter sees them, and whether they met their objectives."""
