"""Data sets: one file for each format, all read in chunks, never whole in memory."""
