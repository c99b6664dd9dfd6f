"""Membership inference: a score for each record, higher where it is more likely a member."""
