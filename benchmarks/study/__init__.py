"""Does it learn better? Tasks x methods x budgets x seeds from a declarative file, run resumably, with paired statistics."""
