"""Writing the reduced graph: where reducers are inserted, what they read, and what else is written otherwise."""
