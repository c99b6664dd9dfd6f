"""How models learn: distillation, DP-SGD, and the proofs that come before it."""
