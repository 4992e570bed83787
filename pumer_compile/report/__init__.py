"""A report: one page that shows which tokens went where, on the user's own pictures and texts."""
