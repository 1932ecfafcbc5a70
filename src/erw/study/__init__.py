"""Studies: methods trained at equal cost, their comparison, and the page that shows it."""
