"""The folder of a run: what is durable, what it is bound to, and what crossed the wire."""
