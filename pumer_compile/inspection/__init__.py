"""Does a model fit: what is in it, which methods apply, a schedule to begin with, or why not."""
