"""The privacy-utility curve: many runs, each trained and audited, and what they come to together."""
