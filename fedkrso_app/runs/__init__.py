"""A run from outside: its folder, figures, reports, plans and comparisons."""
