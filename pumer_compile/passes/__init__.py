"""The passes: annotate, locate, insert, rewrite, verify; `pipeline` runs them in order."""
