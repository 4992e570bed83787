"""Search for a schedule: method, sites and budgets, by what they cost and what they lose."""
