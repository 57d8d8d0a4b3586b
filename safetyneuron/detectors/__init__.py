"""Other ways to find safety neurons than importance, and one table of all of them."""
