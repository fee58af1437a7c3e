"""Plans: what a run will take, found before anything is allocated."""
