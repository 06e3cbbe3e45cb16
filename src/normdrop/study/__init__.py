"""Looking at runs: comparing variants, and the report of one run."""
