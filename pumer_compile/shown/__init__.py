"""How plans, reports and programs show themselves: short tables, in a terminal and in a notebook."""
