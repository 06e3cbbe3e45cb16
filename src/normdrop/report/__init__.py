"""The report of one run: a page, its figures, and what it says of them."""
