"""Files that are whole or absent: cells, latents, the journal, the run folder."""
