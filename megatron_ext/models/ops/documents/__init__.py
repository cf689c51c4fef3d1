"""Several documents in one sequence, which do not attend to one another."""
