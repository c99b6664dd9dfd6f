"""The secure channel: shares (device side), the aggregators' processes, and the backends behind them."""

import os

# Read by gRPC when it first makes a connection, so they are set before anything here imports it.
# It offers no other way to ask for TLS 1.3 alone: a cipher of TLS 1.2 that needs a key shared beforehand,
# which nobody has, leaves that version without any. Those of TLS 1.3 are not in this list.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-AES128-CBC-SHA")
# Its own log repeats on stderr what is raised, and lists every stranger's handshake.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
