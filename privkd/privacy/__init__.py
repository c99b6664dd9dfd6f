"""What protects people, and what it costs: events, noise, the ledger, and bounds from both sides."""
