"""Deployment: the roles as programs of their own, and who carries their messages."""
