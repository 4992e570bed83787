"""The passes, one a file; `manager` runs them, `pipeline` says in which order."""
