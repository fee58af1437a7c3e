"""Nets as lazy recipes: what each cell looks like, with nothing materialised."""
