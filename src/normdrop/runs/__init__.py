"""A run: its options, its folder (written in one place, read in one), its data and its network."""
