"""Studies: methods compared at equal cost, and the pages and pictures that show it."""
